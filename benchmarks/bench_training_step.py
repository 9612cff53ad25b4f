"""A step of the joint stage: the original's eager form, `torch.compile` of it, whole or by block, and this project's.

`pytest benchmarks/bench_training_step.py` prints the table. On a GPU it is LION-FlanT5-XL with random weights, as in
`lion-fast train` (frozen parts in bfloat16, the rest in float32 under autocast, dropout on), with 16 and 64 images; on
a CPU a small model in fp32 without `torch.compile`, as a functional check. A step is the loss, its gradients and
AdamW's update. `floor_seconds` is the time of the matrix products alone at this device's measured rate, so its share of
the time is the share of peak arithmetic; recomputation by checkpointing is not counted. Peak memory includes weights
and optimizer.

With 64 images, eager exceeds the memory of one GPU: a peer out of memory has no time and says so, and the last case
recomputes blocks in backward for all peers. `LION_STEP_PICTURES=16` excludes the other cases, and
`LION_STEP_PEERS="original,lion_fast"` other peers. Blocks compiled one by one share their compilation.
"""

import functools
import gc
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from benchmarks import bench_model
from benchmarks.bench_model import BACKENDS, DTYPE, ON_GPU, SIZES, one_sample
from benchmarks.harness.memory import peak_bytes
from benchmarks.harness.side_by_side import DEVICE, INTERLEAVED, alternate, rates, report, skip_after_deadline
from benchmarks.harness.work import work
from benchmarks.original import original_lion
from lion_fast import LionForCausalLM
from lion_fast.check.timing import quantiles
from lion_fast.training.memory import checkpoint_blocks
from lion_kernels.core.cost import Cost, floor_seconds

HALF = DTYPE.itemsize < 4
BY_BLOCK = "torch.compile by block"
QUICK = ("original", "lion_fast")
DEFAULT_PEERS = (*QUICK, *((BY_BLOCK, "torch.compile") if ON_GPU else ()))
PEERS = tuple(filter(None, os.environ.get("LION_STEP_PEERS", "").split(","))) or DEFAULT_PEERS
PICTURES = (16, 64) if ON_GPU else (2, 4)
CASES = [(pictures, False) for pictures in PICTURES] + [(PICTURES[-1], True)]
CHOSEN = os.environ.get("LION_STEP_PICTURES")
SECONDS = float(os.environ.get("LION_STEP_SECONDS", "60" if ON_GPU else "4"))
pytestmark = INTERLEAVED


@dataclass
class Comparison:
    """The measurements of each peer; `problems` states why a peer has no time."""

    floor: float
    problems: dict[str, Exception] = field(default_factory=dict)
    peaks: dict[str, int] = field(default_factory=dict)
    times: dict[str, list[float]] = field(default_factory=dict)


def with_dropout(sizes: dict[str, Any]) -> dict[str, Any]:
    """Set dropout as published: 0.1 everywhere."""
    rates = {"hidden_dropout_prob": 0.1, "attention_probs_dropout_prob": 0.1}
    parts = {name: {**sizes[name], **rates} for name in ("qformer_config", "aggregator_config")}
    return {**sizes, **parts, "text_config": {**sizes["text_config"], "dropout_rate": 0.1}}


@functools.cache
def models() -> dict[str, LionForCausalLM]:
    """Return ours and the original's forms, which share the frozen parameters."""
    ours = bench_model.build(BACKENDS[-1], with_dropout(SIZES))
    for parameter in ours.parameters():
        if not parameter.requires_grad:
            parameter.data = parameter.data.to(DTYPE)
    found = {"original": original_of(ours), "lion_fast": ours}
    if BY_BLOCK in PEERS:
        found[BY_BLOCK] = original_of(ours)
        compile_blocks(found[BY_BLOCK])
    return found


def original_of(ours: LionForCausalLM) -> LionForCausalLM:
    original = original_lion(ours)
    frozen = {name: p for name, p in ours.named_parameters() if not p.requires_grad}
    for name, parameter in original.named_parameters():
        if name in frozen:
            parameter.data = frozen[name].data
    return original


def compile_blocks(module: nn.Module) -> None:
    """Compile each repeated block separately, in place; blocks of one class share their compilation."""
    for child in module.children():
        if isinstance(child, nn.ModuleList) and len(child) > 1:
            for block in child:
                block.compile()
        else:
            compile_blocks(child)


def model_of(peer: str) -> LionForCausalLM:
    return models().get(peer, models()["original"])


def loss_of(call: Callable[..., Any], batch: dict[str, Tensor]) -> Tensor:
    with torch.autocast(DEVICE.type, dtype=DTYPE, enabled=HALF):
        return call(**batch).loss


def make_step(peer: str, batch: dict[str, Tensor]) -> tuple[Callable[[], Tensor], Callable[[], int]]:
    """Return a step, which returns its loss, and a function for the bytes that the peer holds between steps."""
    model = model_of(peer).train()
    call: Any = torch.compile(model) if peer == "torch.compile" else model
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-6, fused=ON_GPU or None)

    def step() -> Tensor:
        loss = loss_of(call, batch)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss.detach()

    def held() -> int:
        moments = [value for state in optimizer.state.values() for value in state.values()]
        return sum(tensor.nbytes for tensor in (*model.parameters(), *moments))

    return step, held


@functools.cache
def error_and_bound() -> tuple[float, float]:
    """Return the difference between our loss and the original's before any step, without dropout, and its bound.

    Tests check the gradients, which are chaotic with random weights. In fp32, those of the small model differ between
    both forms by 5e-3 to 3e-2, depending on the CPU. Losses of these pixels differ by 4e-6.
    """
    models()
    torch.manual_seed(0)  # of the pixels: a ReLU near zero may flip in one form and not in the other
    batch = one_sample(min(PICTURES))
    with torch.no_grad():
        ours, original = (loss_of(models()[name].eval(), batch).item() for name in ("lion_fast", "original"))
    return abs(ours - original) / abs(original), 2e-2 if HALF else 1e-5


@functools.cache
def flops_per_image() -> int:
    """Return the operations of all matrix products, forward and backward."""
    model = models()["original"].train()
    flops = work(lambda: loss_of(model, one_sample(1)).backward(), ()).flops
    model.zero_grad()
    return flops


def together(peer: str) -> tuple[str, ...]:
    """Return the peers that take turns; slow compilers run after the others, whose times are kept if time runs out."""
    return tuple(name for name in QUICK if name in PEERS) if peer in QUICK else ("original", peer)


@functools.lru_cache(maxsize=1)
def compare(pictures: int, checkpointed: bool, peers: tuple[str, ...]) -> Comparison:
    error, bound = error_and_bound()
    assert error <= bound, f"wrong loss (relative error {error:.1e}, allowed {bound:.1e}), so no time"
    flops = pictures * flops_per_image()
    found = Comparison(floor_seconds(Cost(0, flops), rates(), DTYPE))
    if checkpointed:  # the last case, so it stays enabled
        for model in models().values():
            checkpoint_blocks(model)
    batch, steps = one_sample(pictures), {}
    losses: dict[str, float] = {}
    for peer in peers:
        step, held = make_step(peer, batch)
        try:
            losses[peer] = step().item()
            found.peaks[peer] = held() + peak_bytes(step, DEVICE)
            steps[peer] = step
        except Exception as problem:
            found.problems[peer] = problem.with_traceback(None)  # its frames hold allocations
            for model in models().values():
                model.zero_grad()
        gc.collect()
        torch.cuda.empty_cache()
    for peer, loss in losses.items():  # random numbers differ, so the losses are only similar
        assert loss == pytest.approx(losses.get("original", loss), rel=0.05), f"{peer} has another loss, so no time"
    found.times = alternate(steps, SECONDS)
    return found


@pytest.mark.parametrize("peer", PEERS)
@pytest.mark.parametrize(("pictures", "checkpointed"), CASES)
def bench(benchmark: Callable, pictures: int, checkpointed: bool, peer: str) -> None:
    if CHOSEN is not None and str(pictures) != CHOSEN:
        pytest.skip(f"LION_STEP_PICTURES={CHOSEN} leaves it out")
    skip_after_deadline()
    found = compare(pictures, checkpointed, together(peer))
    if peer in found.problems:
        if peer == "lion_fast":
            raise found.problems[peer]
        pytest.skip(f"{peer} has no time here: {' '.join(str(found.problems[peer]).split())[:200]}")
    error, bound = error_and_bound()
    report(
        benchmark,
        found.times,
        peer,
        baseline="original",
        group=f"training step, {pictures} pictures{', checkpointed' if checkpointed else ''}",
        suite=f"training_step_{pictures}",  # one file per suite, because each may be measured separately
        shape={"pictures": pictures, "checkpointed": checkpointed},
        floor_seconds=found.floor,
        peak_bytes=found.peaks[peer],
        **({"error": error, "bound": bound} if peer == "lion_fast" else {}),
        images_per_second=pictures / quantiles(found.times[peer]).median,
    )
