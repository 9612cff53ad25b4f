"""Bulk options of `lion-fast caption`, `ask`, `locate` and `tag`."""

import argparse
import os
from pathlib import Path

from lion_fast.cli.arguments import path_text, positive_int
from lion_fast.cli.loading import importing
from lion_fast.streams import report


def add_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("bulk jobs", "with --out, IMAGE may be any input that docs/bulk.md describes")
    group.add_argument(
        "--out",
        type=path_text,
        metavar="FILE",
        help="write a row per image to FILE.jsonl or to the folder FILE.parquet, or resume it",
    )
    group.add_argument("--batch-size", type=positive_int, default=32, metavar="N", help="default: %(default)s")
    group.add_argument("--workers", type=int, metavar="N", help="decoding processes (default: number of cores - 1)")
    group.add_argument(
        "--column",
        action="append",
        default=[],
        metavar="ROLE=NAME",
        help="field of the table, e.g. id=question_id",
    )
    group.add_argument(
        "--image-root", type=path_text, metavar="DIR", help="root of the paths in a table (default: its folder)"
    )
    group.add_argument(
        "--overwrite",
        action="store_true",
        help="replace an output that is not this job's; its own is always resumed",
    )
    group.add_argument("--strict", action="store_true", help="stop at the first unusable image")
    group.add_argument(
        "--ray-workers", type=positive_int, metavar="N", help="run on Ray with N models, each on a GPU if there are any"
    )


def run_bulk(args: argparse.Namespace, model: Path, *, text: str | None = None) -> None:
    """Run the command on all images of `args.image`, and print the numbers of rows and errors."""
    from lion_fast.inference.bulk.job import BulkJob

    columns = dict(part.partition("=")[::2] for part in args.column)
    if any("=" not in part for part in args.column):
        raise ValueError(f"--column: expected ROLE=NAME, got {' '.join(args.column)}")
    if len(columns) != len(args.column):
        raise ValueError(f"--column: expected each ROLE once, got {' '.join(args.column)}")
    job = BulkJob(
        command=args.command,
        input=args.image,
        out=args.out,
        model=str(model),
        text=text,
        tags=getattr(args, "tags", None),
        columns=columns,
        image_root=args.image_root,
        num_beams=getattr(args, "num_beams", None),
        max_new_tokens=getattr(args, "max_new_tokens", None),
    )
    if args.ray_workers and (args.device is not None or args.workers is not None):
        raise ValueError("--ray-workers: expected neither --device nor --workers, which Ray manages")
    job.expect_input()
    job.expect_model()
    with importing():
        from lion_fast.inference.bulk import run, run_on_ray

    how = {"strict": args.strict, "overwrite": args.overwrite}
    if args.ray_workers:
        summary = run_on_ray(job, num_workers=args.ray_workers, batch_size=args.batch_size, **how)
    else:
        summary = run(job, batch_size=args.batch_size, num_workers=args.workers, device=args.device, **how)
    share = "" if int(os.environ.get("WORLD_SIZE", "1")) == 1 else f" by process {os.environ['RANK']}"
    rate = f", {summary.rows / summary.seconds:.1f} images a second" if summary.rows else ""
    errors = f"; {summary.errors} with an error, first {summary.first_error}" if summary.errors else ""
    report(args.out, f"{summary.rows} rows written{share}, {summary.before} existed{rate}{errors}")
