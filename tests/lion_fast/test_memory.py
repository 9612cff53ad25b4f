"""The memory of a job over many large images has the bound of one image, however large a batch is."""

import io
import json
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from tests.lion_fast.memory_process import BATCH, TAGGED_PIXELS
from tests.lion_fast.processes import finish, starting

pytestmark = pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="only Linux resets a memory peak")

SIZE = (3000, 2500)
PIXELS = SIZE[0] * SIZE[1]  # 7.5 MB as grey, 30 MB as Pillow's RGB of 4 bytes per pixel
ONE_IMAGE = 8 * PIXELS  # decoded and converted, or turned: what `bytes_needed` says
# The rest: a file's content (7.5 MB), the model's batches of small images, and what the allocator keeps; measured are
# up to 11 MB in all. The images of two batches would take 360 MB, and the content of one batch's files 45 MB.
MARGIN = 20_000_000


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Directory of a tar file of uncompressed images, and a data set of the same size whose files are small."""
    folder = tmp_path_factory.mktemp("large")
    grey, small = io.BytesIO(), io.BytesIO()
    Image.new("L", SIZE, 70).save(grey, "BMP")
    Image.new("1", SIZE).save(small, "PNG")
    with tarfile.open(folder / "images.tar", "w") as tar, (folder / "data.jsonl").open("w") as lines:
        for number in range(2 * BATCH):
            member = tarfile.TarInfo(f"{number}.bmp")
            member.size = len(grey.getvalue())
            tar.addfile(member, io.BytesIO(grey.getvalue()))
            (folder / f"{number}.png").write_bytes(small.getvalue())
            record = {"image": f"{number}.png", "task": "image_level", "question": "What is it?", "answer": "a dog"}
            lines.write(json.dumps(record) + "\n")
    return folder


@pytest.fixture(scope="module")
def begin() -> Iterator[Callable[..., Any]]:
    modules = ["lion_fast.inference.bulk", "lion_fast.data", "lion_fast.tagging.modeling_ram"]
    with starting(Path(__file__).with_name("memory_process.py"), modules) as begin:
        yield begin


@pytest.mark.parametrize(
    ("way", "bound"),
    [
        ("bulk", ONE_IMAGE),
        ("training", ONE_IMAGE),
        # A tagger gets images at their full size, of so many pixels together; the next one is there by then.
        ("tag", 4 * TAGGED_PIXELS + 4 * PIXELS + ONE_IMAGE),
    ],
)
def test_a_job_takes_the_memory_of_one_large_image(
    begin: Callable[..., Any], folder: Path, way: str, bound: int
) -> None:
    finish(begin(way=way, folder=str(folder)))
    taken = int((folder / f"{way}.txt").read_text())
    assert taken < bound + MARGIN, f"{taken >> 20} MiB, expected at most {bound + MARGIN >> 20} MiB"
