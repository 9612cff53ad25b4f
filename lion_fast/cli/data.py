"""`lion-fast data`: generate, convert, check, tag and pack training data."""

import argparse

from lion_fast.cli.arguments import device, expect_file, path, path_text, positive_int
from lion_fast.cli.loading import importing
from lion_fast.streams import report


def add_parsers(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    parser = commands.add_parser(
        "data", help="generate, convert, check, tag and pack training data", example="check data.jsonl"
    )
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")
    _add_scenes(actions)
    _add_convert(actions)
    check = actions.add_parser("check", help="check every line and every image of a file", example="data.jsonl")
    check.set_defaults(run=_check)
    shards = actions.add_parser(
        "shards", help="pack a file and its images into tar files", example="data.jsonl --out shards"
    )
    shards.add_argument("--out", type=path, required=True, metavar="DIR", help="directory to create")
    shards.add_argument(
        "--shard-mb", type=positive_int, default=512, metavar="N", help="maximum MiB per shard (default: %(default)s)"
    )
    shards.add_argument("--seed", type=int, default=0, help="seed of the order (default: %(default)s)")
    shards.set_defaults(run=_shards)
    tag = actions.add_parser(
        "tag", help="add tags to the records of a file", example="data.jsonl --ram ram --out tagged.jsonl"
    )
    tag.add_argument("--ram", type=path, required=True, metavar="DIR", help="directory of a RamTagger")
    tag.add_argument("--out", type=path, required=True, metavar="JSONL", help="file to write")
    tag.add_argument("--batch-size", type=positive_int, default=32, metavar="N", help="default: %(default)s")
    tag.add_argument("--device", type=device, help="cpu, cuda, cuda:1 ... (default: a GPU if available)")
    tag.set_defaults(run=_tag)
    for action in (check, shards, tag):
        action.add_argument("file", type=path_text, metavar="JSONL", help="training data file")
        action.add_argument(
            "--image-root", type=path, metavar="DIR", help="root of the images (default: the file's folder)"
        )
        _add_skip_bad(action, "unusable lines and images")
    _add_overwrite(tag)


def _add_scenes(actions: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    parser = actions.add_parser(
        "scenes", help="generate scenes, to try training without a download", example="--count 100 --out scenes"
    )
    parser.add_argument("--count", type=positive_int, required=True, metavar="N", help="number of scenes")
    parser.add_argument("--seed", type=int, default=0, help="seed of the scenes (default: %(default)s)")
    parser.add_argument(
        "--image-size",
        type=positive_int,
        default=96,
        metavar="N",
        help="width and height in pixels (default: %(default)s)",
    )
    parser.add_argument("--kinds", nargs="+", metavar="KIND", help="caption, vqa, rec, reg (default: all)")
    parser.add_argument("--out", type=path, required=True, metavar="DIR", help="directory to write to")
    _add_overwrite(parser)
    parser.set_defaults(run=_scenes)


def _add_convert(actions: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    from lion_fast.data.converters import FORMATS

    listing = "\n".join(f"  {name:14} {known.description}: {' '.join(known.files)}" for name, known in FORMATS.items())
    parser = actions.add_parser(
        "convert",
        help="convert a public dataset's annotations",
        example="coco-captions captions_train2017.json --out data.jsonl",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description=f"Convert a public dataset's annotations. Formats and their files:\n{listing}",
    )
    parser.add_argument("format", choices=FORMATS, metavar="FORMAT")
    parser.add_argument(
        "files", type=path_text, nargs="+", metavar="FILE", help="the format's files, in the order above"
    )
    parser.add_argument("--out", type=path, required=True, metavar="JSONL", help="file to write")
    parser.add_argument("--images", type=path_text, metavar="DIR", help="folder to prepend to image names")
    parser.add_argument("--image-name", metavar="TEMPLATE", help="e.g. '{image_id:012d}.jpg' (default: the format's)")
    parser.add_argument("--split", action="append", default=[], help="split to convert; can be repeated (default: all)")
    parser.add_argument(
        "--kinds", nargs="+", default=[], metavar="KIND", help="kinds of region samples: rec, reg (default: both)"
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of the choice of instructions (default: %(default)s)")
    _add_skip_bad(parser, "invalid entries")
    _add_overwrite(parser)
    parser.set_defaults(run=_convert)


def _add_skip_bad(parser: argparse.ArgumentParser, what: str) -> None:
    parser.add_argument("--skip-bad", action="store_true", help=f"skip and count {what} instead of stopping")


def _add_overwrite(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--overwrite", action="store_true", help="replace what exists at --out instead of refusing it")


def _scenes(args: argparse.Namespace) -> None:
    from lion_fast.scenes import write_scenes

    options = {"image_size": args.image_size, "kinds": args.kinds, "overwrite": args.overwrite}
    print(write_scenes(args.out, args.count, args.seed, **options))


def _convert(args: argparse.Namespace) -> None:
    from lion_fast.data import Conversion, write_jsonl
    from lion_fast.io.owning import expect_other

    conversion = Conversion(
        args.format,
        args.files,
        images=args.images or "",
        image_name=args.image_name,
        splits=args.split,
        kinds=args.kinds,
        strict=not args.skip_bad,
        seed=args.seed,
    )
    expect_other(args.out, conversion.files, "--out")
    count = write_jsonl(conversion, args.out, overwrite=args.overwrite)
    report(args.out, f"{count} samples; skipped {conversion.num_bad} invalid entries")


def _check(args: argparse.Namespace) -> None:
    from lion_fast.tasks import TASKS

    dataset = _open(args)
    for index in range(len(dataset)):
        dataset[index]
    counts = [int((dataset.tasks == task).sum()) for task in range(len(TASKS))]
    print(
        f"{args.file}: {len(dataset)} samples, "
        + ", ".join(f"{count} {name}" for name, count in zip(TASKS, counts, strict=True))
        + f"; {dataset.num_bad_lines} invalid lines, {dataset.num_bad_images} samples with a bad image"
    )


def _shards(args: argparse.Namespace) -> None:
    dataset = _open(args)
    from lion_fast.data import ShardDataset, write_shards

    shards = write_shards(dataset, args.out, shard_bytes=args.shard_mb << 20, seed=args.seed)
    written = len(ShardDataset(args.out))
    report(
        args.out,
        f"{written} samples in {len(shards)} shards; skipped {dataset.num_bad_lines} invalid lines and "
        f"{len(dataset) - written} samples with a bad image",
    )


def _tag(args: argparse.Namespace) -> None:
    from lion_fast.io.owning import expect_free

    expect_free(args.out, "--out", overwrite=args.overwrite)  # before the tagger, which takes long to load
    expect_file(args.file, "JSONL")
    with importing():
        from lion_fast.data import add_tags
        from lion_fast.inference.loading import default_device
        from lion_fast.tagging.loading import load_tagger

    tagger = load_tagger(args.ram, args.device or default_device())
    dataset = _open(args)
    options = {"batch_size": args.batch_size, "overwrite": args.overwrite}
    tagged, bad = add_tags(dataset, args.out, tagger, **options)
    report(args.out, f"tagged {tagged} images; skipped {dataset.num_bad_lines} invalid lines and {bad} bad images")


def _open(args: argparse.Namespace):
    expect_file(args.file, "JSONL")
    from lion_fast.data import JsonlDataset

    return JsonlDataset(args.file, args.image_root, strict=not args.skip_bad)
