"""Small files of training data."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

WriteLines = Callable[..., Path]


@pytest.fixture
def write_lines(tmp_path: Path) -> WriteLines:
    """Write lines to `train.jsonl`: dicts as changes to a valid record in JSON, text and bytes unchanged."""

    def write(*lines: dict[str, Any] | str | bytes, name: str = "train.jsonl") -> Path:
        valid = {"image": "a.png", "task": "image_level", "question": "What?", "answer": "a cat"}
        content = b""
        for line in lines:
            if isinstance(line, dict):
                line = json.dumps(valid | line)
            content += (line.encode() if isinstance(line, str) else line) + b"\n"
        path = tmp_path / name
        path.write_bytes(content)
        return path

    return write


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """Directory with `a.png` to `e.png` of different colours, and a truncated JPEG, `cut.jpg`."""
    rng = np.random.default_rng(0)
    for name, color in zip("abcde", ("red", "green", "blue", "white", "black"), strict=True):
        Image.new("RGB", (20, 10), color).save(tmp_path / f"{name}.png")
    noise = Image.fromarray(rng.integers(0, 256, (64, 64, 3), dtype=np.uint8))
    noise.save(tmp_path / "whole.jpg")
    content = (tmp_path / "whole.jpg").read_bytes()
    (tmp_path / "cut.jpg").write_bytes(content[: len(content) // 2])
    return tmp_path
