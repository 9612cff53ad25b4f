"""`lion-fast convert`: convert the original checkpoints to a directory for `from_pretrained`."""

import argparse

from lion_fast.cli.arguments import expect_file, path_text


def add_parsers(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    parser = commands.add_parser(
        "convert",
        help="convert the published checkpoints",
        example="--vit eva_vit_g.pth --llm flan-t5-xl --bert bert-base-uncased --lion LION-FlanT5-XL.pth --out lion-xl",
        description="Convert the published checkpoints to a directory that LionForCausalLM.from_pretrained loads.",
    )
    parser.add_argument("--vit", type=path_text, required=True, metavar="PTH", help="EVA's vision tower, eva_vit_g.pth")
    parser.add_argument("--llm", type=path_text, required=True, metavar="DIR", help="Flan-T5's directory")
    parser.add_argument("--bert", type=path_text, required=True, metavar="DIR", help="bert-base-uncased's directory")
    parser.add_argument(
        "--lion", type=path_text, required=True, metavar="PTH", help="LION's trained parameters, LION-FlanT5-XL.pth"
    )
    parser.add_argument(
        "--ram", type=path_text, metavar="PTH", help="RAM's tagger, ram_swin_large_14m.pth; also needs the next two"
    )
    parser.add_argument("--ram-tags", type=path_text, metavar="TXT", help="RAM's list of tags, one per line")
    parser.add_argument(
        "--ram-thresholds", type=path_text, metavar="TXT", help="RAM's threshold of each tag, one per line"
    )
    parser.add_argument("--out", type=path_text, required=True, metavar="DIR", help="directory to create")
    parser.set_defaults(run=_run)


def _run(args: argparse.Namespace) -> None:
    for name in ("vit", "lion", "ram", "ram_tags", "ram_thresholds"):
        if getattr(args, name) is not None:
            expect_file(getattr(args, name), f"--{name.replace('_', '-')}")
    from lion_fast.conversion.lion import convert_checkpoint

    report = convert_checkpoint(
        args.vit,
        args.llm,
        args.bert,
        args.lion,
        args.out,
        ram=args.ram,
        ram_tags=args.ram_tags,
        ram_thresholds=args.ram_thresholds,
    )
    print(report)
