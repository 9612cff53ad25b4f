"""Directories of models, processors and taggers with hostile settings, damaged files and weights that do not fit."""

import json
import os
import random
import struct
import tempfile
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

from transformers.utils import logging

from lion_fast import LionConfig, LionForCausalLM, LionPipeline, LionProcessor, RamTagger
from tests.campaign.running import Trial
from tests.lion_fast.tiny import make_answerer, make_tagger

Files = dict[str, bytes]
Mutation = Callable[[random.Random, Files], str]

NUMBERS = [0, -1, 1, 2, 3, 7, 16, 3000, 10**7, 10**9, 2**31, 2**63, 10**30, 10**400, 0.5, -0.0, 1e308, float("nan")]
OTHERS = [float("inf"), True, False, None, "", "x", "8", "a" * 5000, "\ud800", [], [1], [[]], {}, {"a": {}}, "../../x"]
CODE = [
    "auto_map",
    "custom_generate",
    "trust_remote_code",
    "configuration_files",
    "transformers_weights",
    "use_kernels",
]
CLASSES = ["model_type", "tokenizer_class", "image_processor_type", "processor_class", "attn_implementation", "dtype"]
METHODS = [
    "to_dict",
    "from_dict",
    "sub_configs",
    "attribute_map",
    "__class__",
    "num_labels",
    "id2label",
    "rope_scaling",
]


@cache
def originals() -> dict[str, Files]:
    """Make the undamaged directories of each kind, as relative names and contents."""
    logging.set_verbosity_error()
    made = {}
    for family in ("t5", "qwen3"):
        with tempfile.TemporaryDirectory() as name:
            answerer = make_answerer(family)
            answerer.model.save_pretrained(name)
            answerer.processor.save_pretrained(name)
            made[family] = read(Path(name))
    with tempfile.TemporaryDirectory() as name:
        make_tagger(["dog", "cat"], [0.5, 0.25]).save_pretrained(name)
        made["ram"] = read(Path(name))
    return made


def read(folder: Path) -> Files:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def any_value(rng: random.Random) -> Any:
    return rng.choice(NUMBERS if rng.random() < 0.7 else OTHERS)


def places(value: Any) -> list[tuple[Any, Any]]:
    """Return every container and key of a JSON value."""
    found: list[tuple[Any, Any]] = []
    keys: Any = value.keys() if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ()
    for key in keys:
        found += [(value, key), *places(value[key])]
    return found


def pick_json(rng: random.Random, files: Files) -> str:
    names = sorted(name for name in files if name.endswith(".json"))
    return rng.choice([*names, *["config.json"] * len(names)])


def replace_value(rng: random.Random, files: Files) -> str:
    name = pick_json(rng, files)
    settings = json.loads(files[name])
    done = []
    for _ in range(rng.choice([1, 1, 1, 2, 5])):
        container, key = rng.choice(places(settings) or [({}, "x")])
        container[key] = any_value(rng)
        done.append(f"{key}={str(container[key])[:30]!r}")
    files[name] = json.dumps(settings).encode("utf-8", "surrogatepass")
    return f"{name}: {', '.join(done)}"


def remove_key(rng: random.Random, files: Files) -> str:
    name = pick_json(rng, files)
    settings = json.loads(files[name])
    container, key = rng.choice(places(settings) or [({"x": 0}, "x")])
    del container[key]
    files[name] = json.dumps(settings).encode()
    return f"{name} without {key}"


def add_key(rng: random.Random, files: Files) -> str:
    name = pick_json(rng, files)
    settings = json.loads(files[name])
    containers = [settings, *(container for container, _ in places(settings) if isinstance(container, dict))]
    key = rng.choice([*CODE, *CLASSES, *METHODS])
    value = rng.choice([any_value(rng), "evil", {"AutoModel": "evil.Evil"}, "BertTokenizer", "t5", "float32"])
    container = rng.choice(containers)
    if isinstance(container, dict):
        container[key] = value
    files[name] = json.dumps(settings).encode("utf-8", "surrogatepass")
    return f"{name} with {key}={str(value)[:40]!r}"


def other_json(rng: random.Random, files: Files) -> str:
    name = pick_json(rng, files)
    depth = rng.choice([50, 1000, 100000])
    files[name] = rng.choice(
        [
            b"",
            b"null",
            b"[]",
            b"3",
            b'"text"',
            b"{}",
            b"\xef\xbb\xbf" + files[name],
            files[name].decode().encode("utf-16"),
            b'{"a":' * depth + b"1" + b"}" * depth,
            b"[" * depth,
            files[name][:-1] + b',"x":' + b"9" * 10000 + b"}",
            files[name].replace(b'"', b"'"),
            files[name] * 2,
            b'{"hidden_size": NaN}',
        ]
    )
    return f"{name}: {files[name][:30]!r}"


def damage(rng: random.Random, files: Files) -> str:
    name = rng.choice(sorted(files))
    content = bytearray(files[name])
    if rng.random() < 0.3:
        files[name] = bytes(content[: rng.randrange(len(content) + 1)])
        return f"{name} cut to {len(files[name])} bytes"
    end = min(len(content), 40000 if name.endswith("safetensors") else len(content))
    for _ in range(rng.choice([1, 3, 20])):
        content[rng.randrange(end)] = rng.randrange(256)
    files[name] = bytes(content)
    return f"{name} with random bytes"


def change_header(rng: random.Random, files: Files) -> str:
    """Change names, dtypes, shapes, offsets or the set of tensors in the header of the weights."""
    content = files["model.safetensors"]
    (length,) = struct.unpack("<Q", content[:8])
    header = json.loads(content[8 : 8 + length])
    names = [name for name in header if name != "__metadata__"]
    name, other = rng.choice(names), rng.choice(names)
    entry = header[name]
    what = rng.choice(["dtype", "shape", "offsets", "drop", "rename", "swap", "metadata", "length", "twice", "part"])
    if what == "dtype":
        entry["dtype"] = rng.choice(["I32", "F64", "BF16", "F16", "I64", "BOOL", "C64", "F8_E4M3", "X", 3, None])
    elif what == "shape":
        entry["shape"] = rng.choice([[], [0], [-1], [10**18, 10**18], entry["shape"][::-1], [*entry["shape"], 1], "x"])
    elif what == "offsets":
        others = header[other]["data_offsets"]
        entry["data_offsets"] = rng.choice([[0, 4], [-4, 4], [10**18, 10**19], [8, 4], [], others])
    elif what == "drop":
        del header[name]
    elif what == "rename":
        header[name + ".x"] = header.pop(name)
    elif what == "swap":
        header[name], header[other] = header[other], header[name]
    elif what == "metadata":
        header["__metadata__"] = rng.choice(
            [{"format": "tf"}, {"format": "np"}, {}, {"a": 3}, [], {"format": "x" * 9999}]
        )
    elif what == "twice":
        header[name.replace(".0.", ".1.").replace(".1.", ".99999999999999999999.")] = entry
    elif what == "part":
        part = name.split(".")[0]
        for key in [key for key in names if key.startswith(part)]:
            del header[key]
    packed = json.dumps(header).encode()
    size = rng.choice([0, 2**63, len(packed) // 2, 10**9]) if what == "length" else len(packed)
    files["model.safetensors"] = struct.pack("<Q", size) + packed + content[8 + length :]
    return f"header: {what} of {name}"


def other_index(rng: random.Random, files: Files) -> str:
    weights = files.pop("model.safetensors")
    shard = rng.choice(["../x.safetensors", "/etc/passwd", "a.safetensors", "", "config.json", "a\0b", "x" * 300, 3])
    if shard == "a.safetensors":
        files["a.safetensors"] = weights
    maps = [
        {"weight_map": {"a": shard}},
        {"weight_map": [shard]},
        {"weight_map": {}},
        {},
        [],
        {"weight_map": {"a": None}},
    ]
    files["model.safetensors.index.json"] = json.dumps(rng.choice(maps)).encode()
    return f"index to {shard!r}: {files['model.safetensors.index.json'][:60]!r}"


def exchange(rng: random.Random, files: Files) -> str:
    """Replace a file by another of this or another kind of directory."""
    other = rng.choice(list(originals().values()))
    name, source = rng.choice(sorted(files)), rng.choice(sorted(other))
    files[name] = other[source]
    return f"{source} as {name}"


def remove_file(rng: random.Random, files: Files) -> str:
    name = rng.choice(sorted(files))
    del files[name]
    return f"{name} is missing"


MUTATIONS: tuple[Mutation, ...] = (
    replace_value,
    replace_value,
    replace_value,
    remove_key,
    add_key,
    add_key,
    other_json,
    damage,
    damage,
    change_header,
    change_header,
    other_index,
    exchange,
    remove_file,
)
CALLS: dict[str, tuple[Callable[[Path], Any], ...]] = {
    "lion": (
        LionForCausalLM.from_pretrained,
        LionForCausalLM.from_pretrained,
        LionConfig.from_pretrained,
        LionProcessor.from_pretrained,
        lambda folder: LionPipeline(folder, device="cpu"),
    ),
    "ram": (RamTagger.from_pretrained,),
}


def other_kind_of_file(rng: random.Random, files: Files, folder: Path) -> str:
    """Put a directory, a pipe, a link to nothing, to a device or to an endless file in a file's place."""
    file = folder / rng.choice(sorted(files))
    file.unlink()
    kind = rng.choice(["directory", "pipe", "nothing", "/dev/zero", "loop", "sparse"])
    if kind == "directory":
        file.mkdir()
    elif kind == "pipe":
        os.mkfifo(file)
    elif kind == "sparse":
        with file.open("wb") as opened:
            opened.truncate(8 << 30)
    else:
        file.symlink_to({"nothing": folder / "absent", "loop": file}.get(kind, Path("/dev/zero")))
    return f"{file.name} is {kind}"


def make(rng: random.Random, folder: Path) -> Trial:
    kind = rng.choice(["t5", "t5", "qwen3", "ram"])
    files = dict(originals()[kind])
    done, special = [], rng.random() < 0.08
    for _ in range(0 if special else rng.choice([1, 1, 1, 2, 3])):
        mutation = rng.choice(MUTATIONS)
        try:
            done.append(mutation(rng, files))
        except (ValueError, LookupError, TypeError, AttributeError, struct.error, RecursionError):
            continue  # an earlier mutation left nothing to mutate
    for name, content in files.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(content)
    if special:
        done.append(other_kind_of_file(rng, files, folder))
    call = rng.choice(CALLS["ram" if kind == "ram" else "lion"])
    whole = originals()[kind]
    weights = len(whole["model.safetensors"])

    def check(loaded: Any) -> None:
        model = getattr(loaded, "model", loaded)
        if isinstance(model, LionForCausalLM | RamTagger):
            size = 4 * sum(parameter.numel() for parameter in model.parameters())
            assert size < 1.1 * weights, f"the model has {size} bytes of parameters, the weights {weights}"

    return Trial(f"{kind}: {'; '.join(done)}", lambda: call(folder), [str(folder)], check=check)
