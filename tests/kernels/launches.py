"""Prints, as JSON, what every kernel is launched with: argument -> types, as Triton specialises a launch on a GPU.

In a process without `TRITON_INTERPRET`: each operator runs `lion-fast check`'s cases on the CPU under a stand-in for
Triton's driver, and what would be compiled and launched is noted instead.
"""

import importlib
import json
import pkgutil
from collections import defaultdict
from types import SimpleNamespace
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

import lion_kernels
from lion_fast.check.cases import CASES
from lion_fast.check.compare import leaves, make_tensors, results_of
from lion_kernels import backend

LAUNCHED: dict[str, dict[str, set[str]]] = defaultdict(lambda: defaultdict(set))


class Hopper:
    """What Triton asks a driver before it compiles."""

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


def note(kernel: JITFunction, key: str, signature: dict[str, str], *_: Any) -> Any:
    """In the place of the compiler."""
    for name, kind in signature.items():
        LAUNCHED[kernel.fn.__name__][name].add(kind)
    return SimpleNamespace(
        launch_metadata=lambda *_: None, run=lambda *_: None, function=None, packed_metadata=None, hash=key
    )


def run_kernels_on_the_cpu() -> None:
    """As where they are interpreted; these are not."""
    backend._INTERPRETING = True
    for info in pkgutil.iter_modules(lion_kernels.__path__):
        module: Any = importlib.import_module(f"lion_kernels.{info.name}")
        for name, stand_in in (("interpreting", lambda: True), ("refuse_uninterpretable", lambda **_: None)):
            if hasattr(module, name):
                setattr(module, name, stand_in)


triton.runtime.driver.set_active(Hopper())
JITFunction._do_compile = note
run_kernels_on_the_cpu()
for case in CASES:
    for dtype in (torch.bfloat16, torch.float32):
        tensors = make_tensors(case, dtype, torch.device("cpu"))
        results_of(case.run, leaves(tensors))
        with torch.no_grad():
            case.run(tensors)
found = {kernel: {name: sorted(kinds) for name, kinds in types.items()} for kernel, types in LAUNCHED.items()}
print(json.dumps(found))
