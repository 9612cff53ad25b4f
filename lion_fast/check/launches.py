"""The kernels' actual launches, recorded without a GPU: Triton itself specialises the launches of real calls.

`recording` replaces Triton's driver and compiler. Calls within it run on the CPU up to each launch, which is recorded
and computes nothing. A process that interprets its kernels has no such launches.
"""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch

from lion_fast.check.cases import Case
from lion_fast.check.compare import leaves, make_tensors, results_of
from lion_fast.check.uncomputed import Uncomputed
from lion_kernels.core import backend
from lion_kernels.core.operator import all_kernels
from lion_kernels.core.specs import KernelSpec

# The constant that gives the rows of a kernel's products; kernels not listed have no products.
PRODUCT_ROWS = {
    "attention_forward": "BM",
    "attention_backward_queries": "BM",
    "attention_backward_keys": "BN",
    "_bias_gradient": "BLOCK",
    "hidden_kernel": "BM",
    "update_kernel": "BM",
    "linear_kernel": "BM",
    "hidden_gradient_kernel": "BM",
    "outer_kernel": "BN",
}
# Constants that follow from others, which the names of launches omit.
DERIVED = ("K", "KP", "RP", "EP", "GP", "EG", "BI", "D1", "D2", "UNIT", "PRECISION", "GROUP", "CHOOSE", "KEEP")
ROWS_OF_A_WARP_GROUP = 64  # the minimum of wgmma


class Recording:
    """Distinct launches in the order of their first occurrence, and the calls that made them.

    Attributes:
        call: the current call.
        model_sizes: whether it has the model's own sizes, for which memory accesses must be 16 bytes wide.
    """

    def __init__(self) -> None:
        self._launches: dict[tuple[Any, ...], tuple[KernelSpec, list[str]]] = {}
        self.call = ""
        self.model_sizes = False

    def note(self, kernel: Any, key: str, signature: dict[str, str], device: int, *others: Any) -> Any:
        """Replace `JITFunction._do_compile`, with its arguments."""
        constexprs, options, attributes = others[:3]
        spec = _spec(kernel, signature, constexprs, options, attributes)
        known, calls = self._launches.setdefault(spec.compiles_as, (spec, []))
        if self.model_sizes and not known.wide_access:
            self._launches[spec.compiles_as] = replace(known, wide_access=True), calls
        if self.call not in calls:
            calls.append(self.call)
        return SimpleNamespace(
            launch_metadata=lambda *_: None, run=lambda *_: None, function=None, packed_metadata=None, hash=key
        )

    def specs(self) -> list[KernelSpec]:
        """Return one spec per launch, with unique names."""
        return _named([(spec, tuple(calls)) for spec, calls in self._launches.values()])


@contextmanager
def recording() -> Iterator[Recording]:
    """Record every launch within the context, for sm_90.

    Raises:
        RuntimeError: the process interprets its kernels.
    """
    if backend.interpreting():
        raise RuntimeError("kernels are interpreted in this process; run it without TRITON_INTERPRET")
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.runtime.jit import JITFunction

    found = Recording()
    hopper = SimpleNamespace(  # the parts of a driver that Triton needs before it compiles
        get_current_target=lambda: GPUTarget("cuda", 90, 32),
        get_current_device=lambda: 0,
        get_current_stream=lambda device: 0,
    )

    def note(kernel: Any, *arguments: Any, **keywords: Any) -> Any:  # a function, unlike `found.note`, becomes a method
        return found.note(kernel, *arguments, **keywords)

    with ExitStack() as stack:
        stack.enter_context(mock.patch.object(triton.runtime.driver, "_active", hopper))
        for kernel in all_kernels():  # Triton does not call the compiler for launches in its cache
            kernel.device_caches.clear()
            stack.callback(kernel.device_caches.clear)
        stack.enter_context(mock.patch.object(JITFunction, "_do_compile", note))
        stack.enter_context(backend.launching_on_cpu())
        yield found


def record_cases(found: Recording, cases: Sequence[Case], dtype: torch.dtype) -> None:
    """Record forward, backward, and forward without gradients."""
    with Uncomputed():
        for case in cases:
            found.model_sizes = case.cost is not None
            found.call = f"check{' times' if found.model_sizes else ''}: {case.operator}, {case.label}"
            tensors = make_tensors(case, dtype, torch.device("cpu"))
            results_of(case.run, leaves(tensors))
            with torch.no_grad():
                case.run(tensors)


def _spec(kernel: Any, signature: dict[str, str], constexprs: Any, options: Any, attributes: Any) -> KernelSpec:
    """Return the spec of a launch from Triton's specialisation: argument paths -> values, and -> attributes."""
    names = list(signature)
    constants = {names[path[0]]: value for path, value in constexprs.items()}
    aligned = {names[path[0]] for path, known in attributes.items() if ["tt.divisibility", 16] in known}
    types = {name: kind for name, kind in signature.items() if name not in constants}
    pointers = {name for name, kind in types.items() if kind.startswith("*")}
    half = {"*bf16", "*fp16"} & set(types.values())
    rows = constants.get(PRODUCT_ROWS.get(kernel.__name__, ""), 0)
    # Without dq, only delta is computed, without a product.
    multiplies = rows >= ROWS_OF_A_WARP_GROUP and constants.get("p_dq", "") is not None
    return KernelSpec(
        name="",
        kernel=kernel,
        signature=types,
        constexprs=constants,
        num_warps=options.num_warps,
        num_stages=options.num_stages,
        matrix=bool(half) and multiplies,
        wide_access=False,
        divisible=tuple(name for name in types if name in aligned - pointers),
        compact=False,
        unaligned=tuple(name for name in types if name in pointers - aligned),
    )


def _named(launches: list[tuple[KernelSpec, tuple[str, ...]]]) -> list[KernelSpec]:
    """Return each spec with its calls and a unique name: kernel, types, main constants, and any that distinguish it."""
    groups: dict[str, list[KernelSpec]] = {}
    for spec, _ in launches:
        groups.setdefault(_name(spec), []).append(spec)
    specs = []
    for spec, calls in launches:
        name = _name(spec)
        arguments = {key: [_argument(one, key) for one in groups[name]] for key in spec.types}
        differing = [key for key, values in arguments.items() if len(set(values)) > 1]
        suffix = "".join(f" {key}={_argument(spec, key)}" for key in differing)
        specs.append(replace(spec, name=name + suffix, calls=calls))
    return specs


def _name(spec: KernelSpec) -> str:
    said = [spec.kernel_name.removeprefix("_").removesuffix("_kernel"), _values(spec)]
    for name, value in spec.constexprs.items():
        if name not in DERIVED and value not in (None, False) and not name.startswith("stride_"):
            said.append(name if value is True else f"{name}={value}")
    return " ".join([*said, f"warps={spec.num_warps} stages={spec.num_stages}"])


def _values(spec: KernelSpec) -> str:
    """Return the floating types that the kernel points at, fp32 last."""
    kinds = {kind[1:] for kind in spec.types.values() if kind in ("*fp16", "*bf16", "*fp32")}
    return "+".join(sorted(kinds, key=lambda kind: (kind == "fp32", kind)))


def _argument(spec: KernelSpec, name: str) -> str:
    """Return what a launch fixes about an argument: its value or its type, with /16 for a multiple of 16."""
    if name in spec.constexprs:
        return str(spec.constexprs[name])
    return spec.types[name] + ("/16" if name in spec.aligned else "")
