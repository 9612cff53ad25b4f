"""Attention through transformers' registry of implementations (eager, sdpa, ...), with the kernels as one of them.

Importing this module registers `KERNEL_ATTENTION`. A part configured with it runs `multi_scale_attention`, or
`relative_bias_attention` for T5's biases, if `kernel_backend` resolves to Triton on the tensors' device. Otherwise it
runs PyTorch's sdpa with the masks, the call and the bits of the implementation "sdpa".
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedConfig, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import (
    bidirectional_mask_function,
    causal_mask_function,
    prepare_padding_mask,
    sdpa_mask,
)
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from lion_kernels import multi_scale_attention, relative_bias_attention, resolve_backend

KERNEL_ATTENTION = "lion_kernels"
# Model types that the kernels support; they do not support the causal rotary attention of the decoder-only families.
KERNEL_ATTENTION_TYPES = ("lion_vision", "lion_aggregator", "instructblip_qformer", "t5")


class AttendingModel(PreTrainedModel):
    """A model whose own attention, if it has any, is called by `attend`, which supports every implementation."""

    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True

    @classmethod
    def _can_set_attn_implementation(cls) -> bool:
        return True  # transformers would infer it from the text of the class's file, which does not name the interface


def on_kernels(kernel_backend: str, device: torch.device) -> bool:
    """Return whether a module with this `kernel_backend` runs lion_kernels on `device`.

    Raises:
        ValueError: `kernel_backend` is "triton" and no kernel can run on `device`.
    """
    return resolve_backend(kernel_backend, "the model", device) == "triton"


def attends_on_kernels(config: PreTrainedConfig, device: torch.device | str) -> bool:
    """Return whether the attention of a part with this configuration runs on the kernels."""
    return (
        config._attn_implementation == KERNEL_ATTENTION
        and config.model_type in KERNEL_ATTENTION_TYPES
        and on_kernels(getattr(config, "kernel_backend", "torch"), torch.device(device))
    )


def prefer_kernel_attention(config: PreTrainedConfig) -> None:
    """Set `KERNEL_ATTENTION` in the parts of a composed configuration that request no implementation.

    The composed configuration itself counts as a part: in `set_attn_implementation`, nested parts such as T5's encoder
    follow it.
    """
    parts = {"": config} | {name: getattr(config, name) for name in config.sub_configs}
    composed: Any = config
    composed._attn_implementation = {
        name: KERNEL_ATTENTION
        for name, part in parts.items()
        if part._attn_implementation is None and part.model_type in ("lion", *KERNEL_ATTENTION_TYPES)
    }


def attend(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, dropout: float = 0.0) -> Tensor:
    """Compute bidirectional attention without a mask, by the implementation that `module.config` names.

    Args:
        module: has `config` and `is_causal = False`.
        query: [B, L, H, Dh].
        key, value: [B, Lk, H, Dh].
        dropout: probability of dropping an attention weight; the caller passes 0 outside training.

    Returns:
        [B, L, H * Dh].
    """
    config: Any = module.config
    implementation = ALL_ATTENTION_FUNCTIONS.get_interface(config._attn_implementation, _eager)
    out, _ = implementation(
        module,
        query.transpose(1, 2),
        key.transpose(1, 2),
        value.transpose(1, 2),
        None,
        dropout=dropout,
        scaling=query.shape[-1] ** -0.5,
    )
    return out.flatten(2)


def _eager(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: None,
    dropout: float,
    scaling: float,
) -> tuple[Tensor, Tensor]:
    # The original's vision tower scales the query first; the same order gives the same bits.
    weights = (query * scaling @ key.transpose(-1, -2)).softmax(-1)
    dropped = nn.functional.dropout(weights, p=dropout)
    return (dropped @ value).transpose(1, 2), weights


def kernel_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    position_bias: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Compute attention with the kernels, as an attention implementation of transformers.

    Args:
        module: has `config`; T5's also has `is_decoder` and `relative_attention_max_distance`.
        query: [B, H, L, Dh].
        key, value: [B, H, Lk, Dh]; with T5's biases, the queries are the last L of the Lk positions.
        attention_mask: bool [B, 1, 1, Lk] from `kernel_attention_mask`, True where a key may be attended, or None.
        dropout: probability of dropping an attention weight; the caller passes 0 outside training.
        scaling: factor of the scores, Dh^-0.5 by default.
        position_bias: T5's bias table [num_buckets, H] from `LionT5Attention`; None or an empty tensor for no bias. A
            dense bias [1, H, L, Lk] runs sdpa.

    Returns:
        Output [B, L, H, Dh], and None for the attention weights, which the kernels do not keep.

    Raises:
        ValueError: `attention_mask` masks more than padding.
    """
    config: Any = module.config
    dense_bias = position_bias is not None and position_bias.dim() == 4
    if dense_bias or not attends_on_kernels(config, query.device):
        bias = {} if position_bias is None else {"position_bias": position_bias}
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **bias, **kwargs
        )
    padding = None if attention_mask is None else _padding(attention_mask)
    q, k, v = (x.transpose(1, 2) for x in (query, key, value))
    how: dict[str, Any] = {"dropout_p": dropout, "backend": config.kernel_backend}
    if position_bias is None or position_bias.numel() == 0:
        return attention_on_kernels(q, k, v, padding, scaling, **how), None
    t5: Any = module
    return biased_attention_on_kernels(t5, q, k, v, position_bias, padding, causal=t5.is_decoder, **how), None


def attention_on_kernels(
    query: Tensor, key: Tensor, value: Tensor, padding: Tensor | None, scale: float | None, **how: Any
) -> Tensor:
    """Run `multi_scale_attention` on one feature map.

    Args:
        query: [B, L, H, Dh], as the result; `key` and `value` are [B, Lk, H, Dh].
        padding: bool [B, Lk], True where a key counts.
        scale: factor of the scores, Dh^-0.5 if None.
        how: `dropout_p` and `backend`.
    """
    q, k, v = map(_in_whole_eights, (query, key, value))
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    out = multi_scale_attention(q, [k], [v], scale=scale, key_padding_mask=padding, **how)
    return out[..., : query.shape[-1]]


def biased_attention_on_kernels(
    t5: Any, query: Tensor, key: Tensor, value: Tensor, bias_table: Tensor, padding: Tensor | None, **how: Any
) -> Tensor:
    """Run `relative_bias_attention` for an attention `t5` of T5; shapes are those of `attention_on_kernels`.

    Args:
        bias_table: [num_buckets, H].
        how: `causal`, `dropout_p` and `backend`.
    """
    q, k, v = map(_in_whole_eights, (query, key, value))
    out = relative_bias_attention(
        q,
        k,
        v,
        bias_table,
        key_padding_mask=padding,
        bidirectional=not t5.is_decoder,
        max_distance=t5.relative_attention_max_distance,
        **how,
    )
    return out[..., : query.shape[-1]]


def _in_whole_eights(x: Tensor) -> Tensor:
    """Pad the head dimension to a multiple of 8 with zeros, which do not change any product."""
    missing = -x.shape[-1] % 8
    return F.pad(x, (0, missing)) if missing else x


def _padding(attention_mask: Tensor) -> Tensor:
    if attention_mask.dtype != torch.bool or attention_mask.shape[1:3] != (1, 1):
        raise ValueError(
            f"attention_mask: expected padding, bool [B, 1, 1, Lk], for attention {KERNEL_ATTENTION!r}, got "
            f"{attention_mask.dtype} {list(attention_mask.shape)}; attn_implementation='sdpa' takes any mask"
        )
    return attention_mask[:, 0, 0]


def kernel_attention_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor = 0,
    kv_offset: int = 0,
    mask_function: Callable = causal_mask_function,
    attention_mask: Tensor | None = None,
    device: torch.device | str = "cpu",
    config: PreTrainedConfig | None = None,
    **kwargs: Any,
) -> Tensor | None:
    """Return the mask of `kernel_attention`: the padding, bool [B, 1, 1, kv_length], or None without padding.

    The kernels apply causality themselves, and no GPU synchronisation looks for padding. sdpa's mask is returned for
    what the kernels do not support: other patterns, and queries that are not the last positions, as in a static cache.
    """
    plain = mask_function is bidirectional_mask_function or (
        mask_function is causal_mask_function and are_last(q_offset, q_length, kv_offset + kv_length)
    )
    if config is None or not plain or not attends_on_kernels(config, device):
        given: dict[str, Any] = {"mask_function": mask_function, "attention_mask": attention_mask, "device": device}
        return sdpa_mask(batch_size, q_length, kv_length, q_offset, kv_offset, **given, **kwargs)  # type: ignore[arg-type]
    padding = prepare_padding_mask(attention_mask, kv_length, kv_offset)
    return None if padding is None else padding[:, None, None, kv_offset : kv_offset + kv_length]


def are_last(offset: int | Tensor, queries: int, keys: int) -> bool:
    """Return whether the queries, which start at position `offset`, are the last of the keys' positions.

    A static cache has room for more keys, and its offset is known only on the device.
    """
    return not isinstance(offset, Tensor) and offset + queries == keys


AttentionInterface.register(KERNEL_ATTENTION, kernel_attention)
AttentionMaskInterface.register(KERNEL_ATTENTION, kernel_attention_mask)
