"""What a measurement depends on: `python -m lion_fast.check.environment` prints it as JSON."""

import json
import platform
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch

PACKAGES = ("torch", "triton", "transformers", "numpy", "peft", "flash-attn", "liger-kernel")


def environment() -> dict[str, Any]:
    """Versions by package (None where it is absent), processor and GPU."""
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


if __name__ == "__main__":
    print(json.dumps(environment(), indent=1))
