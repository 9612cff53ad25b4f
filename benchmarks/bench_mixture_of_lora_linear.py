"""The linear layer with a mixture of LoRA, forward, backward and both, compared with its formula and PEFT's layer.

`pytest benchmarks` prints the table. The base is a 2048-wide language model with eight adapters of rank 8 and a frozen
weight; tokens, channels, adapters and rank vary one at a time. Soft routing weights every adapter in every row; "one
each" assigns one adapter to each sequence, as in PEFT's batches of mixed adapters (measured if PEFT is installed).
"""

import functools
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.bench_mixture_of_adapters import gate_of
from benchmarks.harness.side_by_side import DEVICE, DTYPE, Inputs, Operator, Shape, Suite, draw, leaf, seeded
from benchmarks.shapes import ON_GPU, by_backend, compare_peers, mixtures, sequences
from lion_kernels import mixture_of_lora_linear
from lion_kernels.mixture_of_lora_linear import cost
from lion_reference import mixture_of_lora_linear as reference

BASE = {"channels": 2048, "experts": 8, "rank": 8}
try:
    import peft
except ImportError:
    peft = None


def make_inputs(shape: Shape) -> Inputs:
    generator = seeded()
    batch, length = sequences(shape)
    channels, experts, rank = (shape[name] for name in BASE)

    randn = partial(draw, generator=generator)
    inputs = {
        "x": leaf(randn(batch, length, channels)),
        "weight": leaf(randn(channels, channels, scale=channels**-0.5)).requires_grad_(False),
        "lora_a": leaf(randn(experts, rank, channels, scale=channels**-0.5)),
        "lora_b": leaf(randn(experts, channels, rank, scale=rank**-0.5)),
    }
    if "gate" in shape:
        return {**inputs, **gate_of(shape, generator)}
    if shape["routing"] == "soft":
        return {**inputs, "gate": leaf(randn(batch, length, experts).softmax(-1))}
    ids = torch.randint(0, experts, (batch, 1), generator=generator, device=DEVICE)
    return {**inputs, "gate": torch.ones(batch, 1, device=DEVICE, dtype=DTYPE), "expert_ids": ids}


def eager(
    x: Tensor, weight: Tensor, lora_a: Tensor, lora_b: Tensor, gate: Tensor, expert_ids: Tensor | None = None
) -> Tensor:
    """Compute adapter by adapter over all rows."""
    out = F.linear(x, weight)
    for e in range(len(lora_a)):
        factor = gate[..., e : e + 1] if expert_ids is None else (gate * (expert_ids == e)).unsqueeze(-1)
        out = out + factor * F.linear(F.linear(x, lora_a[e]), lora_b[e])
    return out


def with_peft(x: Tensor, weight: Tensor, lora_a: Tensor, lora_b: Tensor, gate: Tensor, expert_ids: Tensor) -> Tensor:
    """Run PEFT's layer on the same parameters, as PEFT's model does for a batch of mixed adapters."""
    experts, rank, channels = lora_a.shape
    layer = _peft_layer(channels, experts, rank)
    names = [str(e) for e in expert_ids[:, 0].tolist()]
    parameters = {"base_layer.weight": weight}
    for e in range(experts):
        parameters |= {f"lora_A.{e}.weight": lora_a[e], f"lora_B.{e}.weight": lora_b[e]}
    return torch.func.functional_call(layer, parameters, (x,), {"adapter_names": names})


@functools.cache
def _peft_layer(channels: int, experts: int, rank: int) -> nn.Module:
    assert peft is not None
    model = nn.ModuleDict({"linear": nn.Linear(channels, channels, bias=False)})
    for e in range(experts):
        config = peft.LoraConfig(r=rank, lora_alpha=rank, target_modules=["linear"])
        peft.inject_adapter_in_model(config, model, adapter_name=str(e))
    return model["linear"].to(DEVICE, DTYPE).eval()


def plain(**inputs: Tensor) -> Tensor:
    return reference(bias=None, **inputs)


PEERS: dict[str, Operator] = {
    "eager": eager,
    "torch.compile": torch.compile(plain),
    **by_backend(mixture_of_lora_linear, bias=None),
}
if peft is not None:
    PEERS["PEFT"] = with_peft
SHAPES = [{"routing": "soft", **shape} for shape in mixtures(BASE)]
# The cost of one adapter per sequence does not depend on their number; on a CPU only the tokens vary.
ALIKE = ("experts",) if ON_GPU else tuple(BASE)
SHAPES += [{"routing": "one each", **shape} for shape in mixtures(BASE) if all(shape[n] == BASE[n] for n in ALIKE)]


def suite(shape: Shape) -> Suite:
    channels, experts, rank = (shape[name] for name in BASE)
    batch, length = sequences(shape)
    chosen = 1 if shape.get("routing") == "one each" else shape.get("chosen", experts)
    costs = cost(batch * length, channels, channels, chosen, rank, DTYPE)
    left_out = {"PEFT"} if shape.get("routing") == "soft" else set()  # PEFT has no weights per row
    operators = {name: peer for name, peer in PEERS.items() if name not in left_out}
    return Suite("mixture_of_lora_linear", operators, plain, plain, partial(make_inputs, shape), costs)


bench = compare_peers(suite, SHAPES, BASE)
