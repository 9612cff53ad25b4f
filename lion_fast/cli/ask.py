"""`lion-fast caption`, `ask` and `locate`: for one image, or for many with `--out`."""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from lion_fast.cli import bulk
from lion_fast.cli.arguments import device, expanded, expect_file, expect_model, path, positive_int
from lion_fast.cli.loading import importing
from lion_fast.model.prompts import CAPTION_INSTRUCTION, LOCATE_INSTRUCTION

if TYPE_CHECKING:
    from PIL.Image import Image

    from lion_fast.inference.pipeline import LionAnswer

DEFAULT_MODEL = Path("runs/quickstart/checkpoint")


def add_parsers(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    caption = commands.add_parser("caption", help="describe an image in one sentence", example="photo.jpg")
    ask = commands.add_parser(
        "ask", help="answer a question about an image", example="photo.jpg 'What is on the cart?'"
    )
    locate = commands.add_parser(
        "locate", help="locate an object and draw a box around it", example="photo.jpg 'the red circle'"
    )
    for parser in (caption, ask, locate):
        parser.add_argument(
            "image", type=expanded, metavar="IMAGE", help="image file; with --out also a folder, a glob or a data set"
        )
        parser.add_argument(
            "--model", type=path, default=DEFAULT_MODEL, metavar="DIR", help="checkpoint (default: %(default)s)"
        )
        parser.add_argument("--tags", help='what the image may show, e.g. "dog, cart, man"')
        parser.add_argument(
            "--num-beams", type=positive_int, metavar="N", help="number of beams (default: the checkpoint's)"
        )
        parser.add_argument(
            "--max-new-tokens",
            type=positive_int,
            metavar="N",
            help="maximum number of new tokens (default: the checkpoint's)",
        )
        parser.add_argument("--device", type=device, help="cpu, cuda, cuda:1 ... (default: a GPU if available)")
        bulk.add_options(parser)
    column = "optional with --out if the input has it"
    ask.add_argument("question", metavar="QUESTION", nargs="?", help=column)
    locate.add_argument(
        "expression", metavar="EXPRESSION", nargs="?", help=f'what to locate, e.g. "the red circle"; {column}'
    )
    locate.add_argument(
        "--output",
        type=path,
        metavar="IMAGE",
        help="image to write, in the format of its suffix (default: the input's name with .located.png); with the "
        "same name, a new drawing replaces an earlier one in PNG",
    )
    caption.set_defaults(run=_caption)
    ask.set_defaults(run=_ask)
    locate.set_defaults(run=_locate)


def _caption(args: argparse.Namespace) -> None:
    if args.out is not None:
        return bulk.run_bulk(args, args.model)
    print(_answer(args, CAPTION_INSTRUCTION, "image_level")[1].text)


def _ask(args: argparse.Namespace) -> None:
    if args.out is not None:
        return bulk.run_bulk(args, args.model, text=args.question)
    _expect_text(args.question, "QUESTION")
    print(_answer(args, args.question, "image_level")[1].text)


def _expect_text(text: str | None, name: str) -> None:
    if text is None or not text.strip():
        raise ValueError(f"{name}: expected text, got {'none' if text is None else repr(text)}")


def _locate(args: argparse.Namespace) -> None:
    if args.out is not None:
        if args.output is not None:
            raise ValueError("--output: expected no image with --out, got one")
        return bulk.run_bulk(args, args.model, text=args.expression)
    _expect_text(args.expression, "EXPRESSION")
    from lion_fast.io.boxes import draw_boxes
    from lion_fast.io.drawings import expect_drawing, save_drawing

    output = args.output or Path(f"{Path(args.image).stem}.located.png")
    expect_drawing(output, args.image, overwrite=args.overwrite)
    image, answer = _answer(args, LOCATE_INSTRUCTION.format(expression=args.expression), "region_level")
    print(answer.text)
    if not answer.boxes:
        raise ValueError(f"the model's answer holds no box: {answer.text!r}")
    save_drawing(draw_boxes(image, answer.boxes, labels=[args.expression] * len(answer.boxes)), output)
    print(f"box in pixels: {[round(x) for x in answer.boxes[0]]}, drawn in {output}")


def _answer(args: argparse.Namespace, question: str, task: str) -> "tuple[Image, LionAnswer]":
    """Return the upright image and the model's answer."""
    expect_model(args.model, "--model")
    if args.image:
        expect_file(args.image, "IMAGE")
    with importing():
        from lion_fast.inference.pipeline import LionPipeline
        from lion_fast.io.images import load_image

    image = load_image(args.image, "images")  # before the model, which takes longer to load
    limits = {"num_beams": args.num_beams, "max_new_tokens": args.max_new_tokens}
    given = {name: value for name, value in limits.items() if value is not None}
    return image, LionPipeline(args.model, device=args.device)(image, question, task, args.tags, **given)
