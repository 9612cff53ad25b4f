"""Sharding of a model's parameters over processes with FSDP2, and gathering them again."""

from typing import Any, Literal

import torch
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

from lion_fast.modeling_lion import LionForCausalLM


def shard(model: LionForCausalLM, precision: Literal["bf16", "fp32"]) -> LionForCausalLM:
    """Shard every block and then the remaining parameters over all processes, in place.

    With bf16, parameters are gathered in bfloat16, and the shards of trained parameters stay float32. Gradients are
    reduced over processes in float32.
    """
    half = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    policy = half if precision == "bf16" else MixedPrecisionPolicy()
    for block in model.blocks():
        fully_shard(block, mp_policy=policy)
    fully_shard(model, mp_policy=policy)
    return model


def gathered_state(model: nn.Module) -> dict[str, Any]:
    """Return the full state dict of a sharded model on the CPU of the first process, and an empty one on the others.

    A parameter with several names, such as T5's embedding, has its first name only, because its gathered copies no
    longer share storage.
    """
    state = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    own = {name for name, _ in (*model.named_parameters(), *model.named_buffers())}
    return {name: value for name, value in state.items() if name in own}
