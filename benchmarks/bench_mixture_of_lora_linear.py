"""The linear layer with a mixture of LoRA, forward and backward, beside its formula and PEFT's layer.

`pytest benchmarks` prints the table. Shapes are those of a 2048-wide language model with eight adapters of rank 8, the
base frozen; rows are one decoding step and prompts of 320 tokens. Soft routing weighs every adapter in every row; "one
each" gives every sequence one adapter, which is what PEFT's batches of mixed adapters do (where PEFT is installed).
"""

import functools
from collections.abc import Callable
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.side_by_side import DEVICE, DTYPE, Inputs, Operator, leaf, measure
from lion_kernels import mixture_of_lora_linear
from lion_kernels.mixture_of_lora_linear import cost
from lion_reference import mixture_of_lora_linear as reference

CHANNELS, EXPERTS, RANK = 2048, 8, 8
try:
    import peft
except ImportError:
    peft = None


def make_inputs(form: str, batch: int, length: int) -> Inputs:
    generator = torch.Generator().manual_seed(0)

    def randn(*size: int, scale: float = 1.0) -> Tensor:
        return torch.randn(*size, generator=generator) * scale

    inputs = {
        "x": leaf(randn(batch, length, CHANNELS)),
        "weight": leaf(randn(CHANNELS, CHANNELS, scale=CHANNELS**-0.5)).requires_grad_(False),
        "lora_a": leaf(randn(EXPERTS, RANK, CHANNELS, scale=CHANNELS**-0.5)),
        "lora_b": leaf(randn(EXPERTS, CHANNELS, RANK, scale=RANK**-0.5)),
    }
    if form == "soft":
        return {**inputs, "gate": leaf(randn(batch, length, EXPERTS).softmax(-1))}
    ids = torch.randint(0, EXPERTS, (batch, 1), generator=generator).to(DEVICE)
    return {**inputs, "gate": torch.ones(batch, 1, device=DEVICE, dtype=DTYPE), "expert_ids": ids}


def eager(
    x: Tensor, weight: Tensor, lora_a: Tensor, lora_b: Tensor, gate: Tensor, expert_ids: Tensor | None = None
) -> Tensor:
    """Adapter by adapter over all rows."""
    out = F.linear(x, weight)
    for e in range(EXPERTS):
        factor = gate[..., e : e + 1] if expert_ids is None else (gate * (expert_ids == e)).unsqueeze(-1)
        out = out + factor * F.linear(F.linear(x, lora_a[e]), lora_b[e])
    return out


def with_peft(x: Tensor, weight: Tensor, lora_a: Tensor, lora_b: Tensor, gate: Tensor, expert_ids: Tensor) -> Tensor:
    """PEFT's layer on the same parameters, as its model calls it for a batch of mixed adapters."""
    layer = _peft_layer()
    names = [str(e) for e in expert_ids[:, 0].tolist()]
    parameters = {"base_layer.weight": weight}
    for e in range(EXPERTS):
        parameters |= {f"lora_A.{e}.weight": lora_a[e], f"lora_B.{e}.weight": lora_b[e]}
    return torch.func.functional_call(layer, parameters, (x,), {"adapter_names": names})


@functools.cache
def _peft_layer() -> nn.Module:
    assert peft is not None
    model = nn.ModuleDict({"linear": nn.Linear(CHANNELS, CHANNELS, bias=False)})
    for e in range(EXPERTS):
        config = peft.LoraConfig(r=RANK, lora_alpha=RANK, target_modules=["linear"])
        peft.inject_adapter_in_model(config, model, adapter_name=str(e))
    return model["linear"].to(DEVICE, DTYPE).eval()


def plain(**inputs: Tensor) -> Tensor:
    return reference(bias=None, **inputs)


OPERATORS: dict[str, Operator] = {
    "eager": eager,
    "lion_kernels-torch": partial(mixture_of_lora_linear, bias=None, backend="torch"),
}
if peft is not None:
    OPERATORS["PEFT"] = with_peft
if DEVICE.type == "cuda":
    OPERATORS["torch.compile"] = torch.compile(plain)
    OPERATORS["lion_kernels-triton"] = partial(mixture_of_lora_linear, bias=None, backend="triton")
SIZES = [(4, 1), (1, 320)] if DEVICE.type == "cpu" else [(4, 1), (1, 320), (51, 320)]


@pytest.mark.parametrize("operator", OPERATORS)
@pytest.mark.parametrize("backward", [False, True], ids=["forward", "forward+backward"])
@pytest.mark.parametrize(("batch", "length"), SIZES)
@pytest.mark.parametrize("form", ["soft", "one each"])
def bench(benchmark: Callable, form: str, batch: int, length: int, backward: bool, operator: str) -> None:
    if operator == "PEFT" and form == "soft":
        pytest.skip("PEFT weighs no adapters by row")
    measure(
        benchmark,
        OPERATORS[operator],
        make_inputs(form, batch, length),
        plain=plain,
        reference=plain,
        costs=cost(batch * length, CHANNELS, CHANNELS, EXPERTS if form == "soft" else 1, RANK, torch.bfloat16),
        backward=backward,
        title=f"mixture_of_lora_linear, {form}, {batch} x {length} x {CHANNELS}, E {EXPERTS}, r {RANK}",
    )
