"""Launches of the kernels that both mixtures share: a gated sum of low-rank maps, and its gradients.

    hidden_e = act(x down_e^T + down_bias_e)                                     [T, r]
    out = residual + sum_e gate_e * (hidden_e up_e^T + up_bias_e)                [T, N]

gate_e is a number per row (dense, sparse) or a vector of N channels per task (channel). With g = dOut, backward is

    d hidden_e = ((g * gate_e) up_e) act'(hidden_e)                              [T, r]
    d x = sum_e d hidden_e down_e        d down_e = d hidden_e^T x               (plain products, by the library)

With a gate per row,

    d up_e = g^T (gate_e * hidden_e)     d up_bias_e = g^T gate_e
    d gate_e = rowsum(hidden_e * (g up_e)) + g up_bias_e                         [T]

With a gate per channel, let G_e = g^T hidden_e [N, r] and s = sum_t g_t [N] over the rows of a task. Summed over tasks,

    d up_e = gate_e * G_e                d up_bias_e = gate_e * s
    d gate_e = rowsum(G_e * up_e) + up_bias_e * s                                (one row of the table per task)

Backward thus recomputes no up-projection, and forward saves only x and hidden. Sums over the rows of a batch are split
into chunks whose partial results are added in a fixed order, so the same call gives the same bits.

Algebra: LION (arXiv 2311.11860), section 3.3; LoRA (2106.09685). The split for few rows follows Punica's shrink and
expand (2310.18547).
"""

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lion_kernels.core import tuned_sizes
from lion_kernels.core.arguments import check_floating
from lion_kernels.core.backend import DTYPES, LAUNCH, autocast_dtype, on_device, refuse_uninterpretable
from lion_kernels.core.rowwise import as_rows
from lion_kernels.low_rank.adapters import Adapters
from lion_kernels.low_rank.gates import KernelGate
from lion_kernels.low_rank.kernels import (
    hidden_gradient_kernel,
    hidden_kernel,
    linear_kernel,
    outer_kernel,
    up_gradient_kernel,
    update_kernel,
)
from lion_kernels.low_rank.sizes import Problem, cdiv


def launch_forward(
    x: Tensor, adapters: Adapters, gate: KernelGate, residual: Tensor | None, relu: bool, *, save: bool = True
) -> tuple[Tensor, Tensor | None]:
    """Return out [T, N] in the wider dtype of x and residual and, with `save`, hidden [T, E*r] for backward.

    There are two launches. With few rows, the first is split over channels, and the second adds its parts.
    """
    problem = _problem(x, adapters, gate, residual is not None, relu)
    hidden, splits = launch_hidden(problem, x, adapters, gate, may_split=not save)
    constants = problem.constants("update", split=splits > 1)
    channels = problem.channels_out
    dtype = x.dtype if residual is None else torch.promote_types(x.dtype, residual.dtype)
    out = torch.empty(problem.rows, channels, dtype=dtype, device=x.device)
    row_tiles = cdiv(problem.rows, constants["BM"])
    programs = cdiv(264, row_tiles)  # two per multiprocessor of an H200, which has 132
    channels_per_program = constants["BN"] * cdiv(cdiv(channels, programs), constants["BN"])
    with on_device(x):
        update_kernel[(row_tiles, cdiv(channels, channels_per_program))](
            hidden, adapters.down_bias, adapters.up_weight, adapters.up_bias, gate.gate, gate.ids, residual, out,
            problem.rows, channels, 0 if residual is None else residual.stride(0), gate.rows_per_gate,
            channels_per_program, splits, **constants, **LAUNCH,
        )  # fmt: skip
    return out, hidden if save else None


def launch_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, adapters: Adapters, gate: KernelGate, *, save: bool = True
) -> tuple[Tensor, Tensor | None]:
    """Return x weight^T + bias + the gated low-rank updates in one tile loop and, with `save`, hidden [T, E*r]."""
    problem = _problem(x, adapters, gate, False, False)._replace(has_linear_bias=bias is not None)
    hidden, splits = launch_hidden(problem, x, adapters, gate, may_split=not save)
    constants = problem.constants("linear", split=splits > 1)
    out = torch.empty(problem.rows, problem.channels_out, dtype=x.dtype, device=x.device)
    programs = cdiv(problem.rows, constants["BM"]) * cdiv(problem.channels_out, constants["BN"])
    with on_device(x):
        linear_kernel[(programs,)](
            x, weight, bias, hidden, adapters.up_weight, gate.gate, gate.ids, out,
            problem.rows, problem.channels_in, problem.channels_out, x.stride(0), gate.rows_per_gate, splits,
            **constants, **LAUNCH,
        )  # fmt: skip
    return out, hidden if save else None


def launch_hidden(
    problem: Problem, x: Tensor, adapters: Adapters, gate: KernelGate, may_split: bool
) -> tuple[Tensor, int]:
    """Return (hidden [T, E*r] in x's dtype, 1), or (fp32 parts [splits, T, E*r] before bias and act, splits)."""
    refuse_uninterpretable(x=x)
    tiles = problem.tiles("hidden")
    rows, channels = x.shape
    row_tiles, inner_tiles = cdiv(rows, tiles["BM"]), cdiv(problem.inner, tiles["BF"])
    splits = 128 // (row_tiles * inner_tiles) if may_split else 1
    channels_per_split = tiles["BK"] * cdiv(cdiv(channels, max(1, splits)), tiles["BK"])
    splits = cdiv(channels, channels_per_split)
    if splits > 1:
        hidden = torch.empty(splits, rows, problem.inner, dtype=torch.float32, device=x.device)
    else:
        hidden = torch.empty(rows, problem.inner, dtype=x.dtype, device=x.device)
    with on_device(x):
        hidden_kernel[(row_tiles, inner_tiles, splits)](
            x, adapters.down_weight, adapters.down_bias, gate.ids, hidden, rows, channels, x.stride(0),
            gate.rows_per_gate, channels_per_split, **problem.constants("hidden", split=splits > 1), **LAUNCH,
        )  # fmt: skip
    return hidden, splits


class Gradients(NamedTuple):
    """The gradients of a mixture; None if not requested."""

    hidden: Tensor | None
    down_weight: Tensor | None
    down_bias: Tensor | None
    up_weight: Tensor | None
    up_bias: Tensor | None
    gate: Tensor | None


def launch_backward(
    grad: Tensor,
    x: Tensor,
    hidden: Tensor,
    adapters: Adapters,
    gate: KernelGate,
    relu: bool,
    needs: Sequence[bool],
) -> Gradients:
    """Return the gradients that `needs` requests, in the order of `Gradients`; x's is `hidden`'s times down_weight."""
    refuse_uninterpretable(grad=grad)
    problem = _problem(x, adapters, gate, False, relu)
    needs_hidden, needs_down_weight, needs_down_bias, needs_up_weight, needs_up_bias, needs_gate = needs
    needs_row_gate = needs_gate and gate.form != "channel"
    needs_channel_gate = needs_gate and gate.form == "channel"
    dhidden = ddown_weight = ddown_bias = dup_weight = dup_bias = dgate = None
    if needs_hidden or needs_down_weight or needs_down_bias or needs_row_gate:
        dhidden, dgate = _launch_hidden_gradient(problem, grad, hidden, adapters, gate, needs_row_gate)
    if needs_down_weight:
        assert dhidden is not None
        ddown_weight = torch.mm(dhidden.t(), x).view(adapters.down_weight.shape)
    if needs_down_bias:
        assert dhidden is not None
        ddown_bias = dhidden.sum(0).view(adapters.down_weight.shape[:2])
    if needs_up_weight or needs_up_bias or needs_channel_gate:
        dup_weight = torch.empty_like(adapters.up_weight) if needs_up_weight else None
        dup_bias = torch.empty_like(adapters.up_bias) if adapters.up_bias is not None and needs_up_bias else None
        dgate = torch.empty_like(gate.gate) if needs_channel_gate else dgate
        _launch_up_gradient(
            problem, grad, hidden, adapters, gate, dup_weight, dup_bias, dgate if needs_channel_gate else None
        )
    return Gradients(dhidden if needs_hidden else None, ddown_weight, ddown_bias, dup_weight, dup_bias, dgate)


def _launch_hidden_gradient(
    problem: Problem, grad: Tensor, hidden: Tensor, adapters: Adapters, gate: KernelGate, gate_gradient: bool
) -> tuple[Tensor, Tensor | None]:
    constants = problem.constants("hidden_gradient", gate_gradient=gate_gradient)
    dhidden = torch.empty_like(hidden)
    dgate = None
    if gate_gradient:
        dgate = torch.empty(problem.rows, problem.experts, dtype=torch.float32, device=grad.device)
    with on_device(grad):
        hidden_gradient_kernel[(cdiv(problem.rows, constants["BM"]), problem.experts // problem.group)](
            grad, adapters.up_weight, adapters.up_bias, gate.gate, gate.ids, hidden, dhidden, dgate,
            problem.rows, problem.channels_out, grad.stride(0), gate.rows_per_gate, **constants, **LAUNCH,
        )  # fmt: skip
    if dgate is not None:
        dgate = dgate.view(-1, gate.rows_per_gate, problem.experts).sum(1).to(gate.gate.dtype)
    return dhidden, dgate


def _launch_up_gradient(
    problem: Problem,
    grad: Tensor,
    hidden: Tensor,
    adapters: Adapters,
    gate: KernelGate,
    dup_weight: Tensor | None,
    dup_bias: Tensor | None,
    dgate: Tensor | None,
) -> None:
    """Write the gradients of up_weight, up_bias and a channel gate that are not None."""
    tiles = problem.tiles("outer")
    channel = gate.form == "channel"
    channels, experts = problem.channels_out, problem.experts
    groups, channel_tiles = experts // problem.group, cdiv(channels, tiles["BN"])
    # One program per multiprocessor of an H200, and at least four tiles of rows per program.
    splits = max(1, min(132 // (channel_tiles * groups), cdiv(problem.rows, 4 * tiles["BT"])))
    rows_per_split = tiles["BT"] * cdiv(cdiv(problem.rows, splits), tiles["BT"])
    splits = cdiv(problem.rows, rows_per_split)
    parts = (splits, problem.tasks)
    weights = torch.empty(*parts, experts, channels, problem.rank, dtype=torch.float32, device=grad.device)
    biases = torch.empty(*parts, 1 if channel else experts, channels, dtype=torch.float32, device=grad.device)
    with on_device(grad):
        outer_kernel[(channel_tiles, groups, splits)](
            grad, hidden, gate.gate, gate.ids, weights, biases,
            problem.rows, channels, grad.stride(0), gate.rows_per_gate, rows_per_split,
            **problem.constants("outer"), **LAUNCH,
        )  # fmt: skip
        constants = problem.constants("up_gradient")
        up_gradient_kernel[(cdiv(channels, constants["BN"]), experts)](
            weights, biases, gate.gate, adapters.up_weight, adapters.up_bias, dup_weight, dup_bias, dgate,
            channels, splits, **constants, **LAUNCH,
        )  # fmt: skip


def _problem(x: Tensor, adapters: Adapters, gate: KernelGate, has_residual: bool, relu: bool) -> Problem:
    experts, rank, channels_in = adapters.down_weight.shape
    return Problem(
        rows=x.shape[0],
        channels_in=channels_in,
        channels_out=adapters.up_weight.shape[1],
        experts=experts,
        rank=rank,
        form=gate.form,
        dtype=x.dtype,
        named=gate.ids.shape[-1] if gate.form == "sparse" and gate.ids is not None else 1,
        tasks=gate.gate.shape[0] if gate.form == "channel" else 1,
        relu=relu,
        has_down_bias=adapters.down_bias is not None,
        has_up_bias=adapters.up_bias is not None,
        compact=tuned_sizes.is_compact(x.device),
        has_residual=has_residual,
    )


def why_unsupported(x: Tensor) -> str | None:
    """Return why the kernels do not support x; None if they do, or if there is nothing to compute."""
    if x.dtype in DTYPES or x.numel() == 0 or autocast_dtype(x) in DTYPES:
        return None
    return f"x: expected float32, float16 or bfloat16 with backend='triton', got {x.dtype}"


def check_experts(name: str, down_weight: Tensor) -> None:
    """Raise ValueError for a mixture [E, r, D] without experts or of rank 0."""
    experts, rank, _ = down_weight.shape
    if not (experts and rank):
        raise ValueError(f"{name}: expected [E, r, D] with E and r at least 1, got {list(down_weight.shape)}")


def check_placement(x: Tensor, weights: dict[str, Tensor | None], others: dict[str, Tensor | None]) -> None:
    """Raise ValueError for an input on another device than x, or weights of another dtype.

    Autocast casts weights of another floating dtype, except fp64.
    """
    device, dtype = x.device, x.dtype
    for name, tensor in (*weights.items(), *others.items()):
        if tensor is not None and tensor.device != device:
            raise ValueError(f"{name}: expected on {device} (as x), got {tensor.device}")
    for name, tensor in weights.items():
        if tensor is not None and tensor.dtype != dtype:
            if autocast_dtype(x) is None or torch.float64 in (dtype, tensor.dtype):
                raise ValueError(f"{name}: expected {dtype} (as x), got {tensor.dtype}")
            check_floating(name, tensor)


def cast_for_kernels(x: Tensor, weights: Iterable[Tensor | None]) -> tuple[Tensor, list[Any]]:
    """Return x as rows [T, D] and contiguous weights, in autocast's dtype if enabled."""
    dtype = autocast_dtype(x) or x.dtype
    return as_rows(x.to(dtype)), [None if value is None else value.to(dtype).contiguous() for value in weights]
