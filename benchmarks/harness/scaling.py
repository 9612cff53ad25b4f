"""The cost model of GPUs without measurements: curves of floors, and scaling to many GPUs.

Everything here is arithmetic on `lion_kernels`' costs and the constants below, and not a measurement of this project.
"""

from dataclasses import dataclass

import torch

from lion_fast.configuration_lion import LionConfig
from lion_fast.modeling_lion import LionForCausalLM
from lion_fast.training.stages import STAGES, freeze_for_stage
from lion_kernels.core.cost import H200, floor_seconds
from lion_kernels.mixture_of_adapters import cost as adapters_cost
from lion_kernels.multi_scale_attention import cost as attention_cost

DTYPE = torch.bfloat16
# Bytes per second from one GPU to the next in a ring, by the vendors' data sheets: NVLink of the Hopper generation in
# one direction, and one port of 400 Gbit/s per GPU between machines.
NVLINK, NETWORK = 450e9, 50e9
HOP_SECONDS = {NVLINK: 3e-6, NETWORK: 10e-6}  # latency of a message; an assumption
GPUS_IN_A_MACHINE = 8
REACHED = 0.5  # share of the matrix rate in a whole training step; an assumption
BATCH, PROMPT, ANSWER = 16, 128, 32  # images per GPU, and tokens of text


def adapters(tokens: int = 16384, channels: int = 2048, experts: int = 2, rank: int = 64) -> tuple[float, float]:
    """Return the seconds of forward and backward at their floors on an H200 in bf16."""
    forward, backward = (
        floor_seconds(cost, H200, DTYPE) for cost in adapters_cost(tokens, channels, experts, rank, DTYPE)
    )
    return forward, backward


def vision_attention(image_size: int, batch: int = 64) -> float:
    """Return the seconds of one layer of EVA's attention, forward, at its floor on an H200 in bf16."""
    length = 1 + (image_size // 14) ** 2
    q = torch.empty(batch, length, 16, 88, dtype=DTYPE, device="meta")
    return floor_seconds(attention_cost(q, [q])[0], H200, DTYPE)


@dataclass(frozen=True)
class Step:
    """A joint training step of LION-FlanT5-XL on one GPU."""

    flops: float
    trained_bytes: int

    @property
    def seconds(self) -> float:
        return self.flops / (REACHED * H200.flops_per_second["bfloat16"])


def joint_step() -> Step:
    """Return the joint step, with two operations per parameter and token in forward and two for the input's gradient.

    Trained weights have two more for their gradient. Attention's own products, a few per cent of the total, are
    omitted.
    """
    with torch.device("meta"):
        model = LionForCausalLM(LionConfig(kernel_backend="torch"))
    freeze_for_stage(model, STAGES[-1])
    text = model.language_model
    visual = model.config.num_visual_tokens
    flops = 2 * _count(model.vision_model) * 257  # frozen, with nothing trained before it
    flops += 6 * (_count(model.qformer) - _count(model.qformer.embeddings)) * (32 + 32)
    flops += 6 * (_count(model.aggregator) + _count(model.aggregator_projection)) * 257
    flops += 4 * _count(text.encoder.block) * (visual + PROMPT)  # frozen except for the adapters: two products of three
    flops += 4 * (_count(text.decoder.block) + _count(text.lm_head)) * ANSWER
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    return Step(BATCH * float(flops), trained * DTYPE.itemsize)


def _count(module: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def exchange_seconds(gpus: int, nbytes: int) -> float:
    """Return the time of a ring all-reduce: every GPU sends 2 (n - 1) / n of `nbytes`, over the slowest link."""
    if gpus == 1:
        return 0.0
    link = NVLINK if gpus <= GPUS_IN_A_MACHINE else NETWORK
    return 2 * (gpus - 1) * (nbytes / gpus / link + HOP_SECONDS[link])


def efficiency(gpus: int, step: Step) -> tuple[float, float]:
    """Return the share of `gpus` times one GPU's speed, without and with overlap.

    Without overlap, the gradients' exchange waits for backward; with it, backward (half of the step) hides the
    exchange.
    """
    exchange = exchange_seconds(gpus, step.trained_bytes)
    waiting = step.seconds / (step.seconds + exchange)
    hidden = step.seconds / (step.seconds + max(0.0, exchange - step.seconds / 2))
    return waiting, hidden
