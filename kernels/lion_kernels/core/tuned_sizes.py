"""Tile sizes measured on known GPUs, by operator and shape class.

A table is a JSON file in `tuned_sizes/`, named after the GPU: `{operator: {shape class: {parameter: value}}}`. A GPU
without measurements has no table and uses the operators' defaults. A shape class is never an exact length.
"""

import functools
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch

FOLDER = Path(__file__).parents[1] / "tuned_sizes"

# GPUs with fewer bytes of shared memory per program use compact sizes; data-center GPUs since the A100 have more.
COMPACT_BELOW = 160 * 1024

_overridden: "_Override | None" = None


class _Override(NamedTuple):
    entries: dict[tuple[str, str], dict[str, Any]]
    seen: dict[tuple[str, str], dict[str, Any]]


def lookup(operator: str, shape_class: str, default: dict[str, Any]) -> dict[str, Any]:
    """Return `default`, updated with the current GPU's entry for `operator` and `shape_class`.

    An unknown GPU, or no GPU, is no error and gives `default`.
    """
    if _overridden is not None:
        key = operator, shape_class
        _overridden.seen[key] = default
        return {**default, **_overridden.entries.get(key, {})}
    measured = _table(_gpu()).get(operator, {}).get(shape_class)
    return default if measured is None else {**default, **measured}


@contextmanager
def overriding(entries: dict[tuple[str, str], dict[str, Any]]) -> Iterator[dict[tuple[str, str], dict[str, Any]]]:
    """Within the context, `lookup` uses `entries`, by operator and shape class, instead of the GPU's table.

    Yields a dict that records each lookup's default.
    """
    global _overridden
    before, seen = _overridden, {}
    _overridden = _Override(entries, seen)
    try:
        yield seen
    finally:
        _overridden = before


def shipped(operator: str) -> list[dict[str, Any]]:
    """Return every shipped table's entries for `operator`, for the ahead-of-time report."""
    tables = (json.loads(file.read_text(encoding="utf-8")) for file in sorted(FOLDER.glob("*.json")))
    return [entry for table in tables for entry in table.get(operator, {}).values()]


def file_name(gpu: str) -> str:
    """Return the file name of a GPU's table: "NVIDIA H200" -> "nvidia_h200.json"."""
    return re.sub(r"[^a-z0-9]+", "_", gpu.lower()).strip("_") + ".json"


def is_compact(device: torch.device) -> bool:
    """Return whether `device` has less shared memory per program than data-center GPUs since the A100.

    GeForce GPUs, the L4 and the L40S have 99 KiB, AMD's 64 KiB.
    """
    return device.type == "cuda" and _shared_memory(device) < COMPACT_BELOW


@functools.cache
def _shared_memory(device: torch.device) -> int:
    # PyTorch reports it for NVIDIA GPUs only; AMD GPUs have at least 64 KiB.
    return getattr(torch.cuda.get_device_properties(device), "shared_memory_per_block_optin", 64 * 1024)


def _gpu() -> str | None:
    return _gpu_name(torch.cuda.current_device()) if torch.cuda.is_initialized() else None


@functools.cache
def _gpu_name(index: int) -> str:
    return torch.cuda.get_device_name(index)


@functools.cache
def _table(gpu: str | None) -> dict[str, dict[str, Any]]:
    file = FOLDER / file_name(gpu) if gpu else None
    return json.loads(file.read_text(encoding="utf-8")) if file and file.is_file() else {}
