"""Compilation time of a machine's first run: `python -m lion_fast.check.compile_times` prints it as JSON.

For the comparisons of `lion-fast check` in each dtype, its timed cases, and the model, it gives the number of distinct
launches on sm_90, the number of new ones, and the CPU seconds that these take in one process. No GPU is needed.
"""

import json
import os
import tempfile
from functools import partial
from importlib.metadata import version
from typing import Any

import torch

from lion_fast.check.cases import CASES, TIMED
from lion_fast.check.compare import name_of
from lion_fast.check.launches import record_cases, recording
from lion_fast.check.model_launches import record_models
from lion_kernels.aot.compile import compile_spec
from lion_kernels.core.specs import KernelSpec


def seconds_of(specs: list[KernelSpec]) -> float:
    """Return the CPU seconds of this process and its compilers, with an empty cache; a busy machine takes longer."""
    with tempfile.TemporaryDirectory() as folder:
        os.environ["TRITON_CACHE_DIR"] = folder
        before = _processor_seconds()
        for spec in specs:
            compile_spec(spec, "sm_90")
        return _processor_seconds() - before


def _processor_seconds() -> float:
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system


def main() -> None:
    dtypes = (torch.bfloat16, torch.float16, torch.float32)
    parts: dict[str, Any] = {name_of(dtype): partial(record_cases, cases=CASES, dtype=dtype) for dtype in dtypes}
    parts |= {"timed": partial(record_cases, cases=TIMED, dtype=torch.bfloat16), "model": record_models}
    known: set[tuple[Any, ...]] = set()
    table = {}
    for name, record in parts.items():
        with recording() as found:
            record(found)
        specs = found.specs()
        new = [spec for spec in specs if spec.compiles_as not in known]
        known |= {spec.compiles_as for spec in specs}
        table[name] = {"launches": len(specs), "new": len(new), "seconds_of_new": round(seconds_of(new), 1)}
        print(json.dumps({name: table[name]}), flush=True)
    print(json.dumps({"triton": version("triton"), **table}))


if __name__ == "__main__":
    main()
