"""Reading untrusted checkpoint files lazily and completely, without running code in them."""

import contextlib
import json
import os
import pickle
import random
import re
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from lion_fast.io.checkpoints import SAFE_INDEX, CheckpointError, naming_output, open_tensors, scan, write_sharded
from tests.lion_fast.processes import run_python

MIB = 1024**2


@pytest.fixture
def state() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    return {"a": torch.randn(3, 4), "b": torch.randn(5).half(), "c": torch.arange(6)}


def save_shards(state: dict[str, torch.Tensor], files: dict[str, str], directory: Path) -> None:
    """Save each tensor in its file of `files`, with the index."""
    directory.mkdir(exist_ok=True)
    for file in set(files.values()):
        save_file({name: state[name] for name in state if files[name] == file}, directory / file)
    (directory / SAFE_INDEX).write_text(json.dumps({"weight_map": files}))


def read(path: Path) -> dict[str, torch.Tensor]:
    """Read all tensors that `scan` finds at `path`."""
    values = {}
    for name, info in scan(path).items():
        with open_tensors(info.file) as tensors:
            values[name] = tensors[info.name].clone()
    return values


FORMATS: dict[str, Callable[[dict[str, torch.Tensor], Path], Any]] = {
    "bare.pth": torch.save,
    "model.pth": lambda state, path: torch.save({"model": state}, path),
    "training.pth": lambda state, path: torch.save({"model": state, "optimizer": {0: {"step": 3}}, "epoch": 2}, path),
    "legacy.pth": lambda state, path: torch.save(state, path, _use_new_zipfile_serialization=False),
    "file.safetensors": save_file,
    "pytorch_model.bin": torch.save,
    "sharded": lambda state, path: save_shards(
        state, {"a": "1.safetensors", **dict.fromkeys("bc", "2.safetensors")}, path
    ),
}


@pytest.mark.parametrize("name", FORMATS)
def test_every_format_reads_the_same(tmp_path: Path, state: dict[str, torch.Tensor], name: str) -> None:
    FORMATS[name](state, tmp_path / name)
    path = tmp_path if name == "pytorch_model.bin" else tmp_path / name
    infos = scan(path)
    assert {name: (info.shape, info.dtype) for name, info in infos.items()} == {
        name: (tuple(value.shape), value.dtype) for name, value in state.items()
    }
    values = read(path)
    assert all(torch.equal(values[name], value) for name, value in state.items())


class Payload:
    """Creates a directory when it is unpickled."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("writer", ["torch", "pickle"])
def test_code_in_a_file_is_refused_and_not_run(tmp_path: Path, writer: str) -> None:
    file, made = tmp_path / "hostile.pth", tmp_path / "made"
    hostile = {"model": {"a": torch.zeros(2), "b": Payload(made)}}
    message = r"hostile\.pth: (refused|not a readable)"
    if writer == "torch":
        torch.save(hostile, file)
        message += r".* could run code \(GLOBAL \w+\.mkdir\)$"  # what would be called
    else:
        file.write_bytes(pickle.dumps(hostile))
    with pytest.raises(CheckpointError, match=message):
        scan(file)
    assert not made.exists()


class Scale(torch.nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 2 * x


@pytest.mark.parametrize("kind", ["module", "script", "pickle", "damaged"])
def test_a_refusal_does_not_quote_advice_to_load_without_checks(tmp_path: Path, kind: str) -> None:
    file = tmp_path / "other.pth"
    if kind == "script":
        torch.jit.save(torch.jit.script(Scale()), file)
    elif kind == "damaged":
        file.write_bytes(b"\x80\x02\x95\xff.")
    else:
        (torch.save if kind == "module" else lambda made, path: path.write_bytes(pickle.dumps(made)))(Scale(), file)
    with pytest.raises(
        CheckpointError, match=rf"^{file}: (refused|not a readable|expected an archive without)"
    ) as caught:
        scan(file)
    assert not re.search("weights_only|torch.load|trust|\n", str(caught.value))


def test_an_archive_that_was_compressed_again_is_refused(tmp_path: Path, state: dict[str, torch.Tensor]) -> None:
    """Memory-mapped, its compressed bytes would be read as values."""
    torch.save(state, tmp_path / "a.pth")
    with (
        zipfile.ZipFile(tmp_path / "a.pth") as old,
        zipfile.ZipFile(tmp_path / "b.pth", "w", zipfile.ZIP_DEFLATED) as new,
    ):
        for entry in old.infolist():
            new.writestr(entry.filename, old.read(entry))
    with pytest.raises(CheckpointError, match=r"b\.pth: expected an archive without compression"):
        scan(tmp_path / "b.pth")


def test_a_tensor_in_two_shards_is_refused(tmp_path: Path, state: dict[str, torch.Tensor]) -> None:
    save_shards(state, {"a": "1.safetensors", **dict.fromkeys("bc", "2.safetensors")}, tmp_path)
    save_file(state, tmp_path / "2.safetensors")
    with pytest.raises(CheckpointError, match=r"2\.safetensors: expected tensors of its own, got a, which .*1\.safet"):
        scan(tmp_path)


def test_a_variant_is_part_of_the_name(tmp_path: Path, state: dict[str, torch.Tensor]) -> None:
    save_file(state, tmp_path / "model.fp16.safetensors")
    assert scan(tmp_path, variant="fp16").keys() == state.keys()
    with pytest.raises(CheckpointError, match="found neither"):
        scan(tmp_path)


@pytest.mark.parametrize("seed", range(40))
def test_damaged_files_are_named(tmp_path: Path, state: dict[str, torch.Tensor], seed: int) -> None:
    """torch.load raises many types of exceptions on damaged files."""
    file = tmp_path / "damaged.pth"
    torch.save(state, file, _use_new_zipfile_serialization=seed % 2 == 0)
    content = bytearray(file.read_bytes())
    chance = random.Random(seed)
    for _ in range(20):
        content[chance.randrange(len(content) // 2)] = chance.randrange(256)
    file.write_bytes(content)
    with contextlib.suppress(CheckpointError):  # the damage may be undetectable
        scan(file)


@pytest.mark.parametrize("keep", [0, 10, 0.5, 0.99])
@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_truncated_files_are_named(tmp_path: Path, state: dict[str, torch.Tensor], suffix: str, keep: float) -> None:
    file = tmp_path / f"cut{suffix}"
    (torch.save if suffix == ".pth" else save_file)(state, file)
    whole = file.read_bytes()
    file.write_bytes(whole[: int(keep * len(whole)) if keep < 1 else int(keep)])
    with pytest.raises(CheckpointError, match=rf"cut{suffix}: not a readable|cut{suffix}: refused"):
        scan(file)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([1, 2], "expected a state dict"),
        ({"model": [1, 2]}, "expected a state dict"),
        ({"epoch": 3}, "expected a state dict of tensors, found none under the keys .'epoch'"),
        ({"state_dict": {"a": torch.zeros(1)}}, "found none under the keys .'state_dict'"),
        ({0: torch.zeros(1)}, "found none under the keys .0"),
        ({"a": torch.zeros(3).to_sparse()}, "a: expected a plain dense tensor"),
        ({"a": torch.zeros(1).expand(10**12)}, r"a: expected a value for each place of \[1000000000000\], got fewer"),
        ({"a": torch.quantize_per_tensor(torch.zeros(3), 1.0, 0, torch.qint8)}, "a: expected a plain dense tensor"),
    ],
)
def test_unsupported_content_is_named(tmp_path: Path, content: object, message: str) -> None:
    torch.save(content, tmp_path / "other.pth")
    with pytest.raises(CheckpointError, match=message):
        scan(tmp_path / "other.pth")


def test_a_name_twice_in_a_header_is_refused(tmp_path: Path) -> None:
    """The library takes the last of them."""
    entry = b'"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}'
    header = b"{" + entry + b", " + entry + b"}"
    (tmp_path / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + bytes(4))
    with pytest.raises(
        CheckpointError, match=r"model\.safetensors: expected each name once in the header, got 'a' twice"
    ):
        scan(tmp_path)


def test_missing_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no such file"):
        scan(tmp_path / "absent.pth")
    with pytest.raises(CheckpointError, match="found neither"):
        scan(tmp_path)


@pytest.mark.parametrize("shard", ["../secret.safetensors", "absent.safetensors"])
def test_an_index_must_stay_in_its_directory(tmp_path: Path, state: dict[str, torch.Tensor], shard: str) -> None:
    save_file(state, tmp_path / "secret.safetensors")
    directory = tmp_path / "model"
    directory.mkdir()
    (directory / SAFE_INDEX).write_text(json.dumps({"weight_map": {"a": shard}}))
    with pytest.raises(CheckpointError, match="names the shard"):
        scan(directory)


@pytest.mark.parametrize("text", ["{", "[]", '{"weight_map": 3}', '{"weight_map": {"a": 3}}'])
def test_a_broken_index_is_named(tmp_path: Path, text: str) -> None:
    (tmp_path / SAFE_INDEX).write_text(text)
    with pytest.raises(CheckpointError, match="not a readable index"):
        scan(tmp_path)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (
            {"weight_map": {"a": "one.safetensors", "b": "one.safetensors"}},
            "such as b, which the index of shards has in one.safetensors",
        ),
        ({"weight_map": {"a": "one.safetensors"}, "metadata": [1]}, "metadata: expected a JSON object, got list"),
    ],
)
def test_an_index_has_to_fit_its_shards(tmp_path: Path, changed: dict, message: str) -> None:
    save_file({"a": torch.zeros(1)}, tmp_path / "one.safetensors")
    (tmp_path / SAFE_INDEX).write_text(json.dumps(changed))
    with pytest.raises(CheckpointError, match=message):
        scan(tmp_path)


def test_shards_hold_every_tensor_once(tmp_path: Path) -> None:
    # PyTorch files may hold views of one storage, which safetensors rejects.
    base = torch.arange(40.0)
    state = {"whole": base, "part": base[10:20], "strided": base.view(4, 10).t()}
    torch.save(state, tmp_path / "in.pth")
    out = tmp_path / "out"
    out.mkdir()
    files = write_sharded(scan(tmp_path / "in.pth"), out, max_shard_bytes=200)
    assert [file.name for file in files] == ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    index = json.loads((out / SAFE_INDEX).read_text())["weight_map"]
    assert {name: index[name] for name in state}.keys() == state.keys()
    for name, value in state.items():
        assert torch.equal(load_file(out / index[name])[name], value)


@pytest.mark.parametrize("name", ["a.pth", "a.safetensors"])
def test_a_file_that_is_truncated_while_it_is_read_is_named(tmp_path: Path, name: str) -> None:
    """Reading what a mapped file has lost would end the process."""
    state, file = {"w": torch.ones(MIB)}, tmp_path / name
    torch.save(state, file) if name == "a.pth" else save_file(state, file)
    with open_tensors(file) as tensors:
        os.truncate(file, 4096)
        with pytest.raises(OSError, match=rf"^{file}: expected \d+ bytes, as when it was first read, got 4096$"):
            tensors["w"].sum()


def test_errors_of_writing_name_the_output_whatever_their_type(tmp_path: Path) -> None:
    message = r"^out: cannot be written \(No space left on device \(os error 28\)\)$"
    with pytest.raises(OSError, match=message), naming_output(Path("out")):
        raise RuntimeError("No space left on device (os error 28)")  # tokenizers raises bare exceptions
    with pytest.raises(KeyError), naming_output(Path("out")):
        raise KeyError("a bug")


def test_a_full_disk_is_an_os_error(tmp_path: Path) -> None:
    code = """
import resource, signal, sys
from pathlib import Path
from lion_fast.io.checkpoints import scan, write_sharded
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (1024**2, 1024**2))
try:
    write_sharded(scan(sys.argv[1]), Path(sys.argv[2]), max_shard_bytes=32 * 1024**2)
except OSError as error:
    print(error)
"""
    torch.save({"w": torch.zeros(MIB)}, tmp_path / "in.pth")
    printed = run_python("-c", code, tmp_path / "in.pth", tmp_path)
    assert f"{tmp_path / 'model.safetensors'}: cannot be written" in printed


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="only Linux resets the peak of memory")
def test_memory_stays_below_the_largest_file_and_one_shard(tmp_path: Path) -> None:
    """The source has 12 x 16 MiB in one file or three; pages of memory-mapped files do not count."""
    state = {f"w{i}": torch.zeros(4 * MIB) for i in range(12)}
    sources = {tmp_path / "mapped.pth": 12 * 16, tmp_path / "legacy.pth": 12 * 16, tmp_path / "several files": 4 * 16}
    mapped, legacy, several = sources
    torch.save(state, mapped)
    torch.save(state, legacy, _use_new_zipfile_serialization=False)
    save_shards(state, {name: f"model-{number % 3}.safetensors" for number, name in enumerate(state)}, several)
    del state
    code = """
import sys
from dataclasses import replace
from pathlib import Path
import torch
from lion_fast.io.checkpoints import scan, write_sharded

def peak():
    return int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0])

for source in map(Path, sys.argv[1:]):
    Path("/proc/self/clear_refs").write_text("5")  # the peak is now the present use
    before = peak()
    tensors = {name: replace(info, dtype=torch.bfloat16) for name, info in scan(source).items()}
    out = source.with_suffix(".out")
    out.mkdir()
    write_sharded(tensors, out, max_shard_bytes=32 * 1024**2)
    print(peak() - before)
"""
    # With a fixed threshold, glibc returns freed tensors at once; otherwise that depends on the layout of its heap.
    printed = run_python("-c", code, *sources, MALLOC_MMAP_THRESHOLD_=str(MIB))
    for (source, largest), grown in zip(sources.items(), printed.split(), strict=True):
        assert int(grown) * 1024 < (largest + 32 + 8) * MIB, source  # 8 for what the libraries allocate
        assert len(list(source.with_suffix(".out").glob("*.safetensors"))) == 3
