"""LION's training stages: the parameters and tasks of each, and the parameters carried over between stages.

Stage 1 trains the image-level path and stage 2 the region-level path, each with one adapter. Stage 3 trains both paths
jointly, with both adapters and routers (paper, section 3.4). Stage 4, the published joint training, starts from stage
3. The vision tower and the language model's own weights are frozen in all stages.
"""

from typing import Any

import torch
from torch import nn

from lion_fast.modeling_lion import LionForCausalLM
from lion_fast.training.definitions import STAGES, Stage, stage_of

__all__ = [
    "STAGES",
    "Stage",
    "carry_over",
    "convert_frozen",
    "copy_frozen",
    "freeze_for_stage",
    "parameter_groups",
    "stage_of",
    "stage_of_model",
    "trained_parameters",
]

_ADAPTER = ".adapter."
_SINGLE_ADAPTER = ".adapter.adapters.0."


def stage_of_model(model: LionForCausalLM) -> Stage:
    """Return the first stage whose models have the `visual_input` of `model`."""
    return next(stage for stage in STAGES if stage.visual_input == model.config.visual_input)


def freeze_for_stage(model: LionForCausalLM, stage: Stage) -> list[str]:
    """Freeze every parameter that `stage` does not train, and return the names of the trained parameters.

    Raises:
        ValueError: the model's `visual_input` differs from the stage's.
    """
    _expect_visual_input("model", model, stage)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(stage.trains(name))
    return [name for name, _ in trained_parameters(model)]


def convert_frozen(model: nn.Module, dtype: torch.dtype) -> None:
    """Convert the parameters that do not require gradients to `dtype`, in place."""
    for parameter in model.parameters():
        if not parameter.requires_grad:
            parameter.data = parameter.data.to(dtype)


@torch.no_grad()
def carry_over(source: LionForCausalLM, source_stage: Stage, target: LionForCausalLM, target_stage: Stage) -> list[str]:
    """Copy the parameters that `source` shares with the model of a later stage, including frozen ones.

    In a joint stage, the single adapters of stage 1 become adapter 1 and those of stage 2 adapter 0. Between joint
    stages, adapters and routers are copied unchanged. Stages 1 and 2 take over adapters of the same stage only, because
    those of other stages belong to other tasks. Every stage trains the soft prompt; the last copy is kept.

    Returns:
        Names of the target's parameters that were written.

    Raises:
        ValueError: a model's `visual_input` differs from its stage's, or a parameter has another shape in the target.
    """
    _expect_visual_input("source", source, source_stage)
    _expect_visual_input("target", target, target_stage)
    joins = target_stage.adapter_in_joint is None and source_stage.adapter_in_joint is not None
    moves_adapters = joins or source_stage.adapter_in_joint == target_stage.adapter_in_joint
    parameters = dict(target.named_parameters())
    written = []
    for name, value in source.named_parameters():
        if _ADAPTER in name and not moves_adapters:
            continue
        if joins:
            name = name.replace(_SINGLE_ADAPTER, f".adapter.adapters.{source_stage.adapter_in_joint}.")
        if name not in parameters:
            continue
        if parameters[name].shape != value.shape:
            raise ValueError(f"{name}: expected {list(parameters[name].shape)} (target), got {list(value.shape)}")
        parameters[name].copy_(value)
        written.append(name)
    return written


@torch.no_grad()
def copy_frozen(source: LionForCausalLM, target: LionForCausalLM, prefix: str = "") -> None:
    """Copy the parameters that no stage trains: the vision tower and the language model's own weights.

    Args:
        prefix: copy only parameters whose names start with it.

    Raises:
        ValueError: a parameter has another shape in the target.
    """
    parameters = dict(target.named_parameters())
    for name, value in source.named_parameters():
        if name.startswith(prefix) and not any(stage.trains(name) for stage in STAGES):
            if parameters[name].shape != value.shape:
                raise ValueError(f"{name}: expected {list(parameters[name].shape)} (target), got {list(value.shape)}")
            parameters[name].copy_(value)


def parameter_groups(
    model: nn.Module, *, lr: float, weight_decay: float = 0.05, boost_lr_scale: float = 1.0
) -> list[dict[str, Any]]:
    """Return AdamW's parameter groups: no decay on vectors, biases and norms; the aggregator's learning rate scaled.

    Args:
        model: model whose parameters that require gradients are grouped.
        lr: learning rate.
        weight_decay: weight decay of matrices.
        boost_lr_scale: factor on the aggregator's learning rate (not on its projection's, as in the original).

    Returns:
        Up to four groups with keys `name`, `params`, `lr` and `weight_decay`; empty groups are omitted.
    """
    norms = [module for module in model.modules() if "norm" in type(module).__name__.lower()]
    of_norms = {id(p) for norm in norms for p in norm.parameters(recurse=False)}
    groups = {
        f"{part}_{kind}": {
            "params": [],
            "lr": lr * (boost_lr_scale if part == "aggregator" else 1.0),
            "weight_decay": weight_decay if kind == "decay" else 0.0,
        }
        for part in ("base", "aggregator")
        for kind in ("decay", "no_decay")
    }
    for name, parameter in trained_parameters(model):
        plain = parameter.ndim < 2 or name.endswith("bias") or id(parameter) in of_norms
        part = "aggregator" if name.startswith("aggregator.") else "base"
        groups[f"{part}_{'no_decay' if plain else 'decay'}"]["params"].append(parameter)
    return [{"name": name, **group} for name, group in groups.items() if group["params"]]


def trained_parameters(model: nn.Module) -> list[tuple[str, nn.Parameter]]:
    """Return names and parameters that require gradients."""
    return [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]


def _expect_visual_input(argument: str, model: LionForCausalLM, stage: Stage) -> None:
    if model.config.visual_input != stage.visual_input:
        raise ValueError(
            f"{argument}: expected a model with visual_input {stage.visual_input!r} (stage {stage.number}), "
            f"got {model.config.visual_input!r}"
        )
