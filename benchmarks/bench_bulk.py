"""Captions per second: a plain loop over `generate`, one image at a time, and a bulk job over the same images.

`pytest benchmarks/bench_bulk.py` runs both on the quickstart's checkpoint, or on the directory in
`LION_BENCH_CHECKPOINT`. The results are in `extra_info`: images per second without the time to load the model, and CPU
milliseconds per image, for a machine with other load. A job's figures include its workers and the loading. The job's
rows are first compared with the loop's; wrong rows get no rate.
"""

import os
import time
from itertools import count
from pathlib import Path

import pytest
import torch

from benchmarks.harness.side_by_side import clock, replay
from lion_fast import LionForCausalLM, LionProcessor
from lion_fast.inference.bulk import BulkJob, run
from lion_fast.inference.bulk.outputs import read_rows
from lion_fast.inference.loading import compute_dtype, default_device
from lion_fast.model.prompts import CAPTION_INSTRUCTION
from lion_fast.scenes import SceneGenerator

NUM_IMAGES = int(os.environ.get("LION_BENCH_IMAGES", "256"))
CHECKPOINT = Path(os.environ.get("LION_BENCH_CHECKPOINT", "runs/quickstart/checkpoint"))


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if not CHECKPOINT.is_dir():
        pytest.skip(f"no checkpoint at {CHECKPOINT}; make quickstart, or set LION_BENCH_CHECKPOINT")
    folder = tmp_path_factory.mktemp("pictures")
    scenes = SceneGenerator(seed=7, image_size=96)
    for number in range(NUM_IMAGES):
        scenes[number].image.save(folder / f"{number:05d}.png")
    return folder


@pytest.fixture(scope="module")
def looped(pictures: Path) -> tuple[list[str], float, float]:
    """Return captions computed one by one, and their seconds and CPU seconds."""
    device = default_device()
    model = LionForCausalLM.from_pretrained(CHECKPOINT, dtype=compute_dtype(device)).eval().to(device)
    processor = LionProcessor.from_pretrained(CHECKPOINT)

    def caption(path: Path) -> str:
        batch = processor(images=path, text=CAPTION_INSTRUCTION).to(device)
        return processor.batch_decode(model.generate(**batch), skip_special_tokens=True)[0].strip()

    files = sorted(pictures.iterdir())
    caption(files[0])  # warm-up
    seconds, cpu = time.perf_counter(), time.process_time()
    captions = [caption(path) for path in files]
    return captions, time.perf_counter() - seconds, time.process_time() - cpu


@pytest.mark.benchmark(timer=clock)
def bench_loop(benchmark, looped: tuple[list[str], float, float]) -> None:
    _, seconds, cpu = looped
    replay(benchmark, [seconds])
    report(benchmark, seconds, cpu)


@pytest.mark.parametrize("num_workers", [0, 1])
@pytest.mark.parametrize("batch_size", [8, 32])
def bench_job(
    benchmark, pictures: Path, looped: tuple[list[str], float, float], tmp_path: Path, batch_size: int, num_workers: int
) -> None:
    numbers = count()

    def job() -> tuple[float, Path]:
        out = tmp_path / f"{next(numbers)}.jsonl"
        settings = BulkJob("caption", str(pictures), str(out), str(CHECKPOINT))
        return run(settings, batch_size=batch_size, num_workers=num_workers).seconds, out

    before = os.times()
    seconds, out = benchmark.pedantic(job)
    after = os.times()
    got = [row["caption"] for row in read_rows(out)]
    if compute_dtype(default_device()) is torch.float32:
        assert got == looped[0], "other rows than single calls give, so no rate"
    report(benchmark, seconds, sum(after[:2]) + sum(after[2:4]) - sum(before[:4]))


def report(benchmark, seconds: float, cpu: float) -> None:
    benchmark.group = f"captions of {NUM_IMAGES} scenes, {torch.get_num_threads()} threads, {os.cpu_count()} cores"
    benchmark.extra_info["images per second"] = round(NUM_IMAGES / seconds, 1)
    benchmark.extra_info["CPU milliseconds per image"] = round(1000 * cpu / NUM_IMAGES, 1)
