"""`lion-fast caption`, `ask` and `locate`: one picture and one question, or as many as there are."""

import argparse
from pathlib import Path

from lion_fast.cli import bulk
from lion_fast.cli.arguments import device, positive_int
from lion_fast.model.prompts import CAPTION_INSTRUCTION, LOCATE_INSTRUCTION

DEFAULT_MODEL = Path("runs/quickstart/checkpoint")


def add_parsers(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    caption = commands.add_parser("caption", help="describe an image in one sentence")
    ask = commands.add_parser("ask", help="answer a question about an image")
    locate = commands.add_parser("locate", help="locate an object and draw a box around it")
    for parser in (caption, ask, locate):
        parser.add_argument("image", metavar="IMAGE", help="image file; with --out also a folder, a glob or a data set")
        parser.add_argument(
            "--model", type=Path, default=DEFAULT_MODEL, metavar="DIR", help="checkpoint (default: %(default)s)"
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
        "--output", type=Path, metavar="PNG", help="image to write (default: IMAGE's name with .located.png)"
    )
    caption.set_defaults(run=_caption)
    ask.set_defaults(run=_ask)
    locate.set_defaults(run=_locate)


def _caption(args: argparse.Namespace) -> None:
    if args.out is not None:
        return bulk.run_bulk(args, args.model)
    print(_answer(args, CAPTION_INSTRUCTION, "image_level"))


def _ask(args: argparse.Namespace) -> None:
    if args.out is not None:
        return bulk.run_bulk(args, args.model, text=args.question)
    _expect_text(args.question, "QUESTION")
    print(_answer(args, args.question, "image_level"))


def _expect_text(text: str | None, name: str) -> None:
    if text is None:
        raise ValueError(f"{name}: expected one for the picture, got none")


def _locate(args: argparse.Namespace) -> None:
    if args.out is not None:
        if args.output is not None:
            raise ValueError("--output: expected no picture to draw on beside --out, got one")
        return bulk.run_bulk(args, args.model, text=args.expression)
    _expect_text(args.expression, "EXPRESSION")
    from lion_fast.io.boxes import draw_boxes, parse_boxes
    from lion_fast.io.images import load_image

    image = load_image(args.image)
    output = args.output or Path(Path(args.image).with_suffix(".located.png").name)
    answer = _answer(args, LOCATE_INSTRUCTION.format(expression=args.expression), "region_level")
    print(answer)
    boxes = parse_boxes(answer, image.size)
    if not boxes:
        raise ValueError(f"the model's answer holds no box: {answer!r}")
    draw_boxes(image, boxes, labels=[args.expression] * len(boxes)).save(output)
    print(f"box in pixels: {[round(x) for x in boxes[0]]}, drawn in {output}")


def _answer(args: argparse.Namespace, question: str, task: str) -> str:
    from lion_fast.inference.loading import compute_dtype, default_device, load_complete
    from lion_fast.io.checkpoints import naming
    from lion_fast.processing_lion import LionProcessor

    if not args.model.is_dir():
        raise ValueError(f"--model: no directory {args.model}; make one with lion-fast quickstart or lion-fast convert")
    device = args.device or default_device()
    with naming(args.model, "a directory with LION's processor"):
        processor = LionProcessor.from_pretrained(args.model)
    batch = processor(images=args.image, text=question, tags=args.tags, task=task, return_tensors="pt")
    model = load_complete(args.model, compute_dtype(device)).to(device)
    limits = {"num_beams": args.num_beams, "max_new_tokens": args.max_new_tokens}
    ids = model.generate(**batch.to(device), **{name: value for name, value in limits.items() if value is not None})
    return processor.batch_decode(ids, skip_special_tokens=True)[0].strip()
