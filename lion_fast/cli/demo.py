"""`lion-fast demo`: serve a web page to try a model."""

import argparse
import threading

from lion_fast.cli.arguments import device, expect_model, path, positive_int
from lion_fast.cli.ask import DEFAULT_MODEL

_LOOPBACK = ("127.0.0.1", "localhost", "::1")


def add_parsers(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    parser = commands.add_parser(
        "demo",
        help="serve a web page to upload an image, ask about it, and inspect the answer",
        description="Serve a web page that captions, answers and locates, and shows which visual tokens and adapters "
        "were used. Only this machine can open it unless --host says otherwise. It loads nothing from the internet.",
    )
    parser.add_argument(
        "--model", type=path, default=DEFAULT_MODEL, metavar="DIR", help="checkpoint (default: %(default)s)"
    )
    parser.add_argument(
        "--host",
        default=_LOOPBACK[0],
        help="address to listen on; 0.0.0.0 for the whole network (default: %(default)s)",
    )
    parser.add_argument("--port", type=positive_int, metavar="N", help="default: the first free port from 7860")
    parser.add_argument("--device", type=device, help="cpu, cuda, cuda:1 ... (default: a GPU if available)")
    parser.set_defaults(run=_run)


def _run(args: argparse.Namespace) -> None:
    expect_model(args.model, "--model")
    from lion_fast.demo.answering import Answerer
    from lion_fast.extras import require
    from lion_fast.inference.loading import default_device

    require("demo", "gradio", "matplotlib")
    from lion_fast.demo.server import serving

    answerer = Answerer.from_pretrained(args.model, args.device or default_device())
    with serving(answerer, str(args.model), host=args.host, port=args.port) as address:
        print(f"The page is at {address} (Ctrl-C ends it)", flush=True)
        if args.host not in _LOOPBACK:
            print("Everyone who can reach this machine can use it.", flush=True)
        _wait()


def _wait() -> None:
    threading.Event().wait()
