"""LION's training stages as data: what each trains, on which tasks, and how parameters move on.

Stage 1 trains the image-level path, stage 2 the region-level path, each with one adapter; stage 3 joins them with both
adapters and routers (paper, section 3.4); stage 4, the joint training that is published, goes on from there. The vision
tower and the language model's own weights never move.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from lion_fast.configuration_lion import TASKS
from lion_fast.modeling_lion import LionForCausalLM

_IMAGE_PATH = ("vision_layernorm", "query_tokens", "qformer", "qformer_projection")
_REGION_PATH = ("aggregator", "aggregator_layernorm", "aggregator_projection")
_ADAPTER = ".adapter."
_SINGLE_ADAPTER = ".adapter.adapters.0."


@dataclass(frozen=True)
class Stage:
    """One stage.

    Args:
        number: 1, 2, 3 or 4.
        name: `image_level`, `region_level`, `joint` or `joint_published`.
        visual_input: `LionConfig.visual_input` of the stage's model.
        modules: parts of the model that are trained beside adapters, routers and soft prompt.
        tasks: names of the tasks, in equal shares.
        adapter_in_joint: which adapter of a joint stage this stage's single adapter becomes; None in a joint stage.
    """

    number: int
    name: str
    visual_input: str
    modules: tuple[str, ...]
    tasks: tuple[str, ...]
    adapter_in_joint: int | None = None

    def trains(self, parameter_name: str) -> bool:
        """Whether the stage trains the parameter of that name in `LionForCausalLM`."""
        part = parameter_name.split(".", 1)[0]
        return part in self.modules or part == "soft_prompt" or _ADAPTER in parameter_name


STAGES = (
    Stage(1, "image_level", "QFORMER", _IMAGE_PATH, ("image_level",), TASKS.index("image_level")),
    Stage(2, "region_level", "AGGREGATOR", _REGION_PATH, ("region_level",), TASKS.index("region_level")),
    Stage(3, "joint", "ALL", _IMAGE_PATH + _REGION_PATH, ("image_level", "region_level")),
    Stage(4, "joint_published", "ALL", _IMAGE_PATH + _REGION_PATH, ("image_level", "region_level")),
)


def stage_of(number: int) -> Stage:
    """The stage of that number.

    Raises:
        ValueError: there is none.
    """
    for stage in STAGES:
        if stage.number == number:
            return stage
    raise ValueError(f"stage: expected one of {', '.join(str(stage.number) for stage in STAGES)}, got {number!r}")


def stage_of_model(model: LionForCausalLM) -> Stage:
    """The first stage whose models read the visual tokens that `model` reads."""
    return next(stage for stage in STAGES if stage.visual_input == model.config.visual_input)


def freeze_for_stage(model: LionForCausalLM, stage: Stage) -> list[str]:
    """Leave gradients on for what `stage` trains and off for all else; the names of the trained parameters.

    Raises:
        ValueError: the model's `visual_input` is not the stage's.
    """
    _expect_visual_input("model", model, stage)
    trained = []
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(stage.trains(name))
        if parameter.requires_grad:
            trained.append(name)
    return trained


@torch.no_grad()
def carry_over(source: LionForCausalLM, source_stage: Stage, target: LionForCausalLM, target_stage: Stage) -> list[str]:
    """Copy into the model of a later stage all that it shares with `source`, frozen parts included.

    Into a joint stage the single adapters of stage 1 become adapter 1, those of stage 2 adapter 0; between joint stages
    adapters and routers go on as they are. Into stage 1 or 2 they stay behind, unless the stage is the same: they
    belong to other tasks. Both stages train the soft prompt; the last one copied stays.

    Returns:
        Names of the target's parameters that were written.

    Raises:
        ValueError: a model's `visual_input` is not its stage's, or a parameter has another shape in the target.
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
    """Copy what no stage trains: the vision tower and the language model's own weights.

    Args:
        prefix: only parameters whose names begin with it.

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
    """AdamW's parameter groups: no decay on vectors, biases and norms; the aggregator's learning rate scaled.

    Args:
        model: only parameters that require gradients are listed.
        lr: learning rate.
        weight_decay: of matrices.
        boost_lr_scale: factor on the aggregator's learning rate (not on its projection's, as in the original).

    Returns:
        Up to four groups with keys `name`, `params`, `lr` and `weight_decay`; empty ones are left out.
    """
    norms = {id(p) for module in model.modules() if _is_norm(module) for p in module.parameters(recurse=False)}
    groups = {
        f"{part}_{kind}": {
            "params": [],
            "lr": lr * (boost_lr_scale if part == "aggregator" else 1.0),
            "weight_decay": weight_decay if kind == "decay" else 0.0,
        }
        for part in ("base", "aggregator")
        for kind in ("decay", "no_decay")
    }
    for name, parameter in _trained(model):
        plain = parameter.ndim < 2 or name.endswith("bias") or id(parameter) in norms
        part = "aggregator" if name.startswith("aggregator.") else "base"
        groups[f"{part}_{'no_decay' if plain else 'decay'}"]["params"].append(parameter)
    return [{"name": name, **group} for name, group in groups.items() if group["params"]]


def _trained(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    return ((name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad)


def _is_norm(module: nn.Module) -> bool:
    return "norm" in type(module).__name__.lower()


def _expect_visual_input(argument: str, model: LionForCausalLM, stage: Stage) -> None:
    if model.config.visual_input != stage.visual_input:
        raise ValueError(
            f"{argument}: expected a model with visual_input {stage.visual_input!r} (stage {stage.number}), "
            f"got {model.config.visual_input!r}"
        )
