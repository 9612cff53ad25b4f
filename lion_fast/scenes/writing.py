"""Writing scenes as images and a file of JSON lines, in the format of real training data."""

import os
from collections.abc import Iterable, Iterator
from pathlib import Path

from lion_fast.data.records import Record, write_jsonl
from lion_fast.scenes.scene import SceneGenerator


def write_scenes(
    out: str | os.PathLike, count: int, seed: int, *, image_size: int = 96, kinds: Iterable[str] | None = None
) -> Path:
    """Write scenes with all their samples and true tags.

    Args:
        out: output directory, created if missing, for `images/000000.png` and so on, and `scenes.jsonl`.
        count: number of scenes; a scene gives about 12 samples.
        seed, image_size: see `SceneGenerator`. Use another seed for an evaluation set.
        kinds: kinds of samples to write, from `caption`, `vqa`, `rec` and `reg`; all if None.

    Returns:
        Path of the file of JSON lines.

    Raises:
        ValueError: `count` is below 1, a kind is unknown, or `SceneGenerator` rejects an argument.
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
    (out / "images").mkdir(parents=True, exist_ok=True)

    def records() -> Iterator[Record]:
        for index in range(count):
            scene = generator[index]
            image = f"images/{index:06d}.png"
            scene.image.save(out / image)
            for number, sample in enumerate(scene.samples()):
                if sample.kind in chosen:
                    yield Record(
                        image=image,
                        task=sample.task,
                        question=sample.text,
                        answer=sample.answer,
                        tags=scene.tags,
                        boxes=() if sample.box is None else (sample.box,),
                        id=f"{index}-{sample.kind}-{number}",
                        source="scenes",
                    )

    path = out / "scenes.jsonl"
    write_jsonl(records(), path)
    return path
