"""Captions, answers, places and tags of very many pictures: `docs/bulk.md`."""

from lion_fast.inference.bulk.job import BulkJob
from lion_fast.inference.bulk.ray import run_on_ray
from lion_fast.inference.bulk.running import Summary, run

__all__ = ["BulkJob", "Summary", "run", "run_on_ray"]
