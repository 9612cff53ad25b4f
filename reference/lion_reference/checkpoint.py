"""Reads the published files of LION. Every dimension comes from them, so a tiny model loads like the real one."""

import json
import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .configuration import AggregatorConfig, LIONConfig, QFormerConfig, T5Config, ViTConfig
from .vit import resize_pos_embed

VIT_HEAD_DIM = 88
SOFT_PROMPT_TOKEN = "<extra_id_0>"
SAFETENSORS_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


class StateDict(dict[str, Tensor]):
    """The tensors of a file by name; a missing name raises an error that names file and key."""

    def __init__(self, path: Path, tensors: dict[str, Tensor]) -> None:
        super().__init__(tensors)
        self.path = path

    def __missing__(self, name: str) -> Tensor:
        raise ValueError(f"{self.path}: missing key {name!r}")

    def holds(self, prefix: str) -> bool:
        return any(name.startswith(prefix) for name in self)


def read_checkpoint_files(
    *, vit: str | Path, llm: str | Path, bert: str | Path, lion: str | Path, image_size: int | None
) -> tuple[LIONConfig, dict[str, Tensor]]:
    """Read the configuration and the state dict of the whole model, in the files' dtypes except T5, which is in bf16.

    The parameters in `lion` determine the visual inputs and whether the model has tags.
    """
    vit_state, t5_state, lion_state = read_torch(Path(vit)), read_safetensors(Path(llm)), read_torch(Path(lion))
    if image_size is not None:
        grid_size = image_size // vit_state["patch_embed.proj.weight"].shape[-1]
        vit_state["pos_embed"] = resize_pos_embed(vit_state["pos_embed"].float(), grid_size)
    state_dict = {
        **{f"visual_encoder.{name}": tensor for name, tensor in vit_state.items()},
        # LION was trained with T5 rounded to bf16, so the original always rounds it.
        **{f"t5_model.{name}": tensor.bfloat16() for name, tensor in t5_state.items()},
        **lion_state,
    }
    has_qformer, has_aggregator = lion_state.holds("Qformer."), lion_state.holds("fusion_adapter.")
    if not (has_qformer or has_aggregator):
        raise ValueError(f"{lion}: expected keys Qformer.* or fusion_adapter.* or both, got neither")
    aggregator = aggregator_config(lion_state) if has_aggregator else AggregatorConfig()
    config = LIONConfig(
        vit=vit_config(vit_state, depth=1 + max(aggregator.layers)),
        qformer=qformer_config(lion_state, Path(bert)) if has_qformer else QFormerConfig(),
        aggregator=aggregator,
        t5=t5_config(Path(llm)),
        visual_input="ALL" if has_qformer and has_aggregator else "QFORMER" if has_qformer else "AGGREGATOR",
        adapter_rank=len(lion_state["t5_model.encoder.block.0.layer.1.adapter.adapters.0.down_proj.weight"]),
        soft_prompt_id=soft_prompt_id(Path(llm)) if "soft_prompt_hint" in lion_state else None,
    )
    return config, state_dict


def vit_config(state: StateDict, depth: int) -> ViTConfig:
    width, _, patch_size, _ = state["patch_embed.proj.weight"].shape
    return ViTConfig(
        image_size=patch_size * math.isqrt(state["pos_embed"].shape[1] - 1),
        patch_size=patch_size,
        width=width,
        depth=depth,
        num_heads=width // VIT_HEAD_DIM,
        mlp_width=len(state["blocks.0.mlp.fc1.weight"]),
    )


def qformer_config(state: StateDict, bert: Path) -> QFormerConfig:
    settings = read_json(bert / "config.json")
    num_embeddings, width = state["Qformer.bert.embeddings.word_embeddings.weight"].shape
    return QFormerConfig(
        width=width,
        depth=settings["num_hidden_layers"],
        num_heads=settings["num_attention_heads"],
        mlp_width=len(state["Qformer.bert.encoder.layer.0.intermediate.dense.weight"]),
        num_queries=state["query_tokens"].shape[1],
        num_embeddings=num_embeddings,
        max_positions=len(state["Qformer.bert.embeddings.position_embeddings.weight"]),
        layer_norm_eps=settings["layer_norm_eps"],
        dropout=settings["hidden_dropout_prob"],
    )


def aggregator_config(state: StateDict) -> AggregatorConfig:
    return AggregatorConfig(
        mlp_width=len(state["fusion_adapter.blocks.0.intermediate.dense.weight"]),
        projector_width=len(state["adapter_proj.0.weight"]),
    )


def t5_config(directory: Path) -> T5Config:
    settings = read_json(directory / "config.json")
    return T5Config(
        width=settings["d_model"],
        head_dim=settings["d_kv"],
        mlp_width=settings["d_ff"],
        num_heads=settings["num_heads"],
        encoder_depth=settings["num_layers"],
        decoder_depth=settings["num_decoder_layers"],
        vocab_size=settings["vocab_size"],
        num_buckets=settings["relative_attention_num_buckets"],
        max_distance=settings.get("relative_attention_max_distance", T5Config.max_distance),
        layer_norm_eps=settings["layer_norm_epsilon"],
        dropout=settings["dropout_rate"],
        pad_token_id=settings["pad_token_id"],
        eos_token_id=settings["eos_token_id"],
        decoder_start_token_id=settings["decoder_start_token_id"],
    )


def soft_prompt_id(directory: Path) -> int:
    path = directory / "tokenizer.json"
    for token in read_json(path)["added_tokens"]:
        if token["content"] == SOFT_PROMPT_TOKEN:
            return token["id"]
    raise ValueError(f"{path}: expected the added token {SOFT_PROMPT_TOKEN}, got none")


def read_json(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8"))


def read_torch(path: Path) -> StateDict:
    """Read a state dict, or the one under "model" in a file that may also hold an optimizer's state."""
    content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    return StateDict(path, content.get("model", content))


def read_safetensors(directory: Path) -> StateDict:
    """Read all tensors of a directory's safetensors files: a length (8 bytes), a JSON header, the tensors' bytes."""
    paths = sorted(directory.glob("*.safetensors"))
    if not paths:
        raise FileNotFoundError(f"{directory}: expected *.safetensors files, got none")
    tensors = {}
    for path in paths:
        data = torch.from_file(str(path), size=path.stat().st_size, dtype=torch.uint8)
        start = 8 + int.from_bytes(bytes(data[:8].tolist()), "little")
        header = json.loads(bytes(data[8:start].tolist()))
        header.pop("__metadata__", None)
        for name, entry in header.items():
            first, last = (start + offset for offset in entry["data_offsets"])
            tensors[name] = data[first:last].view(SAFETENSORS_DTYPES[entry["dtype"]]).reshape(entry["shape"])
    return StateDict(directory, tensors)
