"""`lion-fast demo`: serve a web page to try a model."""

import argparse
import ipaddress
import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

from lion_fast.cli.arguments import device, expect_model, path, positive_int
from lion_fast.cli.ask import DEFAULT_MODEL
from lion_fast.cli.loading import importing

_PATIENCE = 10.0  # seconds after a signal


def add_parsers(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    parser = commands.add_parser(
        "demo",
        help="serve a web page to upload an image, ask about it, and inspect the answer",
        example="--model runs/quickstart/checkpoint",
        description="Serve a web page that captions, answers and locates, and shows which visual tokens and adapters "
        "were used. Only this machine can open it unless --host says otherwise. It loads nothing from the internet.",
    )
    parser.add_argument(
        "--model", type=path, default=DEFAULT_MODEL, metavar="DIR", help="checkpoint (default: %(default)s)"
    )
    parser.add_argument(
        "--host",
        default="127.0.0.1",
        help="address to listen on; 0.0.0.0 for the whole network (default: %(default)s)",
    )
    parser.add_argument("--port", type=positive_int, metavar="N", help="default: the first free port from 7860")
    parser.add_argument("--device", type=device, help="cpu, cuda, cuda:1 ... (default: a GPU if available)")
    parser.set_defaults(run=_run)


def _run(args: argparse.Namespace) -> None:
    expect_model(args.model, "--model")
    from lion_fast.demo.addresses import find_address
    from lion_fast.extras import require

    address, port = find_address(args.host, args.port)  # before what takes long to load
    with importing():
        require("demo", "gradio", "matplotlib")
        from lion_fast.demo.answering import Answerer
        from lion_fast.demo.server import serving
        from lion_fast.inference.loading import default_device

    with _ending_on_signals():
        answerer = Answerer.from_pretrained(args.model, args.device or default_device())
        with serving(answerer, str(args.model), host=address, port=port) as url:
            print(f"The page is at {url} (Ctrl-C ends it)", flush=True)
            if not ipaddress.ip_address(address).is_loopback:
                print("Everyone who can reach this machine can use it.", flush=True)
            _wait()


@contextmanager
def _ending_on_signals() -> Iterator[None]:
    """Let signals end the process in order, so that the uploads are removed, and within `_PATIENCE` seconds."""
    came: list[int] = []

    def end(number: int, frame: Any) -> None:
        came.append(number)
        for other in before:
            signal.signal(other, signal.SIG_IGN)  # a second signal must not interrupt the removal
        watchdog = threading.Timer(_PATIENCE, _leave, [number])  # whatever has caught the exception below
        watchdog.daemon = True
        watchdog.start()
        raise KeyboardInterrupt if number == signal.SIGINT else SystemExit(128 + number)

    # A signal that is ignored, as SIGHUP is after nohup, stays so.
    ends = [number for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP) if _is_heard(number)]
    before = {number: signal.signal(number, end) for number in ends}
    try:
        yield
    finally:
        if came:
            _leave(came[0])  # a thread may still run the model, and Python would wait for it
        for number, handler in before.items():
            signal.signal(number, handler)


def _is_heard(number: int) -> bool:
    return signal.getsignal(number) != signal.SIG_IGN


def _leave(number: int) -> None:
    from lion_fast.demo.server import remove_uploads

    remove_uploads()
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError):  # nobody reads it any more
            stream.flush()
    os._exit(128 + number)


def _wait() -> None:
    threading.Event().wait()
