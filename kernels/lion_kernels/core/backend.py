"""The choice of an operator's implementation, and what every kernel launch shares.

Modules with kernels import `triton` and `tl` from here. Where triton cannot be imported (macOS, Windows), both are
stand-ins with which such a module still imports; its operators then run in PyTorch.
"""

import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import Parameter

from lion_kernels.core.arguments import check_choice, shown

if TYPE_CHECKING:
    import triton
    import triton.language as tl

    HAS_TRITON = True
else:
    try:
        import triton
        import triton.language as tl

        HAS_TRITON = True
    except ImportError:
        triton = SimpleNamespace(jit=lambda kernel=None, **_: kernel or (lambda kernel: kernel))
        tl = SimpleNamespace(constexpr=Any)
        HAS_TRITON = False

BACKENDS = ("auto", "triton", "torch")
DTYPES = (torch.float16, torch.bfloat16, torch.float32)  # supported by the kernels

# Keywords of every launch. Contraction of a * b + c is explicit: its default differs between Triton versions.
LAUNCH: dict[str, Any] = {"enable_fp_fusion": True}

# Read once, when the kernels are decorated: setting the variable later has no effect on them.
_INTERPRETING = HAS_TRITON and os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "yes", "y")
_launching_on_cpu = False
_PLAIN = (Tensor, Parameter)


def _accept_arguments_as_loop_bounds() -> None:
    """Let the interpreter accept arguments as loop bounds, which are arrays of one element there.

    Triton before 3.7.1 passes them to `int`, which numpy 2.4 rejects.
    """
    from triton.runtime import interpreter

    patch_tensor: Any = interpreter._patch_lang_tensor

    def patch(tensor: Any, *rest: Any) -> None:
        patch_tensor(tensor, *rest)  # this also records what to restore
        tensor.__index__ = lambda self: int(self.handle.data.item())

    interpreter._patch_lang_tensor = patch


if _INTERPRETING and tuple(map(int, triton.__version__.split(".")[:2])) <= (3, 7):
    _accept_arguments_as_loop_bounds()


def interpreting() -> bool:
    """Return whether kernels run in the interpreter, on the CPU (`TRITON_INTERPRET=1` when this was imported)."""
    return _INTERPRETING


def launches_on_cpu() -> bool:
    """Return whether tensors on the CPU launch kernels: interpreted ones, or any within `launching_on_cpu`."""
    return _INTERPRETING or _launching_on_cpu


@contextmanager
def launching_on_cpu() -> Iterator[None]:
    """Within the context, calls with CPU tensors launch compiled kernels, to record launches without running them."""
    global _launching_on_cpu
    before, _launching_on_cpu = _launching_on_cpu, True
    try:
        yield
    finally:
        _launching_on_cpu = before


def resolve_backend(backend: str, operator: str, device: torch.device) -> str:
    """Return the implementation, "triton" or "torch", that `operator` runs on `device` for `backend`.

    `"auto"` is `"triton"` on a CUDA device if triton can be imported, else `"torch"`.

    Args:
        backend: `"auto"`, `"triton"` or `"torch"`.
        operator: name used in the errors.
        device: device of the operator's inputs.

    Raises:
        TypeError: `backend` is no string, or `device` no `torch.device`.
        ValueError: `backend` is unknown, or is `"triton"` where no kernel can run.
    """
    check_choice("backend", backend, BACKENDS, "one of 'auto', 'triton', 'torch'")
    if not isinstance(device, torch.device):
        raise TypeError(f"device: expected a torch.device, got {shown(device)}")
    if backend == "torch":
        return "torch"
    runs = HAS_TRITON and (device.type == "cuda" or (device.type == "cpu" and launches_on_cpu()))
    if backend == "triton":
        if not HAS_TRITON:
            raise ValueError(f"backend: {operator} has no 'triton' here, triton cannot be imported; use 'torch'")
        if not runs:
            raise ValueError(
                f"backend: {operator} runs 'triton' on a CUDA device, or on the CPU with TRITON_INTERPRET=1, "
                f"got {device}; use 'auto' or 'torch'"
            )
        return "triton"
    return "triton" if runs and device.type == "cuda" else "torch"


def choose_backend(backend: str, operator: str, device: torch.device, unsupported: str | None) -> str:
    """Return the implementation of one call: `resolve_backend`'s choice if the kernels support the call.

    Args:
        unsupported: why the kernels do not support the call, for the error; `"auto"` is then `"torch"`. None if they
            do.

    Raises:
        ValueError: as in `resolve_backend`, or `backend` is `"triton"` and the kernels do not support the call.
    """
    resolved = resolve_backend(backend, operator, device)
    if resolved == "torch" or unsupported is None:
        return resolved
    if backend == "triton":
        raise ValueError(unsupported)
    return "torch"


def refuse_uninterpretable(**tensors: Tensor | None) -> None:
    """Raise ValueError for bfloat16 in the interpreter, which silently computes something else with it."""
    for name, tensor in tensors.items():
        if _INTERPRETING and tensor is not None and tensor.dtype == torch.bfloat16:
            raise ValueError(f"{name}: bfloat16 is not supported by Triton's interpreter; use float32 or float16")


def needs_dispatch(*tensors: Tensor | None) -> bool:
    """Return whether a call must go through its custom op: for autograd, tracing, a tensor subclass, or a view whose
    values are the negatives of those in memory, which PyTorch copies for an op.

    Other calls launch directly and save nothing for backward.
    """
    if torch.compiler.is_compiling():
        return True
    grad = torch.is_grad_enabled()
    for x in tensors:  # noqa: SIM110 (a generator takes longer)
        if x is not None and (type(x) not in _PLAIN or (grad and x.requires_grad) or x.is_neg()):
            return True
    return False


def values_on_host(ids: Tensor) -> bool:
    """Return whether the values of `ids` can be read without synchronising with a GPU.

    Under tracing, and in some tensor subclasses, there may be no values at all.

    Raises:
        TypeError: `ids` is no tensor.
    """
    if not isinstance(ids, Tensor):
        raise TypeError(f"ids: expected a torch.Tensor, got {shown(ids)}")
    dispatch = type(ids).__torch_dispatch__  # type: ignore[misc]
    has_values = type(ids) is Tensor or dispatch is Tensor.__torch_dispatch__  # type: ignore[misc]
    return ids.device.type == "cpu" and has_values and not torch.compiler.is_compiling()


def autocast_dtype(x: Tensor) -> torch.dtype | None:
    """Return the dtype that an active autocast casts inputs on x's device to, else None."""
    kind = x.device.type
    if kind == "meta" or not torch.is_autocast_enabled(kind):  # which fails for meta tensors
        return None
    return torch.get_autocast_dtype(kind)


def dot_precision(dtype: torch.dtype) -> str:
    """Return `input_precision` for `tl.dot`: TF32 for fp32 inputs only if PyTorch's own products may use it."""
    tf32 = dtype == torch.float32 and torch.backends.cuda.matmul.fp32_precision == "tf32"
    return "tf32" if tf32 and not _INTERPRETING else "ieee"


def on_device(tensor: Tensor) -> AbstractContextManager[Any]:
    """Make `tensor`'s device current, which is where Triton launches kernels."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else nullcontext()
