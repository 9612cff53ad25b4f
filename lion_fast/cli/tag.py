"""`lion-fast tag`: list RAM's tags of an image."""

import argparse

from lion_fast.cli import bulk
from lion_fast.cli.arguments import device, expanded, expect_file, expect_model, path
from lion_fast.cli.loading import importing


def add_parsers(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    parser = commands.add_parser("tag", help="list what an image shows", example="photo.jpg --ram ram")
    parser.add_argument(
        "image", type=expanded, metavar="IMAGE", help="image file; with --out also a folder, a glob or a data set"
    )
    parser.add_argument("--ram", type=path, required=True, metavar="DIR", help="directory of a RamTagger")
    parser.add_argument("--device", type=device, help="cpu, cuda, cuda:1 ... (default: a GPU if available)")
    bulk.add_options(parser)
    parser.set_defaults(run=_run)


def _run(args: argparse.Namespace) -> None:
    if args.out is not None:
        bulk.run_bulk(args, args.ram)
        return
    expect_model(args.ram, "--ram", made_by="lion-fast convert --ram")
    expect_file(args.image, "IMAGE")
    with importing():
        from lion_fast.inference.loading import default_device
        from lion_fast.tagging.loading import load_tagger

    print(*load_tagger(args.ram, args.device or default_device())([args.image]))
