"""What the arguments of attention to several feature maps may be."""

from collections.abc import Sequence

import torch
from torch import Tensor

from lion_kernels.attention.launch import check_alike, check_device, check_mask, check_queries
from lion_kernels.core.arguments import check_floating, check_sequence, check_tensors, shown


def check_maps(
    q: Tensor,
    keys: Sequence[Tensor],
    values: Sequence[Tensor],
    key_padding_mask: Tensor | Sequence[Tensor | None] | None,
    scale_gate: Tensor | None,
) -> list[Tensor]:
    """Check the arguments of attention to maps; return a contiguous bool mask per map, empty for a map without one."""
    check_sequence("keys", keys)
    check_sequence("values", values)
    if not keys or len(keys) != len(values):
        raise ValueError(f"values: expected one per feature map of keys, got {len(values)} for {len(keys)} keys")
    if key_padding_mask is None or isinstance(key_padding_mask, Tensor):
        key_padding_mask = [key_padding_mask] * len(keys)
    if not isinstance(key_padding_mask, list | tuple):
        raise TypeError(
            f"key_padding_mask: expected a torch.Tensor, a list or tuple, or None, got {shown(key_padding_mask)}"
        )
    if len(key_padding_mask) != len(keys):
        raise ValueError(f"key_padding_mask: expected {len(keys)} (from keys), got {len(key_padding_mask)}")
    alike: dict[str, Tensor] = {}
    optional = {"scale_gate": scale_gate}
    for s, (k, v, mask) in enumerate(zip(keys, values, key_padding_mask, strict=True)):
        alike[f"keys[{s}]"], alike[f"values[{s}]"] = k, v
        if mask is not None:
            optional[f"key_padding_mask[{s}]"] = mask
    check_tensors({"q": q, **alike}, optional)
    check_queries(q)
    batch, _, heads, head_dim = q.shape
    if scale_gate is not None:
        if tuple(scale_gate.shape) != (len(keys),):
            raise ValueError(f"scale_gate: expected {[len(keys)]} (from keys), got {list(scale_gate.shape)}")
        check_floating("scale_gate", scale_gate)
        check_device(q, {"scale_gate": scale_gate})
    masks: list[Tensor] = []
    for s, (k, v, mask) in enumerate(zip(keys, values, key_padding_mask, strict=True)):
        if k.dim() != 4 or (k.shape[0], *k.shape[2:]) != (batch, heads, head_dim):
            raise ValueError(f"keys[{s}]: expected {[batch, 'L_s', heads, head_dim]} (from q), got {list(k.shape)}")
        if v.shape != k.shape:
            raise ValueError(f"values[{s}]: expected {list(k.shape)} (from keys[{s}]), got {list(v.shape)}")
        if mask is None:
            masks.append(q.new_empty(0, dtype=torch.bool))
        else:
            if mask.shape != k.shape[:2]:
                raise ValueError(
                    f"key_padding_mask: expected {list(k.shape[:2])} for keys[{s}], got {list(mask.shape)}"
                )
            check_mask("key_padding_mask", mask)
            check_device(q, {"key_padding_mask": mask})
            masks.append(mask.bool().contiguous())
    check_alike(q, alike)
    return masks
