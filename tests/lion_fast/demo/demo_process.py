"""A process that serves the page of a model that takes a minute for an answer, or to load."""

import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from lion_fast.cli import main
from lion_fast.demo import answering


def run(model: str, folder: str, port: int, loading: bool) -> None:
    def take_a_minute(*_: Any, **__: Any) -> None:
        Path(folder, "busy").touch()
        time.sleep(60)

    tempfile.tempdir = folder
    if loading:
        answering.LionPipeline = take_a_minute  # type: ignore[assignment, misc]
    answering.generate_texts = take_a_minute  # type: ignore[assignment]
    sys.exit(main(["demo", "--model", model, "--port", str(port), "--device", "cpu"]))


if __name__ == "__main__":
    run(**globals()["ARGUMENTS"])
