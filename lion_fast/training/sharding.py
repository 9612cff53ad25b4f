"""A model's parameters shared out over processes with FSDP2, and gathered again."""

from typing import Any, Literal

import torch
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

from lion_fast.modeling_lion import LionForCausalLM


def shard(model: LionForCausalLM, precision: Literal["bf16", "fp32"]) -> LionForCausalLM:
    """Shard every block, then what is left, over all processes, in place.

    Under bf16 the trained parameters are gathered in bfloat16 and stay float32 in their shards; gradients are summed
    over processes in float32.
    """
    half = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    policy = half if precision == "bf16" else MixedPrecisionPolicy()
    for block in model.blocks():
        fully_shard(block, mp_policy=policy)
    fully_shard(model, mp_policy=policy)
    return model


def gathered_state(model: nn.Module) -> dict[str, Any]:
    """All of a sharded model's state, whole and on the CPU, on the first process; on the others nothing.

    What has several names, as T5's embeddings, comes under the first: the copies no longer show that they are one.
    """
    state = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    own = {name for name, _ in (*model.named_parameters(), *model.named_buffers())}
    return {name: value for name, value in state.items() if name in own}
