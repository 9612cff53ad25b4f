"""Tagging: `RamTagger` and its arguments, `lion-fast tag` and `lion-fast data tag`, on directories of any kind."""

import contextlib
import functools
import io
import json
import random
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers.utils import logging

from lion_fast.cli import main
from lion_fast.tagging.modeling_ram import RamTagger
from tests.campaign import images
from tests.campaign.mutating import VALUES, mutate_bytes, mutate_json
from tests.campaign.running import Trial
from tests.lion_fast.tiny import make_tagger

logging.set_verbosity_error()
logging.disable_progress_bar()

TAGS = ["red", "sign", "star"]
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
FILES = ("config.json", "tag_list.txt", "tag_thresholds.txt")
ODD: list[Any] = [
    *(value for value in VALUES if not str(value).startswith("\x1araw")),
    *(float("nan"), float("inf"), -0.1, 1.1, b"a", set(), range(3), object(), print, ("a", "b", "c"), [0.5] * 3),
    *(
        ["a"] * 3,
        ["a", "a\nb", ""],
        [0.1, "0.1", 0.1],
        [True] * 3,
        [float("nan")] * 3,
        "abc",
        np.ones(3),
        np.ones((3, 1)),
    ),
    *(torch.ones(3) / 2, torch.ones(3, device="meta"), np.array(["a", "b", "c"]), [0, 1, 1.0], [2] * 3, iter("abc")),
]


def make(rng: random.Random, folder: Path) -> Trial:
    kinds: list[Callable[[random.Random, Path], Trial]] = [settings, call, pictures, directory, commands]
    return rng.choice([*kinds, directory])(rng, folder)


@functools.cache
def tagger() -> RamTagger:
    return make_tagger(TAGS, [0.2, 0.5, 0.5])


@functools.cache
def saved() -> dict[torch.dtype, dict[str, bytes]]:
    """Return the files of the same tagger saved in each dtype, with values that all of them hold."""
    found = {}
    small: Any = make_tagger(TAGS, [0.45, 0.5, 0.55])
    small.to(torch.float16).to(torch.bfloat16)  # the fewest bits of mantissa and of exponent
    for dtype in DTYPES:
        with tempfile.TemporaryDirectory() as name:
            small.to(dtype).save_pretrained(name)
            found[dtype] = {path.name: path.read_bytes() for path in Path(name).iterdir()}
    return found


def settings(rng: random.Random, folder: Path) -> Trial:
    """Tags and thresholds of a new tagger, which it has to refuse or to use."""
    name, value = rng.choice(["tags", "tag_thresholds"]), rng.choice(ODD)
    given: dict[str, Any] = {"tags": TAGS, "tag_thresholds": [0.2, 0.5, 0.5], name: value}

    def make_and_use() -> list[str]:
        return RamTagger(tagger().config, **given)(Image.new("RGB", (9, 7)))

    return Trial(f"{name}={value!r:.100}", make_and_use, [name], _expect_strings)


def call(rng: random.Random, folder: Path) -> Trial:
    """Arguments of a call."""
    value = rng.choice(ODD)
    if rng.random() < 0.5:
        return Trial(f"images={value!r:.100}", lambda: tagger()(value), ["image"], _expect_strings)
    many = [Image.new("RGB", (9, 7))] * 3
    return Trial(
        f"batch_size={value!r:.100}", lambda: tagger()(many, batch_size=value), ["batch_size"], _expect_strings
    )


def pictures(rng: random.Random, folder: Path) -> Trial:
    """An image of any kind among others: the others have the tags that they have alone."""
    source = folder / "other"
    _, _, content = rng.choice(images._files())
    changes, content = images._mutated(rng, content)
    source.write_bytes(content)
    batch = [Image.new("RGB", (9, 7), (200, 9, 9)), source, np.zeros((4, 4, 3), np.uint8)]
    rng.shuffle(batch)

    def check(found: list[str]) -> None:
        alone = [tagger()(one)[0] for one in batch]
        assert found == alone, f"{found}, alone {alone}"

    size = rng.choice([1, 2, 8])
    return Trial(f"an image with {changes}", lambda: tagger()(batch, batch_size=size), ["images["], check)


def _expect_strings(found: Any) -> None:
    assert isinstance(found, list), type(found)
    assert all(isinstance(tags, str) for tags in found), found


def directory(rng: random.Random, folder: Path) -> Trial:
    """A directory with changed settings, tags, thresholds or weights."""
    files = dict(saved()[rng.choice(DTYPES)])
    name = rng.choice([*FILES, *FILES, "model.safetensors"])
    if name == "config.json" and rng.random() < 0.8:
        files[name] = mutate_json(json.loads(files[name]), rng, rng.choice([1, 1, 2])).encode("utf-8", "surrogatepass")
    elif name in FILES[1:] and rng.random() < 0.5:
        line = rng.choice(
            ["", " ", "nan", "-1", "1e-400", "2", "0x1", "1_0", "\ufeff", "\u0664", "a, b", "x" * 10**5, "\0", "\x85"]
        )
        lines = files[name].decode().splitlines()
        lines[rng.randrange(3)] = line
        files[name] = "\n".join(lines).encode()
    else:
        files[name] = mutate_bytes(files[name], rng)
    where = folder / "ram"
    write(files, where)
    if rng.random() < 0.1:
        path = where / name
        path.unlink()
        rng.choice([path.mkdir, lambda: path.symlink_to("/dev/zero"), lambda: path.symlink_to(path), lambda: None])()
    description = f"{name}: {files[name][:300]!r}"

    def load_and_use() -> list[str]:
        loaded = RamTagger.from_pretrained(where, dtype=torch.float32)
        return loaded(Image.new("RGB", (9, 7)))

    return Trial(description, load_and_use, [str(where)], _expect_strings)


def write(files: dict[str, bytes], folder: Path) -> None:
    folder.mkdir()
    for name, content in files.items():
        (folder / name).write_bytes(content)


def commands(rng: random.Random, folder: Path) -> Trial:
    """The three ways to tag agree, whatever the dtype of the weights, and refuse what they cannot use."""
    names = [f"{number}.png" for number in range(3)]
    for name in names:
        Image.fromarray(np.random.default_rng(rng.randrange(99)).integers(0, 256, (9, 7, 3), np.uint8)).save(
            folder / name
        )
    write(saved()[rng.choice(DTYPES)], folder / "ram")
    bad = rng.choice(["", "", "", "image", "ram", "no ram", "option", "out"])
    if bad == "image":
        (folder / names[0]).write_bytes(rng.choice([b"", b"GIF89a", b"x" * 99]))
    elif bad == "ram":
        name = rng.choice([*FILES, "model.safetensors"])
        (folder / "ram" / name).write_bytes(rng.choice([b"", b"{}", b"\0" * 9, b"\xff\xfe"]))
    elif bad == "no ram":
        shutil.rmtree(folder / "ram")
    options = ["--ram", str(folder / "ram"), "--device", "cpu"]
    if bad == "option":
        options += rng.choice([["--device", "gpu"], ["--batch-size", "0"], ["--batch-size", "x"], ["--device", ""]])
    lines = [{"image": name, "task": "image_level", "question": "What is it?", "answer": "a dog"} for name in names]
    (folder / "data.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    if bad == "out":
        (folder / "tagged.jsonl").mkdir()

    def run() -> list[Any]:
        first = _run("tag", str(folder / names[0]), *[one for one in options if one not in ("--batch-size", "0", "x")])
        bulk = _run("tag", str(folder / "data.jsonl"), *options, "--out", str(folder / "rows.jsonl"), "--workers", "0")
        data = _run("data", "tag", str(folder / "data.jsonl"), *options, "--out", str(folder / "tagged.jsonl"))
        return [first, bulk, data]

    def check(done: list[Any]) -> None:
        for status, _, err in done:
            assert status in (0, 2), f"status {status}: {err[-300:]}"
            assert "Traceback" not in err, err[-300:]
            if status == 2:
                told = err.strip().splitlines()[-1]
                assert len(told) < 1000, told[:300]
        if bad:
            return
        assert [status for status, _, _ in done] == [0, 0, 0], done
        rows = {row["image"]: row["tags"] for row in _lines(folder / "rows.jsonl")}
        tagged = {row["image"]: row.get("tags", []) for row in _lines(folder / "tagged.jsonl")}
        assert rows == tagged, f"{rows}, not {tagged}"
        assert done[0][1].strip() == ", ".join(rows[names[0]]), f"{done[0][1]}, not {rows[names[0]]}"

    return Trial(f"commands with a bad {bad or 'nothing'}, {options[4:]}", run, (), check, refusals=())


def _lines(path: Path) -> list[Any]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def _run(*arguments: str) -> tuple[Any, str, str]:
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            status: Any = main(arguments)
        except SystemExit as end:
            status = end.code
    return status, out.getvalue(), err.getvalue()
