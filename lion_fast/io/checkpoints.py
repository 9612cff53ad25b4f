"""Reading untrusted checkpoint files lazily and safely, and writing sharded safetensors.

A source is opened twice: once for names, shapes and dtypes, and once, file by file, for the values, so that at most one
file and one shard are in memory at a time. Files are memory-mapped, except those of torch < 1.6, which are read whole.
The kernel ends a process that reads what a mapped file has lost, so the size is checked before each tensor.
"""

import json
import os
import pickle
import re
import zipfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from lion_fast.io import reading
from lion_fast.io.reading import expect_size

SAFE_INDEX = "model.safetensors.index.json"
TORCH_INDEX = "pytorch_model.bin.index.json"
_SINGLE = ("model.safetensors", "pytorch_model.bin")


class CheckpointError(ValueError):
    """A checkpoint file cannot be read, or its content is not as expected."""


naming = partial(reading.naming, error=CheckpointError, of_kernel=True)
"""Context that turns any exception of a reader into a `CheckpointError` that names the file."""


@dataclass(frozen=True)
class TensorInfo:
    """The file, name, shape and dtype of a tensor; `write_sharded` writes the tensor as `dtype`."""

    file: Path
    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        return torch.Size(self.shape).numel() * self.dtype.itemsize


def scan(path: str | Path, variant: str | None = None) -> dict[str, TensorInfo]:
    """Return names, shapes and dtypes of the tensors in a file or a model directory, without reading their values.

    Args:
        path: a `.safetensors` file, a file written by `torch.save` (a state dict, or a dict with a state dict under
            "model"), or a directory in the format of `save_pretrained`, sharded or not.
        variant: part of a directory's file names, as for `from_pretrained`: `"fp16"` for `model.fp16.safetensors`.

    Raises:
        CheckpointError: the path does not exist, or a file is truncated, has another format or would run code when
            unpickled.
    """
    infos: dict[str, TensorInfo] = {}
    files, indexed = _files(Path(path), variant)
    for file in files:
        found = _scan_file(file)  # a separate function, which frees one file's tensors before the next file
        if twice := sorted(infos.keys() & found):
            raise CheckpointError(
                f"{file}: expected tensors of its own, got {twice[0]}, which {infos[twice[0]].file} has"
            )
        infos |= found
    if missing := [name for name in indexed if name not in infos]:
        raise CheckpointError(
            f"{path}: {len(missing)} tensors are missing or of another shape, such as {missing[0]}, which the index of "
            f"shards has in {indexed[missing[0]]}"
        )
    for name, shard in indexed.items():
        if infos[name].file.name != shard:
            raise CheckpointError(f"{path}: expected {name} in {shard}, as the index of shards says, found none there")
    return infos


def _scan_file(file: Path) -> dict[str, TensorInfo]:
    with open_tensors(file) as tensors:
        if file.suffix == ".safetensors":
            _expect_names_once(file)
        return {name: TensorInfo(file, name, tuple(value.shape), value.dtype) for name, value in tensors.items()}


def _expect_names_once(file: Path) -> None:
    """Refuse a header, which safetensors has read, that describes a tensor twice: it takes the last description."""

    def names_once(pairs: list[tuple[str, object]]) -> dict[str, object]:
        found = dict(pairs)
        if len(found) < len(pairs):
            names = [name for name, _ in pairs]
            twice = next(name for name in names if names.count(name) > 1)
            raise CheckpointError(f"{file}: expected each name once in the header, got {twice!r} twice")
        return found

    with file.open("rb") as handle:
        header = handle.read(int.from_bytes(handle.read(8), "little"))
    json.loads(header, object_pairs_hook=names_once)


@contextmanager
def open_tensors(file: Path) -> Iterator[Mapping[str, Tensor]]:
    """Yield the memory-mapped tensors of one file; values are read on use.

    Raises:
        CheckpointError: the file cannot be read.
        OSError: when a tensor is taken: another program has truncated the file.
    """
    with ExitStack() as stack:
        with naming(file, "a readable checkpoint file"):
            opened = stack.enter_context(file.open("rb"))
            size = os.fstat(opened.fileno()).st_size
        if file.suffix == ".safetensors":
            with naming(file, "a readable safetensors file"), safe_open(file, framework="pt") as handle:
                tensors = {name: handle.get_tensor(name) for name in handle.keys()}  # noqa: SIM118
        else:
            tensors = _load_torch(file)
        yield _Tensors(tensors, lambda: expect_size(opened, file, size))


class _Tensors(Mapping[str, Tensor]):
    """Tensors of a mapped file, each of which is taken after a check of the file."""

    def __init__(self, tensors: dict[str, Tensor], check: Callable[[], None]):
        self._tensors, self._check = tensors, check

    def __getitem__(self, name: str) -> Tensor:
        self._check()
        return self._tensors[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)


def read_tensors(infos: Mapping[str, TensorInfo]) -> Iterator[tuple[str, Tensor]]:
    """Yield each name with its tensor, file by file."""
    for file in {info.file for info in infos.values()}:
        with open_tensors(file) as tensors:
            for name, info in infos.items():
                if info.file == file:
                    yield name, tensors[info.name]


def _load_torch(file: Path) -> dict[str, Tensor]:
    with naming(file, "a readable PyTorch checkpoint"):
        _expect_uncompressed(file)
        try:
            loaded = _torch_load(file)
        except Exception as error:
            if not isinstance(error, pickle.UnpicklingError) and "weights_only" not in str(error):
                raise
            # Only the reason: torch's message goes on to advise loading the file without these checks.
            found = re.search(r"GLOBAL \S+", str(error)) or re.search(
                r"[Uu]nsupported \w+ \S+|TorchScript archive|legacy \S+ format", str(error)
            )
            raise CheckpointError(
                f"{file}: refused, because it does not hold tensors alone and loading it could run code "
                f"({found.group() if found else 'its pickle is damaged or not one of torch.save'})"
            ) from error
    state = loaded.get("model", loaded) if isinstance(loaded, dict) else loaded
    if not isinstance(state, dict):
        got = type(state).__name__
        raise CheckpointError(f"{file}: expected a state dict, or a dict with one under 'model', got {got}")
    tensors = {name: value for name, value in state.items() if isinstance(name, str) and isinstance(value, Tensor)}
    if not tensors:
        raise CheckpointError(f"{file}: expected a state dict of tensors, found none under the keys {list(state)[:6]}")
    for name, value in tensors.items():
        if value.layout is not torch.strided or value.is_quantized or value.is_meta:
            raise CheckpointError(f"{file}: {name}: expected a plain dense tensor, got one that is sparse or quantized")
        # One value, expanded to any shape, would confirm any size in `config.json` and take memory once it is copied.
        if value.nbytes > value.untyped_storage().nbytes():
            raise CheckpointError(f"{file}: {name}: expected a value for each place of {list(value.shape)}, got fewer")
    return tensors


def _torch_load(file: Path) -> object:
    try:
        return torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    except RuntimeError as error:
        if "mmap" not in str(error):
            raise
        # Files of torch < 1.6 are not zip archives and cannot be memory-mapped.
        return torch.load(file, map_location="cpu", weights_only=True)


def _expect_uncompressed(file: Path) -> None:
    """Refuse an archive that was compressed again: memory-mapped, its compressed bytes would be read as values."""
    if not zipfile.is_zipfile(file):
        return
    with zipfile.ZipFile(file) as archive:
        for entry in archive.infolist():
            if entry.compress_type != zipfile.ZIP_STORED:
                raise CheckpointError(f"{file}: expected an archive without compression, as torch.save writes it")


def has_weights(directory: Path) -> bool:
    """Whether a directory has a file of weights, or an index of them, that `scan` would read."""
    return any((directory / name).exists() for name in (*_SINGLE, SAFE_INDEX, TORCH_INDEX))


def _files(path: Path, variant: str | None = None) -> tuple[list[Path], dict[str, str]]:
    """Return the files of a checkpoint, and for each tensor of an index of shards the file that it names."""
    if path.is_file():
        return [path], {}
    if not path.is_dir():
        got = "a pipe, socket or device" if path.exists() else "no such file or directory"
        raise CheckpointError(f"{path}: {got}")
    for single, index in zip(_SINGLE, (SAFE_INDEX, TORCH_INDEX), strict=True):
        if variant is not None:
            single, index = (f".{variant}.".join(name.rsplit(".", 1)) for name in (single, index))
        if (path / single).is_file():  # transformers prefers it to an index too
            return [path / single], {}
        if (path / index).is_file():
            return _indexed_files(path / index)
    raise CheckpointError(f"{path}: found neither model.safetensors nor pytorch_model.bin, nor an index of shards")


def _indexed_files(index: Path) -> tuple[list[Path], dict[str, str]]:
    with naming(index, "a readable index of shards"):
        content = json.loads(index.read_text(encoding="utf-8"))
        indexed = dict(content["weight_map"])
        files = [index.parent / name for name in sorted(set(indexed.values()))]
        if not isinstance(content.get("metadata", {}), dict):
            got = type(content["metadata"]).__name__
            raise CheckpointError(f"{index}: metadata: expected a JSON object, got {got}")
    for file in files:
        if file.parent != index.parent or not file.is_file():
            raise CheckpointError(f"{index}: names the shard {file.name!r}, which is not in {index.parent}")
    return files, indexed


def write_sharded(tensors: Mapping[str, TensorInfo], directory: Path, max_shard_bytes: int) -> list[Path]:
    """Copy tensors, under new names, to sharded safetensors that `from_pretrained` loads.

    Values are written in the dtype of their `TensorInfo`. A shard holds tensors of one source file only.

    Args:
        tensors: new name -> source tensor.
        directory: existing directory for `model.safetensors`, or `model-0000N-of-0000M.safetensors` and their index.
        max_shard_bytes: maximum size of a shard; a larger tensor gets its own shard.

    Returns:
        The safetensors files written.
    """
    shards = _plan_shards(tensors, max_shard_bytes)
    names = [
        "model.safetensors" if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        for number in range(1, len(shards) + 1)
    ]
    by_file: dict[Path, dict[str, dict[str, TensorInfo]]] = {}
    for name, shard in zip(names, shards, strict=True):
        by_file.setdefault(next(iter(shard.values())).file, {})[name] = shard
    for file, shards_of_file in by_file.items():
        _copy_file(file, shards_of_file, directory)
    if len(shards) > 1:
        index = {
            "metadata": {"total_size": sum(info.nbytes for info in tensors.values())},
            "weight_map": {new: name for name, shard in zip(names, shards, strict=True) for new in shard},
        }
        (directory / SAFE_INDEX).write_text(json.dumps(index, indent=2), encoding="utf-8")
    return [directory / name for name in names]


@contextmanager
def naming_output(target: Path) -> Iterator[None]:
    """Turn the errors of writing a model into an OSError that names it.

    torch.save, safetensors and tokenizers raise errors of their own on a full disk.
    """
    try:
        yield
    except Exception as error:
        if not is_about_files(error):
            raise
        raise cannot_be_written(target, error) from error


def is_about_files(error: BaseException) -> bool:
    """Return whether an error says that a file cannot be written, rather than what should be in it."""
    words = ["(os error "]  # of Rust, as in tokenizers' bare `Exception`
    if isinstance(error, RuntimeError):
        words += ["PytorchStreamWriter", "unexpected pos", "iostream error"]
    return isinstance(error, OSError | SafetensorError) or any(word in str(error) for word in words)


def cannot_be_written(target: Path, error: BaseException) -> OSError:
    return OSError(f"{target}: cannot be written ({' '.join(str(error).split())})")


def _copy_file(file: Path, shards: dict[str, dict[str, TensorInfo]], directory: Path) -> None:
    """Write the shards that come from one file, and free their memory."""
    with open_tensors(file) as source:
        for name, shard in shards.items():
            values = {new: _own_storage(source[info.name].to(info.dtype)) for new, info in shard.items()}
            with naming_output(directory / name):
                save_file(values, directory / name, metadata={"format": "pt"})
            del values


def _own_storage(tensor: Tensor) -> Tensor:
    """Copy a view: safetensors rejects tensors that share storage, as views in a PyTorch file may."""
    tensor = tensor.contiguous()
    return tensor if tensor.untyped_storage().nbytes() == tensor.nbytes else tensor.clone()


def _plan_shards(tensors: Mapping[str, TensorInfo], max_shard_bytes: int) -> list[dict[str, TensorInfo]]:
    shards: list[dict[str, TensorInfo]] = []
    size = 0
    for new, info in sorted(tensors.items(), key=lambda item: (str(item[1].file), item[0])):
        fits = size + info.nbytes <= max_shard_bytes and bool(shards)
        if not fits or next(iter(shards[-1].values())).file != info.file:
            shards.append({})
            size = 0
        shards[-1][new] = info
        size += info.nbytes
    return shards
