"""`lion-fast memory`: estimate the memory of a training stage without allocating it."""

import argparse
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from lion_fast.cli.arguments import path, positive_int
from lion_fast.cli.loading import importing
from lion_fast.training.definitions import STAGE_NUMBERS

if TYPE_CHECKING:
    from lion_fast.training.recipe import Recipe

_SIZES = ("xl", "xxl")


def add_parsers(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    parser = commands.add_parser(
        "memory",
        help="estimate the memory of a training stage",
        example="--size xl",
        description=(
            "Estimate the memory of weights, gradients, optimizer and saved activations of a stage, with and without "
            "kernels and gradient checkpointing, without allocating it. The settings are those of lion-fast train."
        ),
    )
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="e.g. batch.per_process=64")
    parser.add_argument("--stage", type=int, default=4, choices=STAGE_NUMBERS, help="default: %(default)s")
    parser.add_argument("--config", type=path, metavar="YAML", help="settings that override the stage's recipe")
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--model", type=path, metavar="DIR", help="checkpoint (default: the recipe's)")
    which.add_argument("--size", choices=_SIZES, help="LION-FlanT5-XL or -XXL as published; needs no files")
    parser.add_argument("--text-tokens", type=positive_int, default=128, metavar="N", help="default: %(default)s")
    parser.add_argument("--question-tokens", type=positive_int, default=128, metavar="N", help="default: %(default)s")
    parser.add_argument("--answer-tokens", type=positive_int, default=128, metavar="N", help="default: %(default)s")
    parser.add_argument(
        "--processes", type=positive_int, default=1, metavar="N", help="processes that parallel=fsdp shards over"
    )
    parser.set_defaults(run=_run)


def _run(args: argparse.Namespace) -> int:
    from lion_fast.training.recipe import load_recipe

    recipe = load_recipe(args.stage, args.config, args.overrides)
    directory = None if args.size else _directory(args, recipe)
    from lion_fast.cli.processes import kernels_can_be, run_again

    with importing():
        interprets = kernels_can_be(interpreted=True)  # the fake tensors are on the CPU
        from lion_kernels import HAS_TRITON

    if HAS_TRITON and not interprets:
        return run_again(args, interpret=True)

    with importing():
        from lion_fast.configuration_lion import FLAN_T5_XL, FLAN_T5_XXL, LionConfig
        from lion_fast.inference.loading import load_config
        from lion_fast.training.building import stage_config
        from lion_fast.training.memory import Shapes, as_table, estimates

    if directory is None:
        text = {"xl": FLAN_T5_XL, "xxl": FLAN_T5_XXL}[args.size]
        config, name = LionConfig(text_config=text), f"LION-FlanT5-{args.size.upper()}"
    else:
        config, name = load_config(directory), str(directory)
    shapes = Shapes(recipe.batch.per_process, args.text_tokens, args.question_tokens, args.answer_tokens)
    columns = {}
    for backend, label in (("torch", "PyTorch"), *([("triton", "kernels")] if HAS_TRITON else [])):
        settings = replace(recipe, model=replace(recipe.model, kernel_backend=backend))
        columns[label], columns[f"{label}, checkpointed"] = estimates(
            stage_config(config, settings),
            recipe.definition,
            shapes,
            precision=recipe.precision,
            shards=args.processes if recipe.parallel == "fsdp" else 1,
        )
    print(
        f"{name}, stage {recipe.stage}, {recipe.precision}, {shapes.batch_size} samples a device, "
        f"{shapes.text_tokens} tokens of text, {shapes.answer_tokens} of answers"
    )
    print(as_table(columns))
    print("not counted: temporary memory of operators, gradients of activations, unused memory of the allocator")
    return 0


def _directory(args: argparse.Namespace, recipe: "Recipe") -> Path:
    """Return the directory whose configuration is estimated, before anything is imported that takes long."""
    directory = args.model or next(iter([recipe.model.frozen_from, *recipe.model.carry_over][::-1]), None)
    if directory is None or not (Path(directory) / "config.json").is_file():
        raise ValueError(
            f"model: expected --size, or a LION directory in --model or the recipe, got {directory or 'neither'} "
            "(for example: lion-fast memory --size xl)"
        )
    return Path(directory)
