"""The definition of an operator: one call that declares it to PyTorch, and a registry of all operators.

An operator is two of PyTorch's custom ops, forward and backward, so that autograd, `torch.compile` and `torch.export`
treat each as one step. On CUDA such an op launches kernels. On the CPU it launches them under `launches_on_cpu`
(Triton's interpreter), and otherwise computes its plain form.
"""

import functools
import inspect
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lion_kernels.core.backend import launches_on_cpu
from lion_kernels.core.cost import Cost
from lion_kernels.core.specs import KernelSpec


@dataclass(frozen=True)
class Operator:
    """What the check, the report and the tuner need to know about an operator.

    Attributes:
        name: name of its function and of its custom op in `lion_kernels`.
        cost: computes the minimal cost of forward and backward from sizes.
        kernel_specs: returns every configuration of its kernels; operators that share kernels share this function.
    """

    name: str
    cost: Callable[..., tuple[Cost, Cost]]
    kernel_specs: Callable[[], list[KernelSpec]]

    @property
    def kernels_in(self) -> str:
        """The module or folder of `kernel_specs`, under which the report lists the kernels."""
        return self.kernel_specs.__module__.split(".")[1]


OPERATORS: dict[str, Operator] = {}  # by name; complete once `lion_kernels` is imported


def define(
    name: str,
    *,
    launch: Callable[..., Any],
    plain: Callable[..., Any],
    fake: Callable[..., Any] | None = None,
    bundle: Callable[..., tuple[Any, ...]] | None = None,
    setup_context: Callable[..., None] | None = None,
    backward: Callable[..., Any] | None = None,
    cost: Callable[..., tuple[Cost, Cost]] | None = None,
    kernel_specs: Callable[[], list[KernelSpec]] | None = None,
) -> Any:
    """Define the custom op `lion_kernels::name`.

    Args:
        launch: launches the kernels.
        plain: computes the same in PyTorch. Its signature gives the op's schema.
        fake: returns results with the right shapes, strides and dtypes; `plain` can serve if it is cheap without
            values.
        bundle: converts the op's arguments, among which torch allows no tuples, to those of the three functions above;
            the schema then has the arguments of `bundle`.
        setup_context, backward: for autograd, as in `torch.library.register_autograd`. The op of a gradient has none.
        cost, kernel_specs: for the op's `Operator` in `OPERATORS`; the op of a gradient has none.
    """

    def with_op_arguments(function: Callable[..., Any]) -> Callable[..., Any]:
        def bundled(*arguments: Any) -> Any:
            assert bundle is not None
            return function(*bundle(*arguments))

        return function if bundle is None else bundled

    launched, computed = with_op_arguments(launch), with_op_arguments(plain)

    def on_cpu(*arguments: Any) -> Any:
        return launched(*arguments) if launches_on_cpu() else computed(*arguments)

    schema = _schema(plain if bundle is None else bundle, plain)
    op = torch.library.custom_op(f"lion_kernels::{name}", launched, mutates_args=(), device_types="cuda", schema=schema)
    op.register_kernel("cpu")(on_cpu)
    op.register_fake(computed if fake is None else with_op_arguments(fake))
    if backward is not None:
        op.register_autograd(backward, setup_context=setup_context)
    if cost is not None and kernel_specs is not None:
        OPERATORS[name] = Operator(name, cost, kernel_specs)
    return op


def _schema(arguments_of: Callable[..., Any], results_of: Callable[..., Any]) -> str:
    """Return a schema with one function's arguments and another's results."""

    def prototype() -> None: ...

    results = inspect.signature(results_of).return_annotation
    prototype.__signature__ = inspect.signature(arguments_of).replace(return_annotation=results)  # type: ignore
    return torch.library.infer_schema(prototype, mutates_args=())


def needed_gradients(gradients: Iterable[Tensor], needs: Iterable[bool]) -> tuple[Tensor | None, ...]:
    """Return the gradients for autograd: None for those not needed, which a backward op cannot return itself."""
    return tuple(gradient if needed else None for gradient, needed in zip(gradients, needs, strict=True))


def empty_gradient(x: Tensor, needed: bool) -> Tensor:
    """Allocate x's gradient, uninitialised and contiguous; empty unless `needed`."""
    return x.new_empty(x.shape if needed else (0,))


def all_specs() -> list[tuple[str, KernelSpec]]:
    """Return (`Operator.kernels_in`, spec) for every configuration of every kernel, without duplicates."""
    listed = {operator.kernels_in: operator.kernel_specs for operator in OPERATORS.values()}
    return [(name, spec) for name in sorted(listed) for spec in listed[name]()]


@functools.cache
def all_kernels() -> tuple[Any, ...]:
    """Return every kernel that is launched, without duplicates."""
    return tuple({id(spec.kernel): spec.kernel for _, spec in all_specs()}.values())
