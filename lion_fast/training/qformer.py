"""Initialisation of the Q-Former from BLIP-2's first stage or InstructBLIP, in the format of LAVIS or transformers."""

from pathlib import Path

import torch

from lion_fast.conversion.lion import original_name
from lion_fast.io.checkpoints import CheckpointError, read_tensors, scan
from lion_fast.modeling_lion import LionForCausalLM

_PARTS = ("query_tokens", "vision_layernorm", "qformer", "qformer_projection")
_IN_TRANSFORMERS = {"vision_layernorm": "vision_model.post_layernorm", "qformer_projection": "language_projection"}


@torch.no_grad()
def load_qformer(model: LionForCausalLM, path: str | Path) -> list[str]:
    """Copy queries, norm, Q-Former and, if its shape matches, the projection into a model with a Q-Former.

    The projection is not changed if the file has none, such as BLIP-2's first stage, or one for another language model.

    Args:
        model: model to write to; its parameters keep their dtype.
        path: file of LAVIS (`blip2_pretrained.pth`, `instruct_blip_flanxl_trimmed.pth`: names such as
            `Qformer.bert.*`), or file or directory of transformers' InstructBLIP (`qformer.*`).

    Returns:
        Names of the parameters that were written.

    Raises:
        ValueError: the model has no Q-Former.
        CheckpointError: the file cannot be read, has no Q-Former, lacks tensors of it, or has tensors of other shapes.
    """
    if model.config.visual_input == "AGGREGATOR":
        raise ValueError("model: expected one with a Q-Former, got visual_input 'AGGREGATOR'")
    tensors = scan(path)
    if "query_tokens" not in tensors:
        raise CheckpointError(f"{path}: expected a Q-Former, got no tensor query_tokens among {len(tensors)}")
    names_of = original_name if any(name.startswith("Qformer.") for name in tensors) else _name_in_transformers
    parameters = {name: p for name, p in model.named_parameters() if name.split(".", 1)[0] in _PARTS}
    found = {name: tensors[names_of(name)] for name in parameters if names_of(name) in tensors}
    projection = {name for name in parameters if name.startswith("qformer_projection.")}
    if not all(name in found and found[name].shape == tuple(parameters[name].shape) for name in projection):
        found = {name: info for name, info in found.items() if name not in projection}
    wanted = [name for name in parameters if name not in projection]
    missing = [names_of(name) for name in wanted if name not in found]
    if missing:
        raise CheckpointError(
            f"{path}: lacks {len(missing)} tensors of the Q-Former, such as {missing[0]}; BLIP-2's second stage lacks "
            "the layers that read questions, use its first stage or InstructBLIP"
        )
    for name, info in found.items():
        if info.shape != tuple(parameters[name].shape):
            raise CheckpointError(
                f"{path}: {info.name}: expected {list(parameters[name].shape)}, got {list(info.shape)}"
            )
    for name, value in read_tensors(found):
        model.get_parameter(name).copy_(value)
    return list(found)


def _name_in_transformers(name: str) -> str:
    part, _, rest = name.partition(".")
    return f"{_IN_TRANSFORMERS.get(part, part)}.{rest}" if rest else name
