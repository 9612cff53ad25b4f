"""What a GPU could do by the cost model, where nobody measured one: curves of floors, and of many GPUs.

Everything here is arithmetic on `lion_kernels`' costs and on the constants below; nothing of it is a measurement of
this project.
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
# Bytes a second that one GPU sends to the next in a ring, by their makers' data sheets: NVLink of the Hopper generation
# in one direction, and one port of 400 Gbit/s a GPU between machines.
NVLINK, NETWORK = 450e9, 50e9
HOP_SECONDS = {NVLINK: 3e-6, NETWORK: 10e-6}  # before a message's first byte arrives; an assumption
GPUS_IN_A_MACHINE = 8
REACHED = 0.5  # of the matrix rate by a whole training step; an assumption
BATCH, PROMPT, ANSWER = 16, 128, 32  # pictures a GPU, and tokens of text


def adapters(tokens: int = 16384, channels: int = 2048, experts: int = 2, rank: int = 64) -> tuple[float, float]:
    """Seconds of forward and backward at their floors on an H200 in bf16."""
    forward, backward = (
        floor_seconds(cost, H200, DTYPE) for cost in adapters_cost(tokens, channels, experts, rank, DTYPE)
    )
    return forward, backward


def vision_attention(image_size: int, batch: int = 64) -> float:
    """Seconds of one layer of EVA's attention, forward, at its floor on an H200 in bf16."""
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
    """Two operations a parameter and token forward, as many for the gradient of the input, and again as many for the
    weight's where it is trained; attention's own products, a few per cent of it, are left out.
    """
    with torch.device("meta"):
        model = LionForCausalLM(LionConfig(kernel_backend="torch"))
    freeze_for_stage(model, STAGES[-1])
    text = model.language_model
    visual = model.config.num_visual_tokens
    flops = 2 * _count(model.vision_model) * 257  # frozen, and before it nothing is trained
    flops += 6 * (_count(model.qformer) - _count(model.qformer.embeddings)) * (32 + 32)
    flops += 6 * (_count(model.aggregator) + _count(model.aggregator_projection)) * 257
    flops += 4 * _count(text.encoder.block) * (visual + PROMPT)  # frozen but for the adapters: two products of three
    flops += 4 * (_count(text.decoder.block) + _count(text.lm_head)) * ANSWER
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    return Step(BATCH * float(flops), trained * DTYPE.itemsize)


def _count(module: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def exchange_seconds(gpus: int, nbytes: int) -> float:
    """A ring all-reduce of `nbytes`: every GPU sends 2 (n - 1) / n of them, over the slowest link of the ring."""
    if gpus == 1:
        return 0.0
    link = NVLINK if gpus <= GPUS_IN_A_MACHINE else NETWORK
    return 2 * (gpus - 1) * (nbytes / gpus / link + HOP_SECONDS[link])


def efficiency(gpus: int, step: Step) -> tuple[float, float]:
    """Share of `gpus` times one GPU's speed: where the gradients' exchange waits for backward, and where it hides
    behind it (half of the step)."""
    exchange = exchange_seconds(gpus, step.trained_bytes)
    waiting = step.seconds / (step.seconds + exchange)
    hidden = step.seconds / (step.seconds + max(0.0, exchange - step.seconds / 2))
    return waiting, hidden
