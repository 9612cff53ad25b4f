"""The model that a stage of a recipe starts from."""

from pathlib import Path

import torch
from torch import nn

from lion_fast.configuration_lion import LionConfig
from lion_fast.data.seeding import seed_everything
from lion_fast.inference.loading import load_complete, load_config
from lion_fast.io.checkpoints import CheckpointError, naming
from lion_fast.modeling_lion import LionForCausalLM
from lion_fast.processing_lion import LionProcessor
from lion_fast.training.memory import checkpoint_blocks
from lion_fast.training.qformer import load_qformer
from lion_fast.training.recipe import Optimizer, Recipe, RecipeError
from lion_fast.training.stages import (
    carry_over,
    convert_frozen,
    copy_frozen,
    freeze_for_stage,
    parameter_groups,
    stage_of_model,
)


def build_model(recipe: Recipe) -> tuple[LionForCausalLM, LionProcessor]:
    """Build the stage's initial model, with the stage's frozen parameters, and its processor.

    Raises:
        RecipeError: no directory is given, or the dimensions of a model differ from the first model's.
        CheckpointError: a directory cannot be loaded.
    """
    settings, stage = recipe.model, recipe.definition
    sources = [*([settings.frozen_from] if settings.frozen_from else []), *settings.carry_over]
    if not sources:
        raise RecipeError("model: expected a directory in model.frozen_from or model.carry_over, got neither")
    for directory in sources:
        if not Path(directory).is_dir():
            raise CheckpointError(f"{directory}: no such directory")
    with naming(sources[0], "a directory with LION's configuration and processor"):
        config = stage_config(load_config(Path(sources[0])), recipe)
        processor = LionProcessor.from_pretrained(sources[0])
    seed_everything(recipe.seed)
    model = LionForCausalLM(config)
    if settings.qformer_from is not None:
        load_qformer(model, settings.qformer_from)
    for number, directory in enumerate(sources):
        source = load_complete(Path(directory), dtype=torch.float32)
        try:
            if number == 0 and settings.frozen_from:
                copy_frozen(source, model)
            else:
                carry_over(source, stage_of_model(source), model, stage)
        except ValueError as error:
            raise RecipeError(f"model: {directory} does not fit {sources[0]}: {error}") from error
        del source
    freeze_for_stage(model, stage)
    if recipe.precision == "bf16":
        convert_frozen(model, torch.bfloat16)
    if recipe.gradient_checkpointing:
        checkpoint_blocks(model)
    return model, processor


def build_optimizer(model: nn.Module, settings: Optimizer) -> torch.optim.AdamW:
    """Return AdamW with LION's parameter groups for the parameters that require gradients."""
    groups = parameter_groups(
        model, lr=settings.lr, weight_decay=settings.weight_decay, boost_lr_scale=settings.boost_lr_scale
    )
    return torch.optim.AdamW(groups, lr=settings.lr, betas=settings.betas, fused=True)


def stage_config(config: LionConfig, recipe: Recipe) -> LionConfig:
    """Return the configuration of the stage's model, with the dimensions of `config`."""
    stage = recipe.definition
    changed = LionConfig.from_dict(
        {
            **config.to_dict(),
            "visual_input": stage.visual_input,
            "num_adapters": None,
            "kernel_backend": recipe.model.kernel_backend,
        }
    )
    if recipe.model.dropout is not None:
        for part in (changed.qformer_config, changed.aggregator_config, changed.text_config):
            for name in ("dropout_rate", "hidden_dropout_prob", "attention_probs_dropout_prob", "attention_dropout"):
                if hasattr(part, name):
                    setattr(part, name, recipe.model.dropout)
    return changed
