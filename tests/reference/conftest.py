"""The tiny model of the golden data, loaded in the reference, and the original's results for it."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from lion_reference import LION


@pytest.fixture(scope="session")
def lion_tiny(golden_dir: Path) -> Path:
    return golden_dir / "lion_tiny"


@pytest.fixture(scope="session")
def meta(lion_tiny: Path) -> dict:
    return json.loads((lion_tiny / "meta.json").read_text())


@pytest.fixture(scope="session")
def expected(lion_tiny: Path) -> dict[str, Tensor]:
    return load_file(lion_tiny / "expected.safetensors")


@pytest.fixture(scope="session")
def model(golden_files: dict[str, Path]) -> LION:
    return LION.from_checkpoint_files(**golden_files)


class GoldenViT(nn.Module):
    """Returns the outputs of the original's ViT for the golden images, by layer."""

    def __init__(self, expected: dict[str, Tensor], dtype: torch.dtype) -> None:
        super().__init__()
        self.states = {layer: expected[f"vit.layer{layer}"].to(dtype) for layer in (38, 28, 18)}

    def forward(self, _pixel_values: Tensor) -> dict[int, Tensor]:
        return self.states


@pytest.fixture(scope="session")
def load_behind_vit(golden_files: dict[str, Path], expected: dict[str, Tensor]) -> Callable[[torch.dtype], LION]:
    """Return a function that loads a model whose ViT returns the golden states.

    The layers after the ViT remove the large component that its states share, which amplifies their fp32 error 60
    times; that error differs between CPUs. A separate test compares the ViT.
    """

    def load(dtype: torch.dtype) -> LION:
        model = LION.from_checkpoint_files(**golden_files, dtype=dtype)
        model.visual_encoder = GoldenViT(expected, dtype)
        return model

    return load


@pytest.fixture(scope="session")
def inputs(lion_tiny: Path, meta: dict, expected: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the four golden samples, without tasks and labels."""
    from transformers import AutoTokenizer

    def tokenize(directory: str, texts: list[str]) -> tuple[Tensor, Tensor]:
        tokenizer = AutoTokenizer.from_pretrained(lion_tiny / directory, truncation_side="left")
        batch = tokenizer(texts, padding=True, truncation=True, max_length=128, return_tensors="pt")
        return batch.input_ids, batch.attention_mask

    template = "According to <extra_id_0>, you are allowed to use or partially use the following tags: [{}]. {}"
    texts = [template.format(tags, question) for tags, question in zip(meta["tags"], meta["questions"], strict=True)]
    input_ids, attention_mask = tokenize("flan-t5-tiny", texts)
    qformer_input_ids, qformer_attention_mask = tokenize("bert-tiny", meta["questions"])
    return {
        "pixel_values": expected["pixel_values"],
        "input_ids": input_ids,
        "attention_mask": attention_mask,
        "qformer_input_ids": qformer_input_ids,
        "qformer_attention_mask": qformer_attention_mask,
    }


@pytest.fixture(scope="session")
def task_ids() -> dict[str, Tensor]:
    return {"region_level": torch.zeros(4, dtype=torch.long), "image_level": torch.ones(4, dtype=torch.long)}
