"""The rules that assign the modules of a foreign model to classes on the kernels, or give a reason not to.

A rule asks whether a module looks like one of its kind, and for an objection against rewiring it, if any.
"""

import re
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.parameter import is_lazy

from lion_fast.drop_in.original import (
    AdaptedLayerFFOnKernels,
    AdapterRouterOnKernels,
    BertAttentionOnKernels,
    BertOutputOnKernels,
    T5AttentionOnKernels,
    T5StackOnKernels,
    VisionAttentionOnKernels,
)
from lion_fast.drop_in.rewiring import Rewirer, calls_like, forward_takes, has_own_forward, is_plain_linear
from lion_fast.io.reading import brief
from lion_fast.model.kernel_modules import (
    DecoderRMSNormOnKernels,
    GatedGeluOnKernels,
    OnKernels,
    ResidualLayerNorm,
    RMSNormOnKernels,
    become,
)

LOOKED_FOR = (
    "LionForCausalLM, LoRA layers of PEFT, or by their attributes the original LION's adapter routers (adapters, "
    "num_adapters, router_idx), vision attention (qkv, q_bias, v_bias, proj), BERT attention (query, key, value) and "
    "outputs (dense, LayerNorm, dropout), T5's attention (q, k, v, o, n_heads), gated feed-forward (wi_0, wi_1, wo) "
    "and RMS norms (weight, variance_epsilon)"
)


class Rule(NamedTuple):
    """`looks` returns whether a module is of the kind, `objection` a reason against `kind`'s forward for it."""

    looks: Callable[[Any], bool]
    objection: Callable[[Any], str | None]
    kind: Any


def _has(*names: str) -> Callable[[Any], bool]:
    return lambda module: all(hasattr(module, name) for name in names)


def _router_objection(router: Any) -> str | None:
    for adapter in router.adapters:
        if not all(is_plain_linear(getattr(adapter, name, None)) for name in ("down_proj", "up_proj")):
            return "an adapter whose down_proj or up_proj is no nn.Linear, or has hooks"
        if adapter.down_proj.bias is None or adapter.up_proj.bias is None:
            return "an adapter without biases"
        if getattr(adapter, "adapter_layernorm_option", "none") != "none":
            return f"adapter_layernorm_option={adapter.adapter_layernorm_option!r}"
        if not isinstance(adapter.non_linear_func, nn.ReLU):
            return f"the activation is {type(adapter.non_linear_func).__name__}, not ReLU"
        if adapter._forward_hooks or adapter._forward_pre_hooks or has_own_forward(adapter):
            return "an adapter with hooks or a forward of its own"
    if router.num_adapters not in (1, 2) or router.num_adapters != len(router.adapters):
        return f"{router.num_adapters} adapters, where the original has 1 or 2"
    return None


def _vision_objection(attention: Any) -> str | None:
    if getattr(attention, "relative_position_bias_table", None) is not None:
        return "a relative position bias within windows"
    if not is_plain_linear(attention.qkv) or attention.qkv.bias is not None:
        return "qkv is no nn.Linear without bias"
    return None if calls_like(attention, VisionAttentionOnKernels) else "its forward does not take (x, rel_pos_bias)"


def _bert_objection(attention: Any) -> str | None:
    if not calls_like(attention, BertAttentionOnKernels):
        return "the attention of another transformers than the original's: choose attn_implementation when loading"
    if getattr(attention, "position_embedding_type", "absolute") not in (None, "absolute"):
        return f"position_embedding_type={attention.position_embedding_type!r}"
    if hasattr(attention, "require_contiguous_qkv"):
        return "the sdpa version, which is causal without a mask"
    return None


def _bert_output_objection(output: Any) -> str | None:
    norm = output.LayerNorm
    if type(norm) is not nn.LayerNorm or norm.weight is None or norm.bias is None or len(norm.normalized_shape) != 1:
        return "LayerNorm is no nn.LayerNorm of one dimension with weight and bias"
    if not norm.eps > 0:
        return f"eps={norm.eps!r} of LayerNorm is not positive"
    if not forward_takes(output, ["hidden_states", "input_tensor"]):
        return "its forward does not take (hidden_states, input_tensor)"
    return None


def _gated_objection(feed_forward: Any) -> str | None:
    probe = torch.linspace(-4, 4, 64)
    same = torch.allclose(feed_forward.act(probe), F.gelu(probe), rtol=0, atol=1e-6)
    return None if same else f"the activation is {type(feed_forward.act).__name__}, not the exact GELU"


@torch.no_grad()
def _norm_objection(norm: Any) -> str | None:
    weight = norm.weight
    if weight.is_meta:
        return "on the meta device"
    if not norm.variance_epsilon > 0:
        return f"variance_epsilon={norm.variance_epsilon!r} is not positive"
    if not forward_takes(norm, ["hidden_states"]):
        return "its forward does not take (hidden_states)"
    probe = torch.linspace(-2, 2, 2 * weight.numel(), device=weight.device).view(2, -1).to(weight.dtype)
    expected = F.rms_norm(probe.float(), weight.shape, weight.float(), norm.variance_epsilon)
    tolerance = 1e-5 if weight.dtype == torch.float32 else 2e-2
    same = torch.allclose(norm(probe).float(), expected, rtol=tolerance, atol=tolerance, equal_nan=True)
    return None if same else "no x / sqrt(mean(x^2) + eps) * weight"


def _looks_like_norm(module: Any) -> bool:
    weight = getattr(module, "weight", None)
    if not isinstance(weight, nn.Parameter) or is_lazy(weight):
        return False
    return hasattr(module, "variance_epsilon") and weight.dim() == 1


RULES = (
    Rule(_has("adapters", "num_adapters", "router_idx"), _router_objection, AdapterRouterOnKernels),
    Rule(
        _has("qkv", "q_bias", "v_bias", "proj", "attn_drop", "proj_drop", "scale", "num_heads"),
        _vision_objection,
        VisionAttentionOnKernels,
    ),
    Rule(
        _has("query", "key", "value", "dropout", "num_attention_heads", "attention_head_size"),
        _bert_objection,
        BertAttentionOnKernels,
    ),
    Rule(_has("dense", "LayerNorm", "dropout"), _bert_output_objection, BertOutputOnKernels),
    Rule(_has("wi_0", "wi_1", "wo", "act", "dropout"), _gated_objection, GatedGeluOnKernels),
    Rule(_looks_like_norm, _norm_objection, DecoderRMSNormOnKernels),
)


def rewire_by_structure(rewirer: Rewirer, known: set[nn.Module]) -> None:
    """Rewire the modules that match a rule, other than those already handled (`known`)."""
    modules = [module for module in rewirer.names if module not in known]
    for stack in filter(_has("block", "final_layer_norm", "get_extended_attention_mask"), modules):
        _rewire_t5_stack(rewirer, stack)
    for module in modules:
        rule = next((rule for rule in RULES if rule.looks(module)), None)
        if rule is not None and not isinstance(module, OnKernels):
            _rewire_by_rule(rewirer, module, rule)
    for layer in filter(_has("adapter", "DenseReluDense", "layer_norm", "dropout"), modules):
        if isinstance(layer.adapter, AdapterRouterOnKernels):
            _rewire_feed_forward_layer(rewirer, layer)
    _leave_the_rest(rewirer, modules)


def _leave_the_rest(rewirer: Rewirer, modules: list[nn.Module]) -> None:
    """List unhandled modules whose name says RMS norm, and innermost ones that say attention or feed-forward."""
    listed = {name for name, *_ in rewirer.result.rewired + rewirer.result.left}
    for module in modules:
        innermost = _is_called(module) and sum(map(_is_called, module.modules())) == 1
        if (innermost or type(module).__name__.endswith("RMSNorm")) and rewirer.names[module] not in listed:
            rewirer.leave(module, "no operator of lion_kernels has its mathematics")


def _is_called(module: nn.Module) -> bool:
    return re.search(r"(Attention|Mlp|MLP|FeedForward|DenseActDense)$", type(module).__name__) is not None


def _rewire_by_rule(rewirer: Rewirer, module: Any, rule: Rule) -> None:
    objection = "the instance has a forward of its own" if has_own_forward(module) else _objection(module, rule)
    if objection is not None:
        rewirer.leave(module, objection)
        return
    kind = rule.kind
    if kind is DecoderRMSNormOnKernels and type(module).__name__ == "T5LayerNorm":
        kind = RMSNormOnKernels  # rounds to the weight's dtype for any input dtype
    rewirer.rewire(module, kind)
    if kind is BertOutputOnKernels:
        become(ResidualLayerNorm, module.LayerNorm, rewirer.result.backend)


def _objection(module: Any, rule: Rule) -> str | None:
    """Return the rule's objection, or the error of a module that only looks like one of the kind."""
    try:
        return rule.objection(module)
    except Exception as error:
        return f"its check failed: {type(error).__name__}: {brief(error)}"


def _rewire_feed_forward_layer(rewirer: Rewirer, layer: Any) -> None:
    """Rewire a feed-forward layer; the original's forward on the instance would hide any class's."""
    own = layer.__dict__.get("forward")
    if getattr(getattr(own, "__func__", None), "__name__", "") != "forward_ffn_t5":
        rewirer.leave(layer, "its forward is not the original's forward_ffn_t5: the router adds in a call of its own")
        return
    del layer.__dict__["forward"]
    rewirer.rewire(layer, AdaptedLayerFFOnKernels)


def _rewire_t5_stack(rewirer: Rewirer, stack: Any) -> None:
    """Rewire all attention of a T5 stack or none, because its layers pass their biases on in one form."""
    blocks = stack.block.modules() if isinstance(stack.block, nn.Module) else ()
    attentions = [m for m in blocks if _has("q", "k", "v", "o", "n_heads", "has_relative_attention_bias")(m)]
    if not attentions or not calls_like(attentions[0], T5AttentionOnKernels):
        return
    objections = {objection for objection in map(_t5_objection, attentions) if objection}
    if has_own_forward(stack) or objections:
        for attention in attentions:
            rewirer.leave(attention, " and ".join(sorted(objections)) or "its stack has a forward of its own")
        return
    rewirer.rewire(stack, T5StackOnKernels)
    for attention in attentions:
        rewirer.rewire(attention, T5AttentionOnKernels)


def _t5_objection(attention: Any) -> str | None:
    if has_own_forward(attention):
        return "the instance has a forward of its own"
    if getattr(attention, "pruned_heads", None):
        return "pruned heads"
    return None if calls_like(attention, T5AttentionOnKernels) else "an attention of another kind in the stack"
