"""The original LION's modules with a forward on lion_kernels.

The original has its own copies of BLIP-2's vision tower and Q-Former and of a T5 of transformers 4, so modules are
recognised by their attributes, not by the origin of their classes. A call with arguments that the kernels do not
support, such as a request for attention weights, uses the replaced class's forward.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lion_fast.drop_in.rewiring import is_plain_linear
from lion_fast.model.attention import attention_on_kernels, biased_attention_on_kernels, on_kernels
from lion_fast.model.kernel_modules import OnKernels, ResidualOutputOnKernels
from lion_kernels import mixture_of_adapters
from lion_kernels.attention.bias import relative_position_bucket


class AdapterRouterOnKernels(OnKernels):
    """residual + ratio1[task] * A0(x) + ratio2[task] * A1(x), or one adapter alone; the task is `router_idx`."""

    operators = "mixture_of_adapters"
    adapters: Any
    num_adapters: int
    router_idx: int | None  # set by the original on every router before a batch
    router_ratio1: Tensor
    router_ratio2: Tensor

    def is_supported(self, hidden_states: Tensor) -> bool:
        dropped = any(adapter.dropout > 0 for adapter in self.adapters) and self.training
        # LoRA, which may have come later, replaces linear layers; their weights alone are not what they compute.
        plain = all(is_plain_linear(linear) for a in self.adapters for linear in (a.down_proj, a.up_proj))
        return self.router_idx in (0, 1) and not dropped and plain

    def runs_on_kernels(self, x: Tensor) -> bool:
        return on_kernels(self.kernel_backend, x.device) and self.is_supported(x)

    def gate(self, x: Tensor) -> Tensor:
        """Return weights [1] of a single adapter, or factors [2, D] of the batch's task, times the adapters' scales."""
        scales = torch.stack([torch.as_tensor(adapter.scale, device=x.device).squeeze() for adapter in self.adapters])
        if self.num_adapters == 1:
            return scales
        ratios = torch.stack([self.router_ratio1[self.router_idx], self.router_ratio2[self.router_idx]])
        return ratios * scales.unsqueeze(1)

    def kernel_forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        gate = self.gate(x)
        task_ids = None
        if self.num_adapters > 1:  # the batch has one task, the only one in the gate
            gate, task_ids = gate.unsqueeze(0), torch.zeros(1, dtype=torch.long, device=x.device)
        # Under autocast, the original's float32 scales and ratios make its result float32, and so the residual stream.
        wider = torch.promote_types(x.dtype if residual is None else residual.dtype, gate.dtype)
        down, up = [a.down_proj for a in self.adapters], [a.up_proj for a in self.adapters]
        return mixture_of_adapters(
            x.to(wider),
            torch.stack([linear.weight for linear in down]),
            torch.stack([linear.bias for linear in down]),
            torch.stack([linear.weight for linear in up]),
            torch.stack([linear.bias for linear in up]),
            gate,
            task_ids=task_ids,
            residual=None if residual is None else residual.to(wider),
            backend=self.kernel_backend,
        )


class AdaptedLayerFFOnKernels(OnKernels):
    """T5's feed-forward layer with a router beside it; the router adds to the layer's result as it writes its own."""

    operators = "mixture_of_adapters"
    adapter: Any
    layer_norm: nn.Module
    DenseReluDense: nn.Module
    dropout: nn.Module

    def forward(self, hidden_states: Tensor) -> Tensor:
        if self.adapter.runs_on_kernels(hidden_states):
            return self.adapter.kernel_forward(hidden_states, self._fed_forward(hidden_states))
        adapted = self.adapter(hidden_states)  # first, as in the original: gradients are added in the reverse order
        return self._fed_forward(hidden_states) + adapted

    def _fed_forward(self, hidden_states: Tensor) -> Tensor:
        return hidden_states + self.dropout(self.DenseReluDense(self.layer_norm(hidden_states)))


class VisionAttentionOnKernels(OnKernels):
    """EVA's self-attention from one packed projection, whose keys have no bias."""

    operators = "multi_scale_attention"
    num_heads: int
    scale: float
    qkv: nn.Linear
    q_bias: Tensor | None
    v_bias: Tensor
    attn_drop: nn.Dropout
    proj: nn.Module
    proj_drop: nn.Module

    def forward(self, x: Tensor, rel_pos_bias: Tensor | None = None) -> Tensor:
        if rel_pos_bias is not None or not on_kernels(self.kernel_backend, x.device):
            return _replaced(self).forward(x, rel_pos_bias)
        bias = None
        if self.q_bias is not None:
            bias = torch.cat([self.q_bias, torch.zeros_like(self.v_bias), self.v_bias])
        qkv = F.linear(x, self.qkv.weight, bias)
        query, key, value = qkv.unflatten(-1, (3, self.num_heads, -1)).unbind(2)
        how = {"dropout_p": self.attn_drop.p if self.training else 0.0, "backend": self.kernel_backend}
        return self.proj_drop(self.proj(attention_on_kernels(query, key, value, None, self.scale, **how).flatten(2)))


class BertAttentionOnKernels(OnKernels):
    """BERT's attention without its output projection, of the Q-Former and the aggregator."""

    operators = "multi_scale_attention"
    query: nn.Module
    key: nn.Module
    value: nn.Module
    num_attention_heads: int
    dropout: nn.Dropout

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        head_mask: Tensor | None = None,
        encoder_hidden_states: Tensor | None = None,
        encoder_attention_mask: Tensor | None = None,
        past_key_value: Any = None,
        output_attentions: bool = False,
    ) -> tuple:
        cross = encoder_hidden_states is not None
        mask = encoder_attention_mask if cross else attention_mask
        wants_weights = output_attentions or head_mask is not None or (cross and getattr(self, "save_attention", False))
        on = on_kernels(self.kernel_backend, hidden_states.device) and _is_padding(mask) and past_key_value is None
        if wants_weights or not on:
            return _replaced(self).forward(
                hidden_states,
                attention_mask,
                head_mask,
                encoder_hidden_states,
                encoder_attention_mask,
                past_key_value,
                output_attentions,
            )
        context = encoder_hidden_states if cross else hidden_states
        key, value, query = (
            states.unflatten(-1, (self.num_attention_heads, -1))
            for states in (self.key(context), self.value(context), self.query(hidden_states))
        )
        how = {"dropout_p": self.dropout.p if self.training else 0.0, "backend": self.kernel_backend}
        attended = attention_on_kernels(query, key, value, _unmasked(mask), None, **how).flatten(2)
        # BLIP-2 always returns the keys and values, transformers only as part of a decoder.
        returns_past = getattr(self, "is_decoder", True)
        return (attended, (key.transpose(1, 2), value.transpose(1, 2))) if returns_past else (attended,)


class BertOutputOnKernels(ResidualOutputOnKernels):
    def kernel_forward(self, hidden_states: Tensor, residual: Tensor) -> Tensor:
        # Autocast on CUDA runs LayerNorm in float32, so its result and the residual stream are float32.
        if residual.is_cuda and torch.is_autocast_enabled("cuda"):
            residual = residual.float()
        return super().kernel_forward(hidden_states, residual)


class T5AttentionOnKernels(OnKernels):
    """The attention of a T5 of transformers 4. Layers pass on the table of biases instead of the bias of all pairs."""

    operators = "relative_bias_attention, multi_scale_attention"
    is_decoder: bool
    has_relative_attention_bias: bool
    relative_attention_num_buckets: int
    relative_attention_max_distance: int
    relative_attention_bias: nn.Embedding
    n_heads: int
    dropout: float
    q: nn.Module
    k: nn.Module
    v: nn.Module
    o: nn.Module

    def forward(
        self,
        hidden_states: Tensor,
        mask: Tensor | None = None,
        key_value_states: Tensor | None = None,
        position_bias: Tensor | None = None,
        past_key_value: tuple[Tensor, Tensor] | None = None,
        layer_head_mask: Tensor | None = None,
        query_length: int | None = None,
        use_cache: bool = False,
        output_attentions: bool = False,
    ) -> tuple:
        cross = key_value_states is not None
        on = on_kernels(self.kernel_backend, hidden_states.device) and _is_padding(mask)
        dense = not cross and position_bias is not None and position_bias.dim() == 4  # from a layer not on the kernels
        if not on or dense or layer_head_mask is not None or output_attentions:
            if not cross:
                past = 0 if past_key_value is None else past_key_value[0].shape[2]
                mask, position_bias = self._all_pairs(hidden_states.shape[1], past, mask, position_bias)
            return _replaced(self).forward(
                hidden_states,
                mask,
                key_value_states,
                position_bias,
                past_key_value,
                layer_head_mask,
                query_length,
                use_cache,
                output_attentions,
            )
        query = self.q(hidden_states).unflatten(-1, (self.n_heads, -1))
        key, value = self._keys_and_values(hidden_states, key_value_states, past_key_value)
        how: dict[str, Any] = {"dropout_p": self.dropout if self.training else 0.0, "backend": self.kernel_backend}
        if cross:
            attended = attention_on_kernels(query, key, value, _unmasked(mask), 1.0, **how)
            # The kernels read the mask; a layer not on them receives what the original would pass on.
            position_bias = query.new_zeros(1, 1, 1, 1) if mask is None else mask
        else:
            position_bias = self._table(hidden_states) if position_bias is None else position_bias
            causal = self.is_decoder and mask is not None
            attended = biased_attention_on_kernels(
                self, query, key, value, position_bias, _unmasked(mask), causal=causal, **how
            )
        present = (key.transpose(1, 2), value.transpose(1, 2)) if self.is_decoder and use_cache else None
        return self.o(attended.flatten(2)), present, position_bias

    def _keys_and_values(
        self, hidden_states: Tensor, key_value_states: Tensor | None, past: tuple[Tensor, Tensor] | None
    ) -> tuple[Tensor, Tensor]:
        """Return keys and values, [B, Lk, H, Dh] each; `past` has the cache's layout, [B, H, Lk, Dh]."""
        if key_value_states is not None and past is not None:
            return past[0].transpose(1, 2), past[1].transpose(1, 2)
        context = hidden_states if key_value_states is None else key_value_states
        key, value = (project(context).unflatten(-1, (self.n_heads, -1)) for project in (self.k, self.v))
        if past is not None:
            key, value = (torch.cat([p.transpose(1, 2), x], 1) for p, x in zip(past, (key, value), strict=True))
        return key, value

    def _table(self, hidden_states: Tensor) -> Tensor:
        """Return biases [num_buckets, H], zero if the layer has none and received none."""
        if not self.has_relative_attention_bias:
            return hidden_states.new_zeros(self.relative_attention_num_buckets, self.n_heads)
        return self.relative_attention_bias(
            torch.arange(self.relative_attention_num_buckets, device=hidden_states.device)
        )

    def _all_pairs(
        self, queries: int, past: int, mask: Tensor | None, position_bias: Tensor | None
    ) -> tuple[Tensor | None, Tensor | None]:
        """Return mask and bias as in the original, from those passed on by a layer and the stack on the kernels."""
        keys = past + queries
        if mask is not None and self.is_decoder and mask.shape[2] < queries:  # padding only
            future = torch.ones(queries, keys, dtype=torch.bool, device=mask.device).triu(past + 1)
            mask = mask.masked_fill(future, torch.finfo(mask.dtype).min)
        if position_bias is not None and position_bias.dim() == 2:
            positions = torch.arange(keys, device=position_bias.device)
            buckets = relative_position_bucket(
                positions - positions[past:, None],
                self.relative_attention_num_buckets,
                self.relative_attention_max_distance,
                not self.is_decoder,
            )
            position_bias = position_bias[buckets].movedim(-1, 0).unsqueeze(0)
            position_bias = position_bias if mask is None else position_bias + mask
        return mask, position_bias


class T5StackOnKernels:
    """A T5 stack of transformers 4 whose decoder passes only padding to its layers; the kernels apply causality."""

    operators = "the mask of relative_bias_attention"
    kernel_backend: str
    is_decoder: bool

    def get_extended_attention_mask(self, attention_mask: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        this: Any = self
        if self.is_decoder and attention_mask.dim() == 2 and on_kernels(self.kernel_backend, attention_mask.device):
            return this.invert_attention_mask(attention_mask)
        return super().get_extended_attention_mask(attention_mask, *args, **kwargs)  # type: ignore[misc]


def _replaced(module: OnKernels) -> Any:
    """Return the module as its previous class, to call its forward."""
    return super(OnKernels, module)


def _unmasked(mask: Tensor | None) -> Tensor | None:
    """Return where an additive padding mask [B, 1, 1, Lk] lets keys count, bool [B, Lk]."""
    return None if mask is None else mask[:, 0, 0] == 0


def _is_padding(mask: Tensor | None) -> bool:
    """Return whether an additive mask is the same for all heads and queries."""
    return mask is None or (mask.dim() == 4 and tuple(mask.shape[1:3]) == (1, 1))
