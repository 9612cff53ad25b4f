"""Writing scenes as images and a file of JSON lines, in the format of real training data."""

import io
import os
from collections.abc import Iterable, Iterator, Set
from pathlib import Path

from lion_fast.data.records import Record, write_jsonl
from lion_fast.io.owning import OutputExistsError, made_directories
from lion_fast.io.reading import naming_path, read_content
from lion_fast.scenes.scene import Scene, SceneGenerator


def write_scenes(
    out: str | os.PathLike,
    count: int,
    seed: int,
    *,
    image_size: int = 96,
    kinds: Iterable[str] | None = None,
    overwrite: bool = False,
) -> Path:
    """Write scenes with all their samples and true tags.

    Args:
        out: output directory, created if missing, for `images/000000.png` and so on, and `scenes.jsonl`.
        count: number of scenes; a scene gives about 12 samples.
        seed, image_size: see `SceneGenerator`. Use another seed for an evaluation set.
        kinds: kinds of samples to write, from `caption`, `vqa`, `rec` and `reg`; all if None.
        overwrite: whether files of these names are replaced that are not the same scenes.

    Returns:
        Path of the file of JSON lines.

    Raises:
        ValueError: `count` is below 1, a kind is unknown, or `SceneGenerator` rejects an argument.
        OutputExistsError: a file of these names exists and is another, without `overwrite`; nothing is written.
        OutputInUseError: another process is writing the same scenes.
        OSError: a file cannot be written.
    """
    if count < 1:
        raise ValueError(f"count: expected 1 or more, got {count}")
    known = ("caption", "vqa", "rec", "reg")
    chosen = set(known if kinds is None else kinds)
    if not chosen or chosen - set(known):
        raise ValueError(f"kinds: expected some of {', '.join(known)}, got {', '.join(sorted(chosen)) or 'none'}")
    generator = SceneGenerator(seed, image_size)
    out = Path(out)
    path = out / "scenes.jsonl"

    def records() -> Iterator[Record]:
        if not overwrite:
            _expect_same(path, generator, count, chosen)
        for index in range(count):
            image = out / _name(index)
            with naming_path(image):
                image.write_bytes(_content(generator[index]))
            yield from _records(generator[index], index, chosen)

    with made_directories(out / "images"):
        write_jsonl(records(), path)
    return path


def _name(index: int) -> str:
    return f"images/{index:06d}.png"


def _content(scene: Scene) -> bytes:
    content = io.BytesIO()
    scene.image.save(content, "PNG")
    return content.getvalue()


def _records(scene: Scene, index: int, kinds: Set[str]) -> Iterator[Record]:
    for number, sample in enumerate(scene.samples()):
        if sample.kind in kinds:
            yield Record(
                image=_name(index),
                task=sample.task,
                question=sample.text,
                answer=sample.answer,
                tags=scene.tags,
                boxes=() if sample.box is None else (sample.box,),
                id=f"{index}-{sample.kind}-{number}",
                source="scenes",
            )


def _expect_same(path: Path, generator: SceneGenerator, count: int, kinds: Set[str]) -> None:
    """Check that the files that exist are those that would be written.

    Raises:
        OutputExistsError: one is not.
    """
    expected: list[bytes] = []
    for index in range(count if (path.parent / "images").is_dir() or path.exists() else 0):
        image = path.parent / _name(index)
        # A part of the image is what a killed run left.
        if image.exists() and (image.is_dir() or not _content(generator[index]).startswith(read_content(image))):
            raise OutputExistsError(f"out: expected no other scenes in {path.parent}, got {image} (see --overwrite)")
        if path.exists():
            expected += [f"{record.to_json()}\n".encode() for record in _records(generator[index], index, kinds)]
    if path.exists() and path.stat().st_size and read_content(path) != b"".join(expected):
        raise OutputExistsError(f"out: expected no other scenes in {path.parent}, got {path} (see --overwrite)")
