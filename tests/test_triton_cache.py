"""The portable Triton cache: a cache made in one process works in another, in another folder."""

import json
import os
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

from benchmarks import bench_model
from lion_fast.check.model_launches import BENCHMARKED, Lengths

SCRIPT = Path(__file__).resolve().parents[1] / "benchmarks" / "triton_cache.py"
pytest.importorskip("triton.backends.nvidia.compiler", reason="no Triton that compiles for NVIDIA's GPUs")
if shutil.which(os.environ.get("CC", "cc")) is None:
    pytest.skip("no C compiler, which Triton's launchers need", allow_module_level=True)


def run(*arguments: object) -> subprocess.CompletedProcess:
    command = [sys.executable, str(SCRIPT), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=600)


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("made") / "cache.tar.xz"
    done = run("make", file, "--operators", "gated_gelu", "--dtypes", "float16", "--no-model", "--processes", "1")
    assert done.returncode == 0, done.stderr
    return file


def test_every_launch_is_found_in_another_folder(cache: Path) -> None:
    done = run("verify", cache, "--processes", "1")
    assert "8 kernels loaded, 0 of them compiled" in done.stdout, done.stdout + done.stderr


def test_the_cache_of_another_triton_is_refused(cache: Path, tmp_path: Path) -> None:
    unpacked = tmp_path / "unpacked"
    done = run("unpack", cache, unpacked)
    assert done.returncode == 0, done.stderr
    groups = list(unpacked.glob("*/__grp__*"))
    assert groups
    for group in groups:
        paths = json.loads(group.read_text(encoding="utf-8"))["child_paths"].values()
        assert all(Path(path).is_file() and Path(path).parent == group.parent.resolve() for path in paths)
    manifest = unpacked / "lion_fast.json"
    manifest.write_text(json.dumps({**json.loads(manifest.read_text(encoding="utf-8")), "fingerprint": "0"}))
    with tarfile.open(tmp_path / "other.tar.xz", "w:xz") as archive:
        archive.add(manifest, manifest.name)
    done = run("unpack", tmp_path / "other.tar.xz", tmp_path / "again")
    assert done.returncode == 2
    assert "made for 0, and here is" in done.stderr
    assert not (tmp_path / "again").exists()


def test_the_launches_of_the_model_match_the_benchmark() -> None:
    """They have the same lengths, and no sample is padded."""
    batch = bench_model.make_batch()
    assert {name for name in batch if "mask" in name} == set()
    lengths = Lengths(*(batch[name].shape[1] for name in ("input_ids", "qformer_input_ids", "labels")), padded=False)
    assert lengths == BENCHMARKED
