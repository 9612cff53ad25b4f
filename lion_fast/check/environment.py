"""The environment of a measurement: `python -m lion_fast.check.environment` prints it as JSON.

`--rates` adds the GPU's rates: bytes copied and products per second, and the time of the smallest CUDA graph, which is
part of every graph's time. `--json FILE` is written as soon as the rest is known, before the rates are measured.
"""

import argparse
import json
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from lion_fast.io.atomic import write_json
from lion_fast.io.owning import expect_free

PACKAGES = ("torch", "triton", "transformers", "numpy", "peft", "flash-attn", "liger-kernel")


def environment() -> dict[str, Any]:
    """Return versions by package (None if absent), processor and GPU."""
    found: dict[str, Any] = {"python": platform.python_version(), "machine": platform.machine()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = None
    found["cpu_threads"] = torch.get_num_threads()
    found["gpu"] = None
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(torch.cuda.current_device())
        found["gpu"] = {
            "name": properties.name,
            "capability": [properties.major, properties.minor],
            "multiprocessors": properties.multi_processor_count,
            "memory_bytes": properties.total_memory,
            "cuda": torch.version.cuda,
            "hip": torch.version.hip,
        }
    return found


def rates() -> dict[str, Any] | None:
    """Return the current GPU's rates; None without a GPU."""
    if not torch.cuda.is_available():
        return None
    from lion_fast.check.timing import measure, measure_rates

    device = torch.device("cuda", torch.cuda.current_device())
    found = measure_rates(device, (torch.bfloat16, torch.float16, torch.float32))
    value = torch.zeros(1, device=device)
    smallest = measure(None, lambda _: value.add_(1), device)
    return {
        "bytes_per_second": found.bytes_per_second,
        "flops_per_second": found.flops_per_second,
        "smallest_graph_seconds": smallest.median,
    }


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m lion_fast.check.environment")
    parser.add_argument("--rates", action="store_true", help="measure what the GPU reaches")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write it there, too")
    parser.add_argument("--overwrite", action="store_true", help="replace the file of --json if it exists")
    options = parser.parse_args(arguments)
    if options.json is not None:
        try:
            expect_free(options.json, "--json", overwrite=options.overwrite)
        except OSError as error:
            parser.error(str(error))
    found = environment()
    if options.json is not None:
        write_json(options.json, found)
    if options.rates:
        found["rates"] = rates()
        if options.json is not None:
            write_json(options.json, found)
    print(json.dumps(found, indent=1))
    return 0


if __name__ == "__main__":
    main()
