"""The golden models: their stored values, and their checkpoints in the original's files."""

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
    """One model: its settings, and the original's float64 results (see README.md)."""

    meta: dict[str, Any]
    expected: dict[str, Tensor]

    @property
    def tasks(self) -> tuple[str, ...]:
        """The tasks with stored results; with one adapter, both tasks have the same results."""
        return ("region_level", "image_level") if self.meta["visual_input"] == "ALL" else ("image_level",)

    @cached_property
    def parameters(self) -> dict[str, Tensor]:
        """All parameters in float32, by the original's names."""
        seed = self.meta["seed"]
        return {name: torch.from_numpy(weight(seed, name, shape)) for name, shape in self.meta["shapes"].items()}

    def batch(self, task: str, dtype: torch.dtype) -> dict[str, Tensor]:
        """Return the arguments of both models' `forward`, without labels."""
        images = pixels(self.meta["seed"], len(self.expected["input_ids"]), self.meta["image_size"])
        return {
            "pixel_values": torch.from_numpy(images).to(dtype),
            **{name: self.expected[name] for name in INPUTS if name in self.expected},
            "task_ids": torch.full((len(images),), TASK_IDS[task]),
        }

    def write_checkpoint(self, directory: Path) -> dict[str, Path]:
        """Write the original's files; return the arguments of `convert_checkpoint` and `LION.from_checkpoint_files`.

        LION's file also contains the language model's weights, which both functions prefer. They round weights from
        Flan-T5's directory to bfloat16, as the original does, but the golden values were computed without that.
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
        """Write placeholder vocabularies of the right sizes, which suffice for the stored ids."""
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
    """Return the golden model `name`, one of `NAMES`."""
    meta = json.loads((DIRECTORY / f"{name}.json").read_text(encoding="utf-8"))
    return Golden(meta, load_file(DIRECTORY / f"{name}.safetensors"))
