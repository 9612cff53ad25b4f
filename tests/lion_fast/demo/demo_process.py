"""A process that serves the page of a model that takes a minute for an answer."""

import sys
import tempfile
import time

from lion_fast.cli import main
from lion_fast.demo import answering


def run(model: str, folder: str, port: int) -> None:
    tempfile.tempdir = folder
    answering.generate_texts = lambda *_, **__: time.sleep(60)  # type: ignore[assignment]
    sys.exit(main(["demo", "--model", model, "--port", str(port), "--device", "cpu"]))


if __name__ == "__main__":
    run(**globals()["ARGUMENTS"])
