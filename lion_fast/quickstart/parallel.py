"""Two pieces of training side by side, each on its half of the cores."""

import io
import multiprocessing
import os
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

import torch


def side_by_side(first: Callable[[], Any], second: Callable[[], Any]) -> tuple[Any, Any]:
    """The results of both functions; `second` runs in a forked process, where there are two cores to share.

    Small models gain little from a second thread, so the cores are better spent on two of them at a time. Where
    processes cannot be forked, they run one after the other.

    Args:
        first: runs in this process.
        second: what it changes in memory stays in its own process; it returns what `torch.save` can write.

    Raises:
        RuntimeError: `second` failed, with its traceback.
    """
    cores = os.cpu_count() or 1
    if cores < 2 or "fork" not in multiprocessing.get_all_start_methods():
        return first(), second()
    threads = torch.get_num_threads()
    torch.set_num_threads(min(4, cores // 2))
    fork = multiprocessing.get_context("fork")
    receiver, sender = fork.Pipe(duplex=False)
    process = fork.Process(target=_send_result, args=(second, sender))
    process.start()
    sender.close()
    try:
        ours = first()
        try:
            failure, content = receiver.recv()
        except EOFError:
            failure, content = "it was killed", b""
    except BaseException:
        process.terminate()
        raise
    finally:
        process.join()
        torch.set_num_threads(threads)
    if failure:
        raise RuntimeError(f"training in the second process failed: {failure}")
    return ours, torch.load(io.BytesIO(content), weights_only=False)


def _send_result(function: Callable[[], Any], sender: Connection) -> None:
    try:
        content = io.BytesIO()
        torch.save(function(), content)
        sender.send((None, content.getvalue()))
    except Exception:
        sender.send((traceback.format_exc(), b""))
