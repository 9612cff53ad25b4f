"""What benchmarks share: every peer gets the same inputs, a right result comes before a time, the floor stands beside.

On a GPU in bf16 with the kernels, on a CPU in fp32 without.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from lion_kernels.cost import H200, Cost, floor_seconds

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
DTYPE = torch.bfloat16 if DEVICE.type == "cuda" else torch.float32
FP32_BOUND = 1e-5
Inputs = dict[str, Tensor]
Operator = Callable[..., Tensor]


def measure(
    benchmark,
    operator: Operator,
    inputs: Inputs,
    *,
    plain: Operator,
    reference: Operator,
    costs: Sequence[Cost],
    backward: bool,
    title: str,
) -> None:
    """Times `operator(**inputs)`, with `backward` the gradients of all inputs that ask for one too, if it is right.

    Args:
        plain: the same mathematics in plain PyTorch; in half precision a result may be twice as far off as its.
        reference: likewise, for fp64.
        costs: of forward and backward in bf16, from which the floor of an H200 follows (in `extra_info`).
        title: of the table's group, within which peers are compared.
    """
    torch.compiler.reset()  # a shape of its own for every compiled peer, and no limit on how many it may have seen
    double = {name: _like_leaf(value, torch.float64) for name, value in inputs.items()}
    exact = results(reference, double, backward)
    bounds = dict.fromkeys(exact, FP32_BOUND)
    if DTYPE.itemsize < 4:
        rounding = torch.finfo(DTYPE).eps / 2
        for name, value in results(plain, inputs, backward).items():
            bounds[name] = max(rounding, 2 * relative_error(value, exact[name]))
    for name, value in results(operator, inputs, backward).items():
        error = relative_error(value, exact[name])
        assert error <= bounds[name], (
            f"wrong {name} (relative error {error:.1e}, allowed {bounds[name]:.1e}), so no time"
        )
    floor = sum(floor_seconds(cost, H200, torch.bfloat16) for cost in costs[: 1 + backward])
    benchmark.extra_info["floor of an H200 in bf16, us"] = round(1e6 * floor, 2)
    dtype = str(DTYPE).removeprefix("torch.")
    benchmark.group = f"{title}, {'forward+backward' if backward else 'forward'}, {dtype}, {DEVICE.type}"
    grad = torch.randn_like(exact["out"], dtype=DTYPE) if backward else None
    benchmark(run, operator, inputs, grad)


def run(operator: Operator, inputs: Inputs, grad: Tensor | None) -> None:
    """Forward, and with `grad` backward too, until the device is done."""
    if grad is None:
        with torch.no_grad():
            operator(**inputs)
    else:
        torch.autograd.grad(operator(**inputs), [value for value in inputs.values() if value.requires_grad], grad)
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()


def results(operator: Operator, inputs: Inputs, backward: bool) -> Inputs:
    """The output, and with `backward` the gradients by input."""
    if not backward:
        with torch.no_grad():
            return {"out": operator(**inputs)}
    out = operator(**inputs)
    grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(torch.bfloat16).to(out)
    wanted = [name for name, value in inputs.items() if value.requires_grad]
    gradients = torch.autograd.grad(out, [inputs[name] for name in wanted], grad)
    return {"out": out.detach(), **dict(zip(wanted, gradients, strict=True))}


def relative_error(got: Tensor, exact: Tensor) -> float:
    return ((got.double() - exact).norm() / exact.norm()).item()


def _like_leaf(value: Tensor, dtype: torch.dtype) -> Tensor:
    return value.detach().to(dtype).requires_grad_(value.requires_grad) if value.is_floating_point() else value


def leaf(value: Tensor) -> Tensor:
    """`value` on the device, in the dtype that is measured, asking for its gradient."""
    return value.to(DEVICE, DTYPE).requires_grad_()
