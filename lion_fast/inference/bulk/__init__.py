"""Captions, answers, boxes and tags of many images: `docs/bulk.md`."""

from typing import TYPE_CHECKING

from lion_fast import _lazy

if TYPE_CHECKING:
    from lion_fast.inference.bulk.job import BulkJob
    from lion_fast.inference.bulk.ray import run_on_ray
    from lion_fast.inference.bulk.running import Summary, run

__all__ = ["BulkJob", "Summary", "run", "run_on_ray"]

__getattr__, __dir__ = _lazy.exports(
    __name__,
    {
        "job": ("BulkJob",),
        "ray": ("run_on_ray",),
        "running": (
            "Summary",
            "run",
        ),
    },
)
