"""A process that reads large images in one of the ways in which a job does, and reports the memory that this takes."""

from collections.abc import Callable
from functools import partial
from pathlib import Path

from PIL import Image

from lion_fast.data import JsonlDataset, TrainingOrder, add_tags, make_loader, tagging
from lion_fast.inference.bulk import BulkJob, run
from lion_fast.inference.bulk.preparing import reduce_for_tagger
from tests.lion_fast.tiny import make_tagger

BATCH = 6
TAGGED_PIXELS = 4 * 3000 * 2500  # in a batch of full-size images


def bulk(folder: Path) -> None:
    make_tagger(["dog"], [0.5]).save_pretrained(folder / "ram")
    job = BulkJob("tag", str(folder / "images.tar"), out=str(folder / "tags.jsonl"), model=str(folder / "ram"))
    summary = run(job, batch_size=BATCH, num_workers=0)
    assert (summary.rows, summary.errors) == (2 * BATCH, 0), summary


def training(folder: Path) -> None:
    samples = JsonlDataset(folder / "data.jsonl")
    order = TrainingOrder({"a": samples}, steps=2, batch_size=BATCH)
    loader = make_loader(order, lambda batch: len(batch), num_workers=0, reduce=partial(reduce_for_tagger, 32))
    assert list(loader) == [BATCH, BATCH]


def tag(folder: Path) -> None:
    tagging.MAX_PIXELS = TAGGED_PIXELS
    tagger = make_tagger(["dog"], [0.5])
    assert add_tags(JsonlDataset(folder / "data.jsonl"), folder / "tagged.jsonl", tagger) == (2 * BATCH, 0)


def peak(read: Callable[[Path], None], folder: Path) -> int:
    """Return the bytes that a function takes at most, without workers: what it reads here, each of them would."""
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # the peak is now the present use
    before = _status("VmHWM")
    read(folder)
    return _status("VmHWM") - before << 10


def _status(name: str) -> int:
    return int(Path("/proc/self/status").read_text(encoding="ascii").split(f"{name}:")[1].split()[0])


def main(way: str, folder: str) -> None:
    make_tagger(["dog"], [0.5])(Image.new("RGB", (8, 8)))  # what the libraries allocate once does not count
    taken = peak({"bulk": bulk, "training": training, "tag": tag}[way], Path(folder))
    Path(folder, f"{way}.txt").write_text(str(taken), encoding="ascii")


if __name__ == "__main__":
    main(**globals()["ARGUMENTS"])
