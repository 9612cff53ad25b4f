"""`lion-fast train`: train one stage of LION with a recipe."""

import argparse

from lion_fast.cli.arguments import add_resuming, path
from lion_fast.cli.loading import importing
from lion_fast.training.definitions import STAGE_NUMBERS


def add_parsers(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    parser = commands.add_parser(
        "train",
        help="train one stage on your data",
        example="--stage 1 --config recipe.yaml",
        description="Train one stage. --config overrides the stage's recipe, and KEY=VALUE overrides both.",
    )
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="e.g. optimizer.lr=3e-5 batch.size=128")
    parser.add_argument("--stage", type=int, required=True, choices=STAGE_NUMBERS)
    parser.add_argument("--config", type=path, metavar="YAML", help="settings that override the stage's recipe")
    add_resuming(parser)
    parser.add_argument("--print-recipe", action="store_true", help="print the stage's commented recipe and exit")
    parser.set_defaults(run=_run)


def _run(args: argparse.Namespace) -> None:
    from lion_fast.extras import require
    from lion_fast.training.recipe import load_recipe, shipped_recipe

    if args.print_recipe:
        print(shipped_recipe(args.stage), end="")
        return
    recipe = load_recipe(args.stage, args.config, args.overrides)
    recipe.check_sources()
    require("train", "accelerate", "tensorboard")
    with importing():
        from lion_fast.training.run import train

    trainer = train(recipe, resume=args.resume, allow_changed_data=args.allow_changed_data)
    if trainer.is_world_process_zero():
        print(f"written to {recipe.output_dir}: model/ loads with LionForCausalLM.from_pretrained")
