"""How an operator is defined: one call for what PyTorch has to know of it, and one list of all that are.

An operator is two of PyTorch's custom ops, forward and backward, so that autograd, `torch.compile` and `torch.export`
take each for one step. On CUDA such an op launches kernels. On the CPU it launches them where launches reach the CPU
(Triton's interpreter), and else computes its plain form.
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
    """What the check, the report and the tuner ask of an operator.

    Attributes:
        name: of its function in `lion_kernels`, and of its custom op there.
        cost: what forward and backward cannot avoid, from sizes.
        kernel_specs: every configuration of its kernels; operators that share their kernels share this function.
    """

    name: str
    cost: Callable[..., tuple[Cost, Cost]]
    kernel_specs: Callable[[], list[KernelSpec]]

    @property
    def kernels_in(self) -> str:
        """The module or the folder of `kernel_specs`, which the report lists the kernels under."""
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
    """The custom op `lion_kernels::name`.

    Args:
        launch: launches the kernels.
        plain: the same in PyTorch. The op's schema is its signature.
        fake: shapes, strides and dtypes of the results; `plain` gives them where that is cheap without values.
        bundle: makes what the three are called with of the op's own arguments, of which torch allows no tuples; the
            schema's arguments are then those of `bundle`.
        setup_context, backward: of autograd, as `torch.library.register_autograd` takes them. The op of a gradient has
            none.
        cost, kernel_specs: of `Operator`, with which the op is entered in `OPERATORS`; the op of a gradient has none.
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
    """With the arguments of one function and the results of another."""

    def prototype() -> None: ...

    results = inspect.signature(results_of).return_annotation
    prototype.__signature__ = inspect.signature(arguments_of).replace(return_annotation=results)  # type: ignore
    return torch.library.infer_schema(prototype, mutates_args=())


def asked_for(gradients: Iterable[Tensor], needs: Iterable[bool]) -> tuple[Tensor | None, ...]:
    """What autograd wants of a backward op, whose results cannot be None: None where a gradient is not needed."""
    return tuple(gradient if needed else None for gradient, needed in zip(gradients, needs, strict=True))


def room_for(x: Tensor, needed: bool) -> Tensor:
    """Uninitialised room for x's gradient, contiguous; no elements unless `needed`."""
    return x.new_empty(x.shape if needed else (0,))


def all_specs() -> list[tuple[str, KernelSpec]]:
    """(`Operator.kernels_in`, spec) of every configuration of every kernel, each once."""
    listed = {operator.kernels_in: operator.kernel_specs for operator in OPERATORS.values()}
    return [(name, spec) for name in sorted(listed) for spec in listed[name]()]


@functools.cache
def all_kernels() -> tuple[Any, ...]:
    """Every kernel that is launched, once."""
    return tuple({id(spec.kernel): spec.kernel for _, spec in all_specs()}.values())
