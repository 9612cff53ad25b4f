"""Models of transformers 5, which are configured by their configurations: `LionForCausalLM`, and T5 in any model.

Models may share a configuration, so the modules of the rewired model get a copy of it.
"""

import copy
from collections.abc import Iterable
from typing import Any

from torch import nn
from transformers import PreTrainedConfig, T5Config
from transformers.models.instructblip.modeling_instructblip import InstructBlipQFormerMultiHeadAttention
from transformers.models.t5.modeling_t5 import T5Attention, T5Stack

from lion_fast.drop_in.rewiring import Rewirer
from lion_fast.model.adapters import MixtureOfAdapters
from lion_fast.model.aggregator import LionAggregatorProjections
from lion_fast.model.attention import KERNEL_ATTENTION, KERNEL_ATTENTION_TYPES
from lion_fast.model.kernel_modules import LionT5Attention, OnKernels, PrefixEmbedding, become, run_on_kernels
from lion_fast.model.vision import LionVisionAttention
from lion_fast.modeling_lion import LionForCausalLM

# Their configuration selects their attention; their class stays.
_ATTENTION_BY_CONFIG = (LionVisionAttention, LionAggregatorProjections, InstructBlipQFormerMultiHeadAttention)


def rewire_lion(rewirer: Rewirer, lion: LionForCausalLM) -> None:
    """Apply `kernel_backend=` of `from_pretrained` to the instance."""
    backend = rewirer.result.backend
    modules = list(lion.modules())
    configs = _give_own_configs(modules)
    for config in configs:
        if hasattr(config, "kernel_backend"):
            config.kernel_backend = backend
        if config.model_type in KERNEL_ATTENTION_TYPES and config._attn_implementation == "sdpa":
            config._attn_implementation = KERNEL_ATTENTION
    lion.config.share_settings()
    run_on_kernels(lion, backend)
    for module in modules:
        if "kernel_backend" in module.__dict__:  # also in models loaded with another backend
            module.__dict__["kernel_backend"] = backend
        if isinstance(module, MixtureOfAdapters):
            rewirer.list_rewired(module, "mixture_of_adapters")
        elif isinstance(module, _ATTENTION_BY_CONFIG):
            _list_attention(rewirer, module, "multi_scale_attention")
        elif isinstance(module, LionT5Attention):
            _list_attention(rewirer, module, module.operators)
        elif isinstance(module, OnKernels | PrefixEmbedding):
            rewirer.list_rewired(module, module.operators)


def rewire_t5_stack(rewirer: Rewirer, stack: T5Stack) -> None:
    """Run the attention of a T5 on the kernels, unless an implementation other than sdpa was requested."""
    attentions = [module for module in stack.modules() if type(module) is T5Attention]
    if stack.config._attn_implementation != "sdpa":
        for attention in attentions:
            rewirer.leave(attention, _requested_attention(stack.config))
        return
    for config in _give_own_configs(stack.modules()):
        if isinstance(config, T5Config):
            config._attn_implementation = KERNEL_ATTENTION
            config.kernel_backend = rewirer.result.backend
    for attention in attentions:
        become(LionT5Attention, attention, rewirer.result.backend)
        rewirer.list_rewired(attention, LionT5Attention.operators)


def _list_attention(rewirer: Rewirer, attention: Any, operators: str) -> None:
    if attention.config._attn_implementation == KERNEL_ATTENTION:
        rewirer.list_rewired(attention, operators)
    else:
        rewirer.leave(attention, _requested_attention(attention.config))


def _requested_attention(config: PreTrainedConfig) -> str:
    return f"attn_implementation={config._attn_implementation!r} was asked for"


def _give_own_configs(modules: Iterable[nn.Module]) -> list[Any]:
    """Give the modules copies of their configurations, one per shared one; return all copies and their parts."""
    memo: dict[int, Any] = {}
    copies: dict[int, Any] = {}
    for module in modules:
        config = module.__dict__.get("config")
        if isinstance(config, PreTrainedConfig):
            module.__dict__["config"] = own = copy.deepcopy(config, memo)
            copies[id(own)] = own
    return list(copies.values())
