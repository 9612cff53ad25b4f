"""Images per second from files to a batch's pixels: a plain loop in one process, and loaders with workers.

`pytest benchmarks/bench_data.py` prints the table and, with `--benchmark-json`, images per second as `extra_info`.
Images are JPEGs of COCO's usual size, 640 x 480, with noise coarse enough to match COCO's usual file size; each becomes
224 x 224 normalised pixels. Nothing consumes the batches, so a loader's rate is an upper limit.
"""

import os
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import BlipImageProcessorPil

from lion_fast.data import (
    JsonlDataset,
    ProcessBatches,
    RandomCrop,
    RandomHorizontalFlip,
    Record,
    ShardDataset,
    TrainingData,
    TrainingOrder,
    make_loader,
    write_jsonl,
    write_shards,
)

NUM_IMAGES = int(os.environ.get("LION_BENCH_IMAGES", "256"))
BATCH_SIZE = 16
WORKERS = sorted({1, 2, os.cpu_count() or 1})


@pytest.fixture(scope="module")
def jsonl(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("pictures")
    rng = np.random.default_rng(0)
    for number in range(NUM_IMAGES):
        coarse = Image.fromarray(rng.integers(0, 256, (60, 80, 3), dtype=np.uint8))
        fine = rng.normal(0, 12, (480, 640, 3))
        pixels = np.asarray(coarse.resize((640, 480), Image.Resampling.BICUBIC)) + fine
        Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(out / f"{number}.jpg", quality=90)
    box = "[0.300,0.300,0.700,0.700]"
    write_jsonl(
        (
            Record(f"{n}.jpg", "region_level", "Where is " + "the " * int(rng.integers(1, 20)) + "dog?", box,
                   boxes=((0.3, 0.3, 0.7, 0.7),))
            for n in range(NUM_IMAGES)
        ),
        out / "train.jsonl",
    )  # fmt: skip
    return out / "train.jsonl"


class ToPixels:
    """A collator's image processing alone."""

    def __init__(self) -> None:
        self.image_processor = BlipImageProcessorPil(size={"height": 224, "width": 224})

    def __call__(self, samples: list) -> torch.Tensor:
        return self.image_processor([sample["image"] for sample in samples], return_tensors="pt")["pixel_values"]


def epoch(batches) -> None:
    count = 0
    for pixels in batches:
        count += len(pixels)
        assert pixels.shape[1:] == (3, 224, 224)
    assert count == NUM_IMAGES // BATCH_SIZE * BATCH_SIZE


@pytest.mark.parametrize("storage", ["files", "shards"])
@pytest.mark.parametrize("num_workers", [None, *WORKERS], ids=lambda n: "loop" if n is None else f"workers={n}")
def bench(benchmark, jsonl: Path, storage: str, num_workers: int | None) -> None:
    transforms = [RandomHorizontalFlip(), RandomCrop()]
    if storage == "files":
        dataset = JsonlDataset(jsonl, transforms=transforms)
    else:
        shards = jsonl.parent / "shards"
        if not shards.exists():
            write_shards(JsonlDataset(jsonl), shards, shard_bytes=8 << 20)
        dataset = ShardDataset(shards, transforms=transforms)
    order = TrainingOrder(
        {"a": dataset}, steps=NUM_IMAGES // BATCH_SIZE, batch_size=BATCH_SIZE, group_by_length=True
    )  # fmt: skip
    to_pixels = ToPixels()
    if num_workers is None:
        data = TrainingData(order.samples, order.seed)
        run = lambda: epoch(to_pixels([data[key] for key in batch]) for batch in ProcessBatches(order, BATCH_SIZE))  # noqa: E731
    else:
        loader = make_loader(order, to_pixels, num_workers=num_workers)
        run = lambda: epoch(loader)  # noqa: E731
    run()  # warms the disk cache
    benchmark.group = f"{NUM_IMAGES} JPEGs of 640 x 480, batches of {BATCH_SIZE}, {os.cpu_count()} cores"
    benchmark.pedantic(run, rounds=3)
    benchmark.extra_info["images per second"] = round(NUM_IMAGES / benchmark.stats.stats.min, 1)
    size = Path(jsonl.parent / "0.jpg").stat().st_size
    benchmark.extra_info["bytes of a picture"] = size


def bench_index(benchmark, tmp_path: Path) -> None:
    """Read and check a file of lines, as at every start of training."""
    record = Record(
        "a.jpg", "image_level", "What color is the dog on the grass?", "brown", tags=("dog", "grass", "park")
    )
    write_jsonl((record for _ in range(20_000)), tmp_path / "train.jsonl")
    start = time.perf_counter()
    assert len(JsonlDataset(tmp_path / "train.jsonl")) == 20_000
    benchmark.extra_info["lines per second"] = round(20_000 / (time.perf_counter() - start))
    benchmark.pedantic(lambda: JsonlDataset(tmp_path / "train.jsonl"), rounds=3)
