"""The original's files: damaged pickles and archives, and directories of BERT and Flan-T5 with hostile settings."""

import io
import os
import pickle
import random
import zipfile
from functools import cache
from pathlib import Path
from typing import Any

import torch
from transformers import BertConfig
from transformers.utils import logging

from lion_fast.conversion.lion import convert_checkpoint, original_name
from lion_fast.conversion.ram import convert_ram
from lion_fast.io.checkpoints import scan
from tests.campaign import checkpoints
from tests.campaign.checkpoints import Files
from tests.campaign.running import Trial
from tests.lion_fast.tiny import make_answerer, make_tagger

State = dict[Any, Any]
_OF_SETTINGS = (
    checkpoints.replace_value,
    checkpoints.add_key,
    checkpoints.other_json,
    checkpoints.remove_key,
    checkpoints.damage,
    checkpoints.remove_file,
)


@cache
def sources() -> tuple[Files, dict[str, State]]:
    """Make the sources of a small LION without an aggregator: `llm/`, `bert/`, and the tensors of `vit` and `lion`."""
    logging.set_verbosity_error()
    vision = {"hidden_size": 88, "num_attention_heads": 1, "num_hidden_layers": 39, "intermediate_size": 8}
    answerer = make_answerer(visual_input="QFORMER", vision_config=vision, aggregator_config={"hidden_size": 88})
    states: dict[str, State] = {"vit": {}, "lion": {}, "llm": {}}
    for name, value in answerer.model.state_dict().items():
        original = original_name(name)
        part, _, rest = original.partition(".")
        if part == "visual_encoder":
            states["vit"][rest] = value.clone()
        elif part == "t5_model" and ".adapter." not in original:
            states["llm"][rest] = value.clone()
        else:
            states["lion"][original] = value.clone()
    files = {}
    for name, content in checkpoints.originals()["t5"].items():
        if name.startswith("qformer_tokenizer/"):
            files[name.replace("qformer_tokenizer", "bert")] = content
        elif name.startswith("tokenizer"):
            files[f"llm/{name}"] = content
    files["llm/config.json"] = answerer.model.config.text_config.to_json_string(use_diff=False).encode()
    files["bert/config.json"] = BertConfig(hidden_size=16, num_attention_heads=2).to_json_string().encode()
    files["llm/pytorch_model.bin"] = saved(states.pop("llm"))
    return files, states


@cache
def tagger() -> State:
    from lion_fast.conversion.ram import _FUSED, _source_name

    state: State = {}
    for name, value in make_tagger(["dog", "cat"], [0.5, 0.5]).state_dict().items():
        source = _source_name(name)
        state[source] = value.repeat(3, *[1] * (value.dim() - 1)) if source.endswith(_FUSED) else value.clone()
    return state


def saved(state: Any, **options: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(state, buffer, **options)
    return buffer.getvalue()


class Code:
    def __reduce__(self) -> tuple:
        return os.mkdir, ("ran",)


def change_tensors(rng: random.Random, state: State) -> str:
    name = rng.choice([name for name, value in state.items() if isinstance(value, torch.Tensor)])
    value = state[name]
    if value.is_meta or value.is_sparse:
        return "once more"
    other = rng.choice(
        [
            None,
            3,
            "text",
            [value],
            {"a": value},
            value.reshape(-1),
            value[:0],
            value.unsqueeze(0),
            value.mT if value.dim() == 2 else value,
            value.to(torch.int32),
            value.to(torch.complex64),
            value.to_sparse(),
            value.to("meta"),
            value.bool(),
            value.to(torch.float8_e4m3fn),
            torch.nn.Parameter(value, requires_grad=False),
            value.expand(2, *value.shape),
            Code(),
        ]
    )
    if rng.random() < 0.3:
        del state[name]
        return f"without {name}"
    if rng.random() < 0.2:
        key = rng.choice([name.replace("0", "99999999999999999999"), 3, "", "a" * 9999, name + ".x", (1, 2)])
        state[key] = state.pop(name)
        return f"{name} as {str(key)[:30]!r}"
    state[name] = other
    return f"{name} as {type(other).__name__} {list(getattr(other, 'shape', []))}"


def written(rng: random.Random, state: State) -> tuple[str, bytes]:
    """Save a state in one of torch's formats, or another, and perhaps damage it."""
    wrapped = rng.choice([state, {"model": state}, {"model": state, "epoch": 3}, {"state_dict": state}, [state]])
    how = rng.choice(["zip", "zip", "legacy", "pickle", "compressed", "protocol 4"])
    if how == "pickle":
        content = pickle.dumps({"a": 3, "b": Code()})
    elif how == "protocol 4":
        content = saved(wrapped, pickle_protocol=4)
    else:
        content = saved(wrapped, _use_new_zipfile_serialization=how != "legacy")
    if how == "compressed":
        content = compressed(content)
    what = rng.choice(["whole", "whole", "cut", "bytes", "start", "twice", "empty"])
    if what == "cut":
        content = content[: rng.randrange(len(content))]
    elif what in ("bytes", "start"):
        changed = bytearray(content)
        for _ in range(rng.choice([1, 4, 30])):
            changed[rng.randrange(min(len(content), 3000) if what == "start" else len(content))] = rng.randrange(256)
        content = bytes(changed)
    elif what == "twice":
        content *= 2
    elif what == "empty":
        content = rng.choice([b"", b"PK\x03\x04", b"\x80\x02.", b"\n" * 100, content[:2]])
    return f"{how}, {what}", content


def compressed(archive: bytes) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(archive)) as old, zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as new:
        for entry in old.infolist():
            new.writestr(entry.filename, old.read(entry))
    return buffer.getvalue()


def make_scan(rng: random.Random, folder: Path) -> Trial:
    state = {name: torch.ones(rng.randrange(5), 3) for name in "abc"}
    done = change_tensors(rng, state) if rng.random() < 0.7 else ""
    how, content = written(rng, state)
    file = folder / rng.choice(["a.pth", "a.safetensors", "pytorch_model.bin"])
    file.write_bytes(content)
    path = folder if file.name.endswith(".bin") and rng.random() < 0.5 else file

    def check(found: Any) -> None:
        assert not (folder / "ran").exists()
        assert not Path("ran").exists()
        assert all(isinstance(name, str) for name in found)

    return Trial(f"scan {file.name}: {done}; {how}", lambda: scan(path), [str(folder)], check=check)


def make_ram(rng: random.Random, folder: Path) -> Trial:
    state = dict(tagger())
    done = [change_tensors(rng, state) for _ in range(rng.choice([1, 1, 3]))]
    how, content = written(rng, state) if rng.random() < 0.3 else ("whole", saved(state) if not_code(state) else b"")
    (folder / "ram.pth").write_bytes(content)
    lines = {
        "tags.txt": ["dog\ncat\n", "dog\ncat\n", "dog\n", "\xff", "dog\n\ncat", "a\u2028b\nc", "\ufeffdog\ncat", ""],
        "thresholds.txt": ["0.5\n0.5\n", "0.5\n0.5\n", "nan\n1", "1e999\n0", "2\n0", "½\n0", "0x1\n0", "0.5\n" * 9],
    }
    for name, choices in lines.items():
        (folder / name).write_text(
            rng.choice(choices), encoding=rng.choice(["utf-8", "utf-8", "latin-1", "utf-16"]), errors="replace"
        )

    def call() -> Any:
        return convert_ram(folder / "ram.pth", folder / "tags.txt", folder / "thresholds.txt", folder / "out")

    return Trial(f"ram: {done}, {how}", call, [str(folder)])


def not_code(state: State) -> bool:
    return not any(isinstance(value, Code) for value in state.values())


def make_lion(rng: random.Random, folder: Path) -> Trial:
    files, states = dict(sources()[0]), {name: dict(state) for name, state in sources()[1].items()}
    done: list[str] = []
    if rng.random() < 0.6:
        mutation = rng.choice(_OF_SETTINGS)
        part = rng.choice(["llm/", "llm/", "bert/"])
        mine = {name.removeprefix(part): content for name, content in files.items() if name.startswith(part)}
        done.append(f"{part} {mutation(rng, mine)}")
        files = {name: content for name, content in files.items() if not name.startswith(part)}
        files |= {part + name: content for name, content in mine.items()}
    else:
        source = rng.choice(sorted(states))
        done.append(f"{source}: {change_tensors(rng, states[source])}")
    for name, content in files.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(content)
    for name, state in states.items():
        (folder / f"{name}.pth").write_bytes(saved(state))

    def call() -> Any:
        return convert_checkpoint(
            folder / "vit.pth", folder / "llm", folder / "bert", folder / "lion.pth", folder / "out"
        )

    return Trial("; ".join(done), call, [str(folder)])


def make(rng: random.Random, folder: Path) -> Trial:
    kind = rng.random()
    return (make_scan if kind < 0.7 else make_ram if kind < 0.92 else make_lion)(rng, folder)
