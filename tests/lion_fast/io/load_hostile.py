"""Load a checkpoint with every call and command after putting code, step by step, into each of its files.

Run as a script: argv[1] is a directory with `lion` (a checkpoint), `bert`, `llm` and `ram` (a RamTagger) in it. Prints
a JSON object: outcomes that were not refused as they should be, and connections that were tried. What a hostile class
would do when imported is to make the file `ran` in that directory.
"""

import contextlib
import io
import json
import socket
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from lion_fast import LionConfig, LionForCausalLM, LionPipeline, LionProcessor, RamTagger, ZeroShotTagger
from lion_fast.cli import main
from lion_fast.conversion.lion import convert_checkpoint
from lion_fast.demo.answering import Answerer
from lion_fast.processing_lion import build_processor

ROOT = Path(sys.argv[1])
LION, RAM, BERT, LLM, IMAGE, PTH = (ROOT / name for name in ("lion", "ram", "bert", "llm", "image.png", "any.pth"))
CODE = f"open({str(ROOT / 'ran')!r}, 'w')\nclass Evil: pass\n"
AUTO = ("Config", "Model", "ModelForCausalLM", "ModelForZeroShotImageClassification", "Processor", "ImageProcessor")
AUTO_MAP = {f"Auto{name}": "evil.Evil" for name in AUTO} | {"AutoTokenizer": ["evil.Evil", "evil.Evil"]}

# Settings that ask for code, or for files elsewhere, by the files in which transformers looks for them.
HOSTILE: dict[str, dict[str, Any]] = {
    "auto_map": {"auto_map": AUTO_MAP},
    "auto_map and unknown classes": {
        "auto_map": AUTO_MAP,
        "model_type": "evil",
        "image_processor_type": "Evil",
        "tokenizer_class": "Evil",
        "processor_class": "Evil",
    },
    "trust_remote_code": {"trust_remote_code": True},
    "custom_generate": {"custom_generate": "evil/generate"},
    "kernels of the Hub": {"attn_implementation": "evil/kernels", "_attn_implementation": "evil/kernels"},
    "another configuration": {"configuration_files": ["../evil/config.json"]},
    "other weights": {"transformers_weights": "../evil/model.safetensors"},
    "a file elsewhere": {"vocab_file": "../../etc/passwd"},
    "another repository": {"audio_tokenizer": {"audio_tokenizer_class": "AutoModel"}},
    "a quantizer with code": {"quantization_config": {"quant_method": "mxfp4"}},
}
FILES = {
    LION: ("config.json", "generation_config.json", "processor_config.json", "tokenizer_config.json"),
    LION / "qformer_tokenizer": ("tokenizer_config.json", "config.json"),
    RAM: ("config.json", "generation_config.json"),
    BERT: ("config.json", "tokenizer_config.json"),
    LLM: ("config.json", "tokenizer_config.json", "generation_config.json"),
}
MODEL_FILES = ("config.json", "generation_config.json")


def commands(*lines: str) -> dict[str, Callable[[], Any]]:
    return {line: lambda line=line: command(line.split()) for line in lines}


def command(argv: list[str]) -> None:
    """Run a command, whose exit status 2 and line on standard error are the refusal."""
    printed = io.StringIO()
    with contextlib.redirect_stderr(printed):
        status = main(argv)
    lines = printed.getvalue().strip().splitlines()
    if status == 2 and lines and "Traceback" not in printed.getvalue():
        raise ValueError(lines[-1])  # lines before it are of packages that were imported
    raise AssertionError(f"status {status}, {lines[-3:]}")


MODEL_CALLS: dict[str, Callable[[], Any]] = {
    "LionForCausalLM": lambda: LionForCausalLM.from_pretrained(LION),
    "trusting LionForCausalLM": lambda: LionForCausalLM.from_pretrained(LION, trust_remote_code=True),
    "LionConfig": lambda: LionConfig.from_pretrained(LION),
    "LionPipeline": lambda: LionPipeline(LION),
    "Answerer": lambda: Answerer.from_pretrained(LION, torch.device("cpu")),
    **commands(
        f"caption {IMAGE} --model {LION}",
        f"ask {IMAGE} what? --model {LION}",
        f"locate {IMAGE} it --model {LION}",
        f"caption {IMAGE} --model {LION} --out {ROOT}/rows.jsonl --workers 0",
        f"train --stage 1 model.frozen_from={LION} output_dir={ROOT}/run data.train.image_level=[scenes:0:8]",
    ),
}
PROCESSOR_CALLS: dict[str, Callable[[], Any]] = {
    "LionProcessor": lambda: LionProcessor.from_pretrained(LION),
    "trusting LionProcessor": lambda: LionProcessor.from_pretrained(LION, trust_remote_code=True),
    **{name: MODEL_CALLS[name] for name in MODEL_CALLS if "Lion" not in name},
}
RAM_CALLS = {
    "RamTagger": lambda: RamTagger.from_pretrained(RAM),
    **commands(f"tag {IMAGE} --ram {RAM}", f"tag {IMAGE} --ram {RAM} --out {ROOT}/tags.jsonl --workers 0"),
}
PART_CALLS = {
    "build_processor": lambda: build_processor(LLM, BERT),
    "convert_checkpoint": lambda: convert_checkpoint(PTH, LLM, BERT, PTH, ROOT / "out"),
    **commands(f"convert --vit {PTH} --llm {LLM} --bert {BERT} --lion {PTH} --out {ROOT}/out"),
}
ZERO_SHOT_CALLS = {"ZeroShotTagger": lambda: ZeroShotTagger.from_pretrained(LLM, ["a"])}


def calls_of(folder: Path, file: str) -> dict[str, Callable[[], Any]]:
    """Return the calls that read a file, each of which has to refuse it."""
    if folder == RAM:
        return RAM_CALLS
    if folder in (BERT, LLM):
        return PART_CALLS | (ZERO_SHOT_CALLS if folder == LLM else {})
    if folder == LION and file in MODEL_FILES:
        memory = commands(f"memory --model {LION} --stage 1") if file == "config.json" else {}
        return MODEL_CALLS | memory
    return PROCESSOR_CALLS


def contacts() -> list[str]:
    """Record every attempt to reach another machine, and refuse it."""
    tried: list[str] = []

    def refuse(*arguments: Any, **_: Any) -> None:
        tried.append(repr(arguments[-2:]))
        raise OSError("no network in this test")

    socket.getaddrinfo = refuse  # type: ignore[assignment]
    socket.socket.connect = refuse  # type: ignore[method-assign,assignment]
    return tried


def hostile_files() -> Iterator[tuple[Path, str, bytes, bytes]]:
    for folder, names in FILES.items():
        (folder / "evil.py").write_text(CODE, encoding="utf-8")
        for name in names:
            file = folder / name
            before = file.read_bytes() if file.exists() else b"{}"
            for what, settings in HOSTILE.items():
                yield file, what, before, json.dumps(json.loads(before) | settings).encode()


def try_all() -> tuple[list[str], int]:
    """Try each call on each file with `auto_map`, and one call with each of the other settings."""
    wrong, count = [], 0
    for file, what, before, hostile in hostile_files():
        file.write_bytes(hostile)
        calls = calls_of(file.parent, file.name)
        for name, call in list(calls.items())[: None if what == "auto_map" else 1]:
            count += 1
            where = f"{what} in {file.parent.name}/{file.name}: {name}"
            try:
                call()
                wrong.append(f"{where} loaded it")
            except ValueError as error:
                if str(file) not in str(error) or "\n" in str(error):
                    wrong.append(f"{where}: {error}")
            except Exception as error:
                wrong.append(f"{where}: {type(error).__name__}: {error}")
        file.write_bytes(before)
    return wrong, count


def try_names() -> list[str]:
    """Give a name that is no directory wherever nobody asked for a download."""
    wrong = []
    calls = {
        "RamTagger": lambda: RamTagger.from_pretrained("evil/ram"),
        "build_processor": lambda: build_processor("evil/llm", "evil/bert"),
        "LionPipeline": lambda: LionPipeline("evil/lion"),
        **commands(
            f"caption {IMAGE} --model evil/lion",
            f"caption {IMAGE} --model evil/lion --out {ROOT}/rows.jsonl --workers 0",
            f"tag {IMAGE} --ram evil/ram",
            f"tag {IMAGE} --ram evil/ram --out {ROOT}/tags.jsonl --workers 0",
            f"train --stage 1 model.frozen_from=evil/lion output_dir={ROOT}/run data.train.image_level=[scenes:0:8]",
            "memory --model evil/lion",
            f"convert --vit {PTH} --llm evil/llm --bert evil/bert --lion {PTH} --out {ROOT}/out",
        ),
    }
    for name, call in calls.items():
        try:
            call()
            wrong.append(f"{name} took a name")
        except (ValueError, OSError) as error:
            if "evil" not in str(error) and PTH.name not in str(error):
                wrong.append(f"{name}: {error}")
    return wrong


if __name__ == "__main__":
    PTH.touch()
    tried = contacts()
    names = try_names()
    wrong, count = try_all()
    print(json.dumps({"wrong": names + wrong, "calls": count, "contacts": tried}))
