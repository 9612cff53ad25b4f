"""The golden models: what is stored of them, and their checkpoints in the original's files."""

import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from tests.golden.weights import pixels, weight

DIRECTORY = Path(__file__).parent
NAMES = ("all", "qformer", "aggregator")
TASK_IDS = {"region_level": 0, "image_level": 1}
INPUTS = ("input_ids", "attention_mask", "qformer_input_ids", "qformer_attention_mask")
SOFT_PROMPT_TOKEN = "<extra_id_0>"


@dataclass(repr=False)
class Golden:
    """One model: its settings, and what the original computed with it in float64 (see README.md)."""

    meta: dict[str, Any]
    expected: dict[str, Tensor]

    @property
    def tasks(self) -> tuple[str, ...]:
        """The tasks of which there are results; one adapter serves both alike."""
        return ("region_level", "image_level") if self.meta["visual_input"] == "ALL" else ("image_level",)

    @cached_property
    def parameters(self) -> dict[str, Tensor]:
        """Every parameter by its original name, float32."""
        seed = self.meta["seed"]
        return {name: torch.from_numpy(weight(seed, name, shape)) for name, shape in self.meta["shapes"].items()}

    def batch(self, task: str, dtype: torch.dtype) -> dict[str, Tensor]:
        """The arguments of both models' `forward`, without labels."""
        images = pixels(self.meta["seed"], len(self.expected["input_ids"]), self.meta["image_size"])
        return {
            "pixel_values": torch.from_numpy(images).to(dtype),
            **{name: self.expected[name] for name in INPUTS if name in self.expected},
            "task_ids": torch.full((len(images),), TASK_IDS[task]),
        }

    def write_checkpoint(self, directory: Path) -> dict[str, Path]:
        """The files of the original, as the arguments of `convert_checkpoint` and `LION.from_checkpoint_files`.

        The language model's weights stand in LION's file, too, which both prefer: those of Flan-T5's directory they
        round to bfloat16, as the original does, but not where it computed this.
        """
        files = {name: directory / name for name in ("vit", "llm", "bert", "lion")}
        for name in ("llm", "bert"):
            files[name].mkdir(parents=True)
        parts = {"visual_encoder.": {}, "t5_model.": {}, "": {}}
        for name, value in self.parameters.items():
            prefix = next(prefix for prefix in parts if name.startswith(prefix))
            parts[prefix][name.removeprefix(prefix)] = value
        language_model = {f"t5_model.{name}": value for name, value in parts["t5_model."].items()}
        frozen = {name: value for name, value in parts["t5_model."].items() if ".adapter." not in name}
        torch.save(parts["visual_encoder."], files["vit"])
        torch.save({"model": {**parts[""], **language_model}}, files["lion"])
        save_file(frozen, files["llm"] / "model.safetensors", metadata={"format": "pt"})
        for name, part in (("llm", "t5"), ("bert", "qformer")):
            (files[name] / "config.json").write_text(json.dumps(self.meta[part]), encoding="utf-8")
        self._write_tokenizers(files["llm"], files["bert"])
        return files

    def _write_tokenizers(self, llm: Path, bert: Path) -> None:
        """Vocabularies of the right sizes: the stored ids need no more."""
        words = ["<pad>", "</s>", "<unk>", *(f"word{n}" for n in range(3, self.meta["t5"]["vocab_size"]))]
        tokenizer = Tokenizer(models.WordLevel({word: n for n, word in enumerate(words)}, unk_token="<unk>"))
        if self.meta["soft_prompt_id"] is not None:
            words[self.meta["soft_prompt_id"]] = SOFT_PROMPT_TOKEN
            tokenizer = Tokenizer(models.WordLevel({word: n for n, word in enumerate(words)}, unk_token="<unk>"))
            tokenizer.add_special_tokens([SOFT_PROMPT_TOKEN])
        special = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
        PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special).save_pretrained(llm)
        words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
        words += [f"word{n}" for n in range(len(words), self.meta["qformer"]["vocab_size"])]
        (bert / "vocab.txt").write_text("\n".join(words) + "\n", encoding="utf-8")


def load(name: str) -> Golden:
    """The golden model of that name, one of `NAMES`."""
    meta = json.loads((DIRECTORY / f"{name}.json").read_text(encoding="utf-8"))
    return Golden(meta, load_file(DIRECTORY / f"{name}.safetensors"))
