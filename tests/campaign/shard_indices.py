"""The index of a directory of shards."""

import io
import json
import random
import zipfile
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from lion_fast.data import JsonlDataset, ShardDataset, write_shards
from tests.campaign.mutating import mutate_bytes, png
from tests.campaign.running import Trial

NUMBERS = (-(2**63), -512, -1, 0, 1, 2, 511, 512, 513, 1024, 1536, 4096, 2**31 - 1, 2**31, 2**40, 2**62, 2**63 - 1)
NAMES = (
    "../out.tar",
    "/etc/passwd",
    "",
    ".",
    "..",
    "sub/x.tar",
    "x\0.tar",
    "shard-000001.tar",
    "index.npz",
    "pipe.tar",
    "\ud800.tar",
    "é" * 400,
)
DTYPES = (
    "int8",
    "uint64",
    "float64",
    "complex128",
    "bool",
    "<U3",
    "S5",
    "datetime64[s]",
    ">i8",
    "object",
    [("a", "i4")],
)


@cache
def valid() -> dict[str, bytes]:
    """Return the files of a directory of two shards, and the records that they hold."""
    with TemporaryDirectory() as made:
        folder = Path(made)
        lines = []
        for number in range(5):
            (folder / f"{number}.png").write_bytes(png((number, 0, 0)))
            for question in ("What?", "Who?")[: 1 + number % 2]:
                lines.append({"image": f"{number}.png", "task": "image_level", "question": question, "answer": "a cat"})
        (folder / "t.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        write_shards(JsonlDataset(folder / "t.jsonl"), folder / "out", shard_bytes=5000)
        return {path.name: path.read_bytes() for path in (folder / "out").iterdir()}


@cache
def expected() -> list[tuple[Any, ...]]:
    with TemporaryDirectory() as folder:
        write(Path(folder))
        return read(Path(folder))


def write(folder: Path) -> None:
    for name, content in valid().items():
        (folder / name).write_bytes(content)


def read(folder: Path) -> list[tuple[Any, ...]]:
    dataset = ShardDataset(folder)
    dataset.epoch_order(0, 0)
    samples = [dataset[index] for index in range(len(dataset))]
    return [(sample["image"].tobytes(), sample["question"], sample["answer"]) for sample in samples]


def make(rng: random.Random, folder: Path) -> Trial:
    shards = folder / "shards"
    shards.mkdir()
    write(shards)
    (folder / "out.tar").write_bytes(valid()["shard-000000.tar"])
    with np.load(io.BytesIO(valid()["index.npz"])) as index:
        arrays: dict[str, Any] = {name: np.array(index[name]) for name in index.files}
    description = ""
    for _ in range(rng.choice([0, 1, 1, 2])):
        description += mutate(arrays, rng) + "; "
    file = io.BytesIO()
    (np.savez_compressed if rng.random() < 0.05 else np.savez)(file, **arrays)
    content = file.getvalue()
    if rng.random() < 0.25:
        content = mutate_bytes(content, rng) if rng.random() < 0.5 else header(content, rng)
        description += "bytes changed"
    (shards / "index.npz").write_bytes(content)
    corrupt = rng.random() < 0.1
    if corrupt:
        name = rng.choice([name for name in valid() if name.endswith(".tar")])
        (shards / name).write_bytes(mutate_bytes(valid()[name], rng))
        description += f"{name} changed"
    changed = bool(description)

    def check(samples: list[tuple[Any, ...]]) -> None:
        known = set(expected())
        # The content of a member has no checksum, so damage to it can go unnoticed.
        assert corrupt or set(samples) <= known, "a sample that was never written"
        assert changed or samples == expected()

    return Trial(description, lambda: read(shards), [str(shards)], check)


def mutate(arrays: dict[str, Any], rng: random.Random) -> str:
    name = rng.choice(list(arrays) or ["rows"])
    kind = rng.randrange(9)
    array = arrays.get(name, np.zeros(1))
    if kind == 0:
        arrays.pop(name, None)
        return f"no {name}"
    if kind == 1:
        dtype: Any = rng.choice(DTYPES)
        try:
            arrays[name] = array.astype(dtype)
        except (ValueError, TypeError, RuntimeError):
            arrays[name] = np.zeros(array.shape, dtype)
        return f"{name} of {dtype}"
    if kind == 2:
        last = array[..., :0] if array.ndim else array
        arrays[name] = rng.choice([array[None], array.ravel(), array.T, last, np.asfortranarray(array)])
        return f"{name} of shape {arrays[name].shape}"
    if kind == 3 and array.ndim:
        arrays[name] = array[: rng.randrange(len(array) + 1)] if rng.random() < 0.5 else np.concatenate([array, array])
        return f"{len(arrays[name])} {name}"
    if kind == 4 and "names" in arrays:
        names = arrays["names"].tolist()
        if isinstance(names, list) and names and not isinstance(names[0], list | tuple):
            names[rng.randrange(len(names))] = rng.choice(NAMES)
            arrays["names"] = np.array(names)
        return f"names {names}"[:300]
    numbers = array.copy()
    if numbers.dtype != np.int64 or not numbers.size:
        return "nothing"
    flat = numbers.reshape(-1)
    at = rng.randrange(numbers.size)
    with np.errstate(over="ignore"):
        flat[at] = rng.choice(NUMBERS) if rng.random() < 0.6 else flat[at] + rng.choice([-1024, -512, -1, 1, 512, 1024])
    arrays[name] = numbers
    return f"{name}[{at}] = {flat[at]}"


def header(content: bytes, rng: random.Random) -> bytes:
    """Write an archive whose arrays have hostile headers."""
    file = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(content)) as old, zipfile.ZipFile(file, "w") as new:
        for info in old.infolist():
            array = old.read(info)
            if rng.random() < 0.5:
                shape = rng.choice(
                    ["(10000000000000,)", "(-1,)", "(0, 99999999999)", "()", "(1e9,)", "9", "('a',)", "(" * 90]
                )
                dtype = rng.choice(["<i8", "|O", "<U0", "x", "<U99999999", "V0"])
                text = f"{{'descr': {dtype!r}, 'fortran_order': False, 'shape': {shape}}}"
                array = b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text.encode() + array[128:]
            new.writestr(info.filename, array)
    return file.getvalue()
