"""Captions, answers, boxes and tags of many images: `docs/bulk.md`."""

from lion_fast.inference.bulk.job import BulkJob
from lion_fast.inference.bulk.ray import run_on_ray
from lion_fast.inference.bulk.running import Summary, run

__all__ = ["BulkJob", "Summary", "run", "run_on_ray"]
