"""The golden model, converted as users convert it, the quickstart's results, and the kernels' launches."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from triton.runtime.jit import KernelInterface

from lion_fast import LionConfig, LionForCausalLM, LionProcessor
from lion_fast.cli import main
from lion_fast.configuration_lion import FLAN_T5_XL
from lion_fast.conversion.lion import convert_checkpoint
from lion_fast.quickstart import run


class Golden(NamedTuple):
    """The original's results and the inputs that gave them."""

    directory: Path
    expected: dict[str, Tensor]
    meta: dict[str, Any]


@pytest.fixture(scope="session")
def golden(golden_dir: Path) -> Golden:
    directory = golden_dir / "lion_tiny"
    return Golden(
        directory,
        load_file(directory / "expected.safetensors"),
        json.loads((directory / "meta.json").read_text(encoding="utf-8")),
    )


@pytest.fixture(scope="session")
def converted(golden_files: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Convert the golden checkpoints to a directory for `from_pretrained`, with several shards."""
    out = tmp_path_factory.mktemp("converted") / "lion-tiny"
    convert_checkpoint(**golden_files, out=out, max_shard_bytes=20_000_000)
    return out


@pytest.fixture(scope="session")
def ram_files(golden_dir: Path) -> dict[str, Path]:
    """The original's files of the golden RAM: the arguments of `convert_ram`."""
    names = {"ram": "ram_tiny.pth", "tags": "ram_tag_list.txt", "thresholds": "ram_tag_list_threshold.txt"}
    return {argument: golden_dir / "ram_tiny" / name for argument, name in names.items()}


@pytest.fixture(scope="session")
def golden_batch(golden: Golden, converted: Path) -> Callable[[str], dict[str, Tensor]]:
    """Return a function that makes a task's batch: the processor's text for the golden questions and golden pixels."""
    processor = LionProcessor.from_pretrained(converted)

    def batch(task: str) -> dict[str, Tensor]:
        meta = golden.meta
        made = processor(
            images=[golden.directory / "image.png"] * 4,
            text=meta["questions"],
            tags=meta["tags"],
            task=task,
            text_target=meta["answers"],
            return_tensors="pt",
        )
        return {**made, "pixel_values": golden.expected["pixel_values"]}

    return batch


@pytest.fixture(scope="session")
def published() -> dict[str, LionForCausalLM]:
    """Models of the published sizes, on the meta device."""
    sizes = {"XL": {}, "XXL": {"d_model": 4096, "d_ff": 10240, "num_heads": 64}}
    with torch.device("meta"):
        return {
            f"LION-FlanT5-{size}": LionForCausalLM(LionConfig(text_config={**FLAN_T5_XL, **text}))
            for size, text in sizes.items()
        }


@pytest.fixture(scope="session")
def quickstart_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Run the quickstart for a few steps and return its output directory."""
    path = tmp_path_factory.mktemp("quickstart")
    run(path, seed=5, smoke=True, show=False)
    return path


@pytest.fixture
def run_cli(capfd: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """Return a function that runs `lion-fast` with arguments and options of any type, here in this process.

    It returns the exit status and what was printed to standard output and to standard error.
    """

    def run(*arguments: Any, **options: Any) -> tuple[Any, str, str]:
        argv = [*arguments]
        for name, value in options.items():
            argv += [f"--{name.replace('_', '-')}", value]
        try:
            status = main([str(argument) for argument in argv])
        except SystemExit as exit_of_argparse:
            status = exit_of_argparse.code
        return status, *capfd.readouterr()

    return run


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Record the names of the launched Triton kernels, in order."""
    names: list[str] = []
    getitem = KernelInterface.__getitem__

    def launch(self: Any, grid: Any) -> Any:
        names.append(self.fn.__name__)
        return getitem(self, grid)

    monkeypatch.setattr(KernelInterface, "__getitem__", launch)
    return names
