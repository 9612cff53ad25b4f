"""Two parts of the training in parallel, each on half of the cores."""

import io
import multiprocessing
import os
import signal
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

import torch


def side_by_side(first: Callable[[], Any], second: Callable[[], Any]) -> tuple[Any, Any]:
    """Run two functions in parallel, `second` in a forked process, and return both results.

    Small models gain little from a second thread, so two models at a time use the cores better. With one core or
    without `fork`, the functions run one after the other.

    Args:
        first: function to run in this process.
        second: function to run in the other process, which does not change this process's memory; its result must be
            writable by `torch.save`.

    Raises:
        RuntimeError: `second` failed; the message has its traceback.
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
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # an interrupt goes to both processes, and the first ends this one
    try:
        content = io.BytesIO()
        torch.save(function(), content)
        sender.send((None, content.getvalue()))
    except Exception:
        sender.send((traceback.format_exc(), b""))
