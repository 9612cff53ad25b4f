"""Checks of the user's values, with errors that name the argument, the expected value and the actual one.

None of them synchronises with a device. Where a tensor's values cannot be read on the host, a device-side assertion
checks them.
"""

import math
import sys
from collections.abc import Mapping
from numbers import Integral, Real  # of which NumPy's are, too
from typing import Any

import torch
from torch import Tensor, nn

from lion_fast.io.reading import shown
from lion_kernels import values_on_host

_INTEGERS = (
    torch.int64,
    torch.int32,
    torch.int16,
    torch.int8,
    torch.uint8,
    torch.uint16,
    torch.uint32,
    torch.uint64,
)
_FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)

Shape = tuple[int | str | None, ...]
"""Expected lengths; a letter or None (printed as L) stands for any length."""


def expect_shape(name: str, tensor: Any, shape: Shape) -> None:
    """Raise ValueError unless `tensor` is a plain dense tensor of the shape `shape`."""
    if not isinstance(tensor, Tensor):
        raise ValueError(f"{name}: expected a tensor {_printed(shape)}, got {type(tensor).__name__}")
    if tensor.layout is not torch.strided or tensor.is_quantized or tensor.is_nested:
        raise ValueError(f"{name}: expected a plain dense tensor, got one that is sparse, quantized or nested")
    fits = tensor.dim() == len(shape) and all(
        not isinstance(want, int) or got == want for got, want in zip(tensor.shape, shape, strict=True)
    )
    if not fits:
        raise ValueError(f"{name}: expected {_printed(shape)}, got {list(tensor.shape)}")


def _printed(shape: Shape) -> str:
    return f"[{', '.join('L' if want is None else str(want) for want in shape)}]"


def expect_floats(name: str, tensor: Any, shape: Shape, *, finite: bool = True) -> None:
    """Raise ValueError unless `tensor` has the shape `shape` and floating values.

    With `finite`, they are also finite, as far as a CPU can tell.
    """
    expect_shape(name, tensor, shape)
    if tensor.dtype not in _FLOATS:
        raise ValueError(f"{name}: expected a floating dtype of 16 bits or more, got {tensor.dtype}")
    if not finite or not values_on_host(tensor):
        return
    # The sum is one pass without a mask; only if it is not finite, because it may also overflow, is each value asked.
    total = tensor.sum(dtype=torch.promote_types(tensor.dtype, torch.float32))
    if not total.isfinite() and not tensor.isfinite().all():
        raise ValueError(f"{name}: expected finite values, got NaN or infinity")


def expect_ids(name: str, ids: Tensor, rows: int, also: int | None = None) -> Tensor:
    """Return ids of any integer dtype as int64, after a check that all are in 0..rows - 1 or equal to `also`.

    On CUDA, a device-side assertion prints the message, and the process can no longer use that GPU. In a compiled graph
    on a CPU, the check raises RuntimeError with the same message.

    Raises:
        ValueError: an id is out of range, or the dtype is none of integers.
    """
    if ids.dtype not in _INTEGERS:
        raise ValueError(f"{name}: expected integers, got {ids.dtype}")
    ids = ids.to(torch.int64)
    known = (ids >= 0) & (ids < rows)
    if also is not None:
        known = known | (ids == also)
    expected = f"{name}: expected ids in 0..{rows - 1}"
    if values_on_host(ids):
        if not known.all():
            raise ValueError(f"{expected}, got {_some(ids[~known])}")
    else:
        _assert_on_device(known, expected)
    return ids


def expect_mask(name: str, mask: Any, shape: Shape) -> Tensor:
    """Return a mask of any real dtype as int64, after a check that all values are 0 or 1.

    Other values would be added up to positions, or have another meaning in a mask that is added to scores.

    Raises:
        ValueError: the shape differs, or a value is neither 0 nor 1. On a device, as for `expect_ids`.
    """
    expect_shape(name, mask, shape)
    if mask.dtype == torch.bool:
        return mask.to(torch.int64)
    if mask.dtype not in (*_INTEGERS, *_FLOATS):
        raise ValueError(f"{name}: expected a mask of zeros and ones, got {mask.dtype}")
    known = (mask.to(torch.int64) if mask.dtype in _INTEGERS else mask).unsqueeze(-1)
    known = ((known == 0) | (known == 1)).squeeze(-1)
    if not values_on_host(mask):
        _assert_on_device(known, f"{name}: expected 1 at tokens and 0 at padding")
    elif not known.all():
        raise ValueError(f"{name}: expected 1 at tokens and 0 at padding, got {_some(mask[~known])}")
    return mask.to(torch.int64)


def _some(values: Tensor) -> str:
    """Return up to five of the values, without repetitions."""
    distinct = (values.to(torch.int64) if values.dtype in _INTEGERS else values.double()).unique().tolist()
    return f"[{', '.join(map(str, distinct[:5]))}{', ...' if len(distinct) > 5 else ''}]"


def _assert_on_device(known: Tensor, message: str) -> None:
    if known.device.type in ("cpu", "cuda"):
        torch._assert_async(known.all(), message)  # pyright: ignore[reportPrivateImportUsage]


def expect_values(tensors: Mapping[str, Any], parameter: Tensor) -> None:
    """Raise ValueError for a tensor without values (on the meta device, or fake) unless `parameter` has none either."""
    for name, tensor in tensors.items():
        plain = type(tensor) is Tensor or type(tensor) is nn.Parameter or not isinstance(tensor, Tensor)
        if plain and not (isinstance(tensor, Tensor) and tensor.is_meta):
            continue
        if not torch.compiler.is_compiling() and _has_no_values(tensor) and not _has_no_values(parameter):
            raise ValueError(f"{name}: expected a tensor with values, got one on the meta device or a fake one")


def _has_no_values(tensor: Tensor) -> bool:
    from torch._subclasses.fake_tensor import FakeTensor

    return tensor.is_meta or isinstance(tensor, FakeTensor)


def expect_integer(name: str, value: Any, low: int, high: int | None = None) -> int:
    """Return an integer in low..high of any integral type.

    Raises:
        TypeError: `value` is not an integer.
        ValueError: it is out of range.
    """
    expected = f"{low} or more" if high is None else f"an integer in {low}..{high}"
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise TypeError(f"{name}: expected {'an integer of ' if high is None else ''}{expected}, got {shown(value)}")
    number = int(value)
    if number < low or (high is not None and number > high):
        raise ValueError(f"{name}: expected {expected}, got {shown(value)}")
    return number


def expect_number(name: str, value: Any, low: float, high: float) -> float:
    """Return a number in low..high.

    Raises:
        TypeError: `value` is not a real number.
        ValueError: it is out of range or NaN.
    """
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{name}: expected a number in {low:g}..{high:g}, got {shown(value)}")
    if not low <= value <= high:  # type: ignore[operator]
        raise ValueError(f"{name}: expected a number in {low:g}..{high:g}, got {shown(value)}")
    return float(value)


def is_integer(value: Any, low: int, high: float = math.inf) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool) and low <= int(value) <= high


def is_number(value: Any, low: float = -math.inf, high: float = math.inf) -> bool:
    """Return whether `value` is a finite number in low..high."""
    if isinstance(value, bool) or not isinstance(value, Real):
        return False
    return low <= value <= high and abs(value) <= sys.float_info.max  # type: ignore[operator]
