"""The golden model, converted as users convert it, and small random models of every kind."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from safetensors.torch import load_file
from tokenizers.processors import TemplateProcessing
from torch import Tensor
from triton.runtime.jit import KernelInterface

from lion_fast import LionConfig, LionForCausalLM, LionProcessor
from lion_fast.conversion.lion import convert_checkpoint
from lion_fast.demo.answering import Answerer
from lion_fast.quickstart import run
from lion_fast.quickstart.vocabulary import build_text_tokenizer, scene_texts
from tests.lion_fast.tiny import NO_DROPOUT, PART, QFORMER, T5, VISION, scene_processor

DECODER = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "vocab_size": 64,
    "pad_token_id": 0,
    "eos_token_id": 1,
    "bos_token_id": 2,
}
TEXT_CONFIGS = {"t5": T5, **{family: {"model_type": family, **DECODER} for family in ("llama", "qwen2", "qwen3")}}


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
def quickstart_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Run the quickstart for a few steps and return its output directory."""
    path = tmp_path_factory.mktemp("quickstart")
    run(path, seed=5, smoke=True, show=False)
    return path


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


@pytest.fixture(scope="session")
def make_config() -> Callable[..., LionConfig]:
    """Return a function that makes configurations of models of a few thousand parameters, for any language model."""

    def make(text: str = "t5", **overrides: Any) -> LionConfig:
        settings: dict[str, Any] = {
            "vision_config": VISION,
            "qformer_config": {**QFORMER, **NO_DROPOUT, "vocab_size": 64, "max_position_embeddings": 32},
            "aggregator_config": {
                **PART,
                **NO_DROPOUT,
                "num_attention_heads": 4,
                "feature_layers": [2, 1, 0],
                "projection_size": 40,
            },
            "text_config": TEXT_CONFIGS[text],
            "num_query_tokens": 4,
            "adapter_rank": 8,
            "soft_prompt_token_id": 5,
        }
        return LionConfig(**{**settings, **overrides})

    return make


@pytest.fixture(scope="session")
def make_model(make_config: Callable[..., LionConfig]) -> Callable[..., LionForCausalLM]:
    """Return a function that makes small models whose up-projections are not zero, as a new model's are."""

    def make(text: str = "t5", seed: int = 0, **overrides: Any) -> LionForCausalLM:
        torch.manual_seed(seed)
        model = LionForCausalLM(make_config(text, **overrides))
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "up_proj" in name or ("aggregator" in name and "output.dense" in name):
                    parameter.normal_(std=0.1)
        return model.eval()

    return make


@pytest.fixture(scope="session")
def make_answerer(make_config: Callable[..., LionConfig], make_model: Callable[..., LionForCausalLM]) -> Callable:
    """Return a function that makes small models, with random answers, and a processor for any ASCII text."""
    texts = scene_texts(40)

    def make(text: str = "t5", **overrides: Any) -> Answerer:
        tokenizer = build_text_tokenizer(texts)
        if text != "t5":  # a decoder-only model's prompts must not end with EOS
            tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="$A")
        processor = scene_processor(40, tokenizer, is_encoder_decoder=text == "t5", max_txt_len=32)
        vocabularies = {
            "text_config": {**TEXT_CONFIGS[text], "vocab_size": len(processor.tokenizer)},
            "qformer_config": {
                **make_config().qformer_config.to_dict(),
                "vocab_size": len(processor.qformer_tokenizer),
            },
            "soft_prompt_token_id": processor.soft_prompt_token_id,
        }
        model = make_model(text, **{**vocabularies, **overrides})
        model.generation_config.update(num_beams=1, max_new_tokens=8, repetition_penalty=1.0)
        return Answerer(model, processor)

    return make


@pytest.fixture
def make_batch() -> Callable[..., dict[str, Tensor]]:
    """Return a function that makes random inputs for the models of `make_model`, with alternating tasks."""

    def make(batch: int = 3, image_size: int = 28, labels: bool = False, seed: int = 0) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(seed)

        def ids(length: int) -> Tensor:
            return torch.randint(6, 64, (batch, length), generator=generator)

        made = {
            "pixel_values": torch.randn(batch, 3, image_size, image_size, generator=generator),
            "input_ids": ids(7),
            "qformer_input_ids": ids(5),
            "task_ids": torch.arange(batch) % 2,
        }
        made["input_ids"][:, 1] = 5  # the soft prompt's token
        return {**made, "labels": ids(4)} if labels else made

    return make
