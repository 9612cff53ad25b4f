"""Tile sizes measured on known GPUs, looked up by operator and shape class.

A table is a JSON file in `tuned_sizes/`, named after the GPU: `{operator: {shape class: {parameter: value}}}`. No table
ships for a GPU that nobody measured; there the operator's own default holds. A shape class is never an exact length.
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

# Bytes of shared memory that a program may have on data-center GPUs since the A100; below, sizes are compact.
COMPACT_BELOW = 160 * 1024

_overridden: "_Override | None" = None


class _Override(NamedTuple):
    entries: dict[tuple[str, str], dict[str, Any]]
    seen: dict[tuple[str, str], dict[str, Any]]


def lookup(operator: str, shape_class: str, default: dict[str, Any]) -> dict[str, Any]:
    """`default`, with what the current GPU's table says about `operator` at `shape_class` in its place.

    Never raises for an unknown GPU, and without one is `default`.
    """
    if _overridden is not None:
        key = operator, shape_class
        _overridden.seen[key] = default
        return {**default, **_overridden.entries.get(key, {})}
    measured = _table(_gpu()).get(operator, {}).get(shape_class)
    return default if measured is None else {**default, **measured}


@contextmanager
def overriding(entries: dict[tuple[str, str], dict[str, Any]]) -> Iterator[dict[tuple[str, str], dict[str, Any]]]:
    """Within, `lookup` finds `entries`, by operator and shape class, in place of the GPU's table.

    Gives what is looked up within, with its default.
    """
    global _overridden
    before, seen = _overridden, {}
    _overridden = _Override(entries, seen)
    try:
        yield seen
    finally:
        _overridden = before


def shipped(operator: str) -> list[dict[str, Any]]:
    """Every entry about `operator` in any shipped table, for the ahead-of-time report."""
    tables = (json.loads(file.read_text(encoding="utf-8")) for file in sorted(FOLDER.glob("*.json")))
    return [entry for table in tables for entry in table.get(operator, {}).values()]


def file_name(gpu: str) -> str:
    """The file of a GPU's table: "NVIDIA H200" -> "nvidia_h200.json"."""
    return re.sub(r"[^a-z0-9]+", "_", gpu.lower()).strip("_") + ".json"


def is_compact(device: torch.device) -> bool:
    """Whether a program has less shared memory on `device` than on data-center GPUs since the A100.

    99 KiB on GeForce's and on the L4 and L40S, 64 KiB on AMD's.
    """
    return device.type == "cuda" and _shared_memory(device) < COMPACT_BELOW


@functools.cache
def _shared_memory(device: torch.device) -> int:
    # PyTorch tells for NVIDIA's; AMD's have 64 KiB, or more.
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
