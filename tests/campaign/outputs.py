"""Hostile states of outputs, for every writer: what is not the writer's own has the same bytes afterwards."""

import json
import os
import random
import shutil
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from PIL import Image

from lion_fast.data import Conversion, JsonlDataset, add_tags, write_jsonl, write_shards
from lion_fast.inference.bulk import BulkJob, run, running
from lion_fast.io.atomic import write_json
from lion_fast.io.drawings import expect_drawing, save_drawing
from lion_fast.scenes import write_scenes
from tests.campaign.running import Trial

CONTENTS = [
    b"mine",
    b'{"a": 1}',
    b'{"id": "0.png"}\n{"id": "1',
    b'{"id": "0.png", "image": "0.png", "caption": "x", "error": null}\n',
    b'{"id": "0.png", "image": "0.png", "caption": "x", "error": null}\n{"mine',
    b"\x89PNG\r\n\x1a\n",
    b"PAR1PAR1",
    b"\xff\xfe\x00",
    b"\0" * 40,
    b"[" * 5000,
    b"9" * 5000,
]
NAMES = ["out.jsonl", "out.parquet", "o ut.jsonl", "ö" * 60 + ".jsonl", "x" * 249 + ".jsonl", "[a]*.jsonl", "-.jsonl"]
EXTRAS = [
    "{}.job.json",
    "{}.unfinished",
    ".{}.unfinished",
    ".{}.lock",
    ".{}-mine.unfinished",
    "{}.rank-00001",
    "{}.rank-x",
    "{}.tmp",
]


class _Answers:
    def __init__(self, job: BulkJob, device: Any):
        self.field = job.definition.fields[-1]

    @staticmethod
    def encode(images: list, items: list) -> dict[str, Any]:
        return {"count": len(images)}

    @staticmethod
    def reduce(image: Any) -> Any:
        return image

    def __call__(self, prepared: Any) -> list[dict[str, Any]]:
        for row in prepared.rows:
            row[self.field] = "an answer"
        return prepared.rows


def _bulk(out: Path, overwrite: bool) -> Any:
    running.load_answerer = _Answers  # type: ignore[assignment]
    return run(BulkJob("caption", str(out.parent.parent / "in"), str(out), "."), num_workers=0, overwrite=overwrite)


def _convert(out: Path, overwrite: bool) -> Any:
    conversion = Conversion("gqa", [out.parent.parent / "in" / "gqa.json"])
    return write_jsonl(conversion, out, overwrite=overwrite)


def _tag(out: Path, overwrite: bool) -> Any:
    dataset = JsonlDataset(out.parent.parent / "in" / "train.jsonl")
    return add_tags(dataset, out, lambda images: ["a"] * len(images), overwrite=overwrite)


def _shards(out: Path, overwrite: bool) -> Any:
    return write_shards(JsonlDataset(out.parent.parent / "in" / "train.jsonl"), out)


def _scenes(out: Path, overwrite: bool) -> Any:
    return write_scenes(out, 1, 0, image_size=32, overwrite=overwrite)


def _json(out: Path, overwrite: bool) -> Any:
    return write_json(out, {"a": 1}, overwrite=overwrite)


def _drawing(out: Path, overwrite: bool) -> Any:
    out = out.with_suffix(".png")
    expect_drawing(out, out.parent.parent / "in" / "0.png", overwrite=overwrite)
    return save_drawing(Image.new("RGB", (3, 3)), out)


WRITERS: list[Callable[[Path, bool], Any]] = [_bulk, _bulk, _bulk, _convert, _tag, _shards, _scenes, _json, _drawing]


def make(rng: random.Random, folder: Path) -> Trial:
    source, outputs = folder / "in", folder / "out"
    source.mkdir()
    outputs.mkdir()
    for number in range(2):
        Image.new("RGB", (8, 8), (number, 9, 9)).save(source / f"{number}.png")
    record = {"image": "0.png", "task": "image_level", "question": "What?", "answer": "a"}
    (source / "train.jsonl").write_text(json.dumps(record) + "\n")
    (source / "gqa.json").write_text(json.dumps({"1": {"imageId": "1", "question": "a?", "answer": "b"}}))
    writer, name = rng.choice(WRITERS), rng.choice(NAMES)
    out = outputs / name
    if writer is _drawing:
        name = out.with_suffix(".png").name
        out = outputs / name
    if rng.random() < 0.3:  # an earlier result of the same writer, parts of which are then exchanged
        with suppress(ValueError, OSError):  # names that the writer refuses
            writer(out, False)
    state = rng.choice(["none", "file", "file", "file", "directory", "link", "dangling", "loop", "pipe", "input"])
    extras = [extra.format(name) for extra in EXTRAS if rng.random() < 0.25]
    if out.is_dir():
        extras += [f"{name}/{part}" for part in ("part-00007.parquet", "a.txt", "images") if rng.random() < 0.3]
    elif state != "none":
        out.unlink(missing_ok=True)
    if not os.path.lexists(out):
        _put(rng, out, state, source)
    resumable = writer is _bulk and os.path.exists(outputs / f"{name}.job.json")
    for extra in extras:
        path = outputs / extra
        if len(os.fsencode(path.name)) <= 255 and not os.path.lexists(path):
            path.write_bytes(rng.choice(CONTENTS))
    if rng.random() < 0.1:
        shutil.rmtree(outputs)
        outputs.write_bytes(b"mine")
    before = _contents(folder)

    def check(result: Any) -> None:
        now = _contents(folder)
        for path, content in before.items():
            if resumable and path in (str(out), os.path.realpath(out)) and now.get(path, b"").startswith(content):
                continue  # a job's own row, beside its own record
            if resumable and path == f"{out}.rank-00001" and content == CONTENTS[3]:
                continue  # whole rows of the job's format in the file of one of its processes, beside its own record
            assert now.get(path) == content, f"{path} was {content[:40]!r}, is {now.get(path, b'gone')[:40]!r}"
        left = [path for path in now if path not in before and Path(path).name.startswith(".")]
        assert not left, f"left {left}"

    def call() -> None:
        reader = os.open(out, os.O_RDONLY | os.O_NONBLOCK) if state == "pipe" and out.is_fifo() else None
        try:
            writer(out, False)
        except (ValueError, OSError):
            check(None)  # also what is refused has touched nothing
            raise
        finally:
            if reader is not None:
                os.close(reader)

    return Trial(f"{writer.__name__} {state} {name!r} {extras}", call, [name[:40], "out", "absent/file"], check)


def _put(rng: random.Random, out: Path, state: str, source: Path) -> None:
    if state == "file":
        out.write_bytes(rng.choice(CONTENTS))
    elif state == "directory":
        out.mkdir()
        for name in ("part-00000.parquet", "_rank-00000.jsonl", "images", "scenes.jsonl", "index.npz"):
            if rng.random() < 0.3:
                (out / name).write_bytes(rng.choice(CONTENTS))
    elif state == "link":
        (source / "linked").write_bytes(rng.choice(CONTENTS))
        out.symlink_to(source / "linked")
    elif state == "dangling":
        out.symlink_to(source / "absent" / "file")
    elif state == "loop":
        out.symlink_to(out)
    elif state == "pipe":
        os.mkfifo(out)
    elif state == "input":
        rng.choice([out.hardlink_to, out.symlink_to])(source / rng.choice(["train.jsonl", "gqa.json", "0.png"]))


def _contents(folder: Path) -> dict[str, bytes]:
    """Return everything with content below a folder: empty files hold nothing."""
    found = {}
    for parent, directories, files in os.walk(folder):
        for name in [*directories, *files]:
            path = Path(parent, name)
            if path.is_symlink():
                found[str(path)] = os.fsencode(os.readlink(path))
            elif path.is_file() and path.stat().st_size:
                found[str(path)] = path.read_bytes()
    return found
