"""Conversion of numpy arrays and torch tensors to 8-bit RGB images."""

from collections.abc import Callable, Iterable
from contextlib import nullcontext
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn import Parameter
from torch.nn.parameter import is_lazy

from lion_fast.io.image_checks import check_size, noting, reading

_CHANNELS = (1, 3, 4)  # grey, RGB, RGBA
_BAND_PIXELS = 1 << 20  # pixels that are converted at a time, so that intermediate results stay small
_USER_DEFINED = 256  # the first number of NumPy's dtypes of other packages
_SHOWN = 200  # characters of a shape or dtype
_OVERSHOOT = 0.5 / 255  # rounding errors of the input that still round to 0 or 255

_FLOATS = (
    torch.float16,
    torch.bfloat16,
    torch.float32,
    torch.float64,
    torch.float8_e4m3fn,
    torch.float8_e4m3fnuz,
    torch.float8_e5m2,
    torch.float8_e5m2fnuz,
    torch.float8_e8m0fnu,
)
_DTYPES = (*_FLOATS, torch.bool, torch.uint8, torch.uint16, torch.uint32, torch.uint64)
_DTYPES += (torch.int8, torch.int16, torch.int32, torch.int64)

Rows = Callable[[int, int], np.ndarray]
"""Function from the first row and the one after the last to these rows, [rows, W, C]."""


def image_from_array(array: np.ndarray, name: str) -> Image.Image:
    """Convert [H, W], [H, W, C] or [C, H, W]; see `load_image`.

    Raises:
        ValueError: another shape or dtype, a refused size, masked values, or values out of range.
    """
    if array.dtype.kind not in "biuf" or not 0 <= array.dtype.num < _USER_DEFINED:
        raise ValueError(f"{name}: expected integers, booleans or floats, got {str(array.dtype)[:_SHOWN]}")
    if isinstance(array, np.ma.MaskedArray) and np.ma.is_masked(array):
        raise ValueError(f"{name}: expected an array without masked values, got {array.mask.sum()} of them")
    array = np.asarray(array)  # subclasses, such as matrices, have other rules of indexing
    order = _channels_last(array.shape, name, channels_first=False)
    shape = [1 if axis is None else array.shape[axis] for axis in order]
    check_size(shape[1], shape[0], name)
    array = array.transpose([axis for axis in order if axis is not None]).reshape(shape)
    return image_from_rows(lambda first, last: array[first:last], (shape[0], shape[1], shape[2]), name)


def image_from_tensor(tensor: Tensor, name: str) -> Image.Image:
    """Convert [H, W], [H, W, C] or [C, H, W]; see `load_image`.

    Raises:
        ValueError: another shape or dtype, a refused size, a tensor that is not dense or holds no values, or values out
            of range.
    """
    custom = type(tensor) not in (Tensor, Parameter)
    with noting(name) if custom else nullcontext():
        return _image_from_tensor(tensor, name, custom)


def expect_dense(tensor: Tensor, name: str) -> None:
    """Check that the values of a tensor can be read.

    Raises:
        ValueError: the tensor is sparse, nested, quantized, fake, lazy, on the meta device, or wrapped by a transform
            of `torch.func`.
    """
    if is_lazy(tensor):
        kind = "uninitialized"
    elif isinstance(tensor, FakeTensor) or tensor.is_meta:
        kind = "without values"
    elif _is_wrapped(tensor):
        kind = "inside a transform of torch.func"
    elif tensor.is_nested:
        kind = "nested"
    elif tensor.is_quantized:
        kind = "quantized"
    elif tensor.layout is not torch.strided:
        kind = f"of layout {tensor.layout}"
    else:
        return
    raise ValueError(f"{name}: expected a plain dense tensor, got one that is {kind}")


def image_from_rows(rows: Rows, shape: tuple[int, int, int], name: str) -> Image.Image:
    """Convert an image that is read a band of rows at a time.

    Args:
        rows: reads rows of any dtype that `image_from_array` takes.
        shape: height, width and channels.

    Raises:
        ValueError: values are out of range.
    """
    height, width, _ = shape
    step = max(1, _BAND_PIXELS // width)
    if step >= height:
        band = rows(0, height)
        _check_values([band], name)
        return _to_image(band)
    firsts = range(0, height, step)
    _check_values((rows(first, min(first + step, height)) for first in firsts), name)
    image = Image.new("RGB", (width, height))
    for first in firsts:
        image.paste(_to_image(rows(first, min(first + step, height))), (0, first))
    return image


def _is_wrapped(tensor: Tensor) -> bool:
    inside: Any = torch
    return inside._C._functorch.is_functorch_wrapped_tensor(tensor) or inside._is_functional_tensor(tensor)


def _image_from_tensor(tensor: Tensor, name: str, custom: bool) -> Image.Image:
    expect_dense(tensor, name)
    if tensor.dtype not in _DTYPES:
        raise ValueError(f"{name}: expected integers, booleans or floats, got {tensor.dtype}")
    order = _channels_last(tuple(tensor.shape), name, channels_first=True)
    height, width, channels = (1 if axis is None else tensor.shape[axis] for axis in order)
    check_size(width, height, name)
    tensor = tensor.detach()
    if tensor.device.type == "cpu" and type(tensor) is Tensor and not _holds_all(tensor):
        raise ValueError(f"{name}: expected a tensor with its values, got one whose storage is smaller than its shape")
    tensor = tensor.permute([axis for axis in order if axis is not None]).reshape(height, width, channels)

    def rows(first: int, last: int) -> np.ndarray:
        with nullcontext() if custom else reading(name, "a tensor whose values can be read"):
            band = tensor[first:last].cpu().resolve_neg()
            return (band.float() if band.is_floating_point() else band).numpy()

    return image_from_rows(rows, (height, width, channels), name)


def _channels_last(shape: tuple[int, ...], name: str, channels_first: bool) -> tuple[int | None, ...]:
    """Return the axes of height, width and channels; None for the channels of [H, W].

    Args:
        channels_first: whether a shape that is both [H, W, C] and [C, H, W] is the latter.
    """
    if 0 in shape:
        raise ValueError(f"{name}: expected an image with pixels, got shape {str(shape)[:_SHOWN]}")
    if len(shape) == 2:
        return 0, 1, None
    if len(shape) == 3:
        if shape[0] in _CHANNELS and (channels_first or shape[2] not in _CHANNELS):
            return 1, 2, 0
        if shape[2] in _CHANNELS:
            return 0, 1, 2
    raise ValueError(f"{name}: expected [H, W], [H, W, C] or [C, H, W] with C of 1, 3 or 4, got {str(shape)[:_SHOWN]}")


def _holds_all(tensor: Tensor) -> bool:
    """Return whether the storage holds all elements: it may have been resized, as FSDP does, and NumPy would crash."""
    steps = zip(tensor.shape, tensor.stride(), strict=True)
    last = tensor.storage_offset() + sum((size - 1) * stride for size, stride in steps)
    return (last + 1) * tensor.itemsize <= tensor.untyped_storage().nbytes()


def _check_values(bands: Iterable[np.ndarray], name: str) -> None:
    low: Any = None
    high: Any = None
    for band in bands:
        kind, width = band.dtype.kind, band.dtype.itemsize
        if kind == "b" or (kind == "u" and width <= 2):
            return  # every value is valid
        least, most = band.min(), band.max()
        # NumPy's functions, because they return NaN if either is NaN.
        low, high = (least, most) if low is None else (np.minimum(low, least), np.maximum(high, most))
    if kind in "ui":
        if low < 0 or high > 255:
            raise ValueError(f"{name}: expected {band.dtype} values in 0..255, got {low}..{high}")
    elif not (low >= -_OVERSHOOT and high <= 1 + _OVERSHOOT):
        raise ValueError(
            f"{name}: expected {band.dtype} values in 0..1, got {low:.4g}..{high:.4g}; "
            "pass values in 0..255 as uint8; normalised pixels are not supported"
        )


def _to_image(band: np.ndarray) -> Image.Image:
    pixels = _to_uint8(band)
    if pixels.shape[2] == 1:
        return Image.fromarray(pixels[:, :, 0]).convert("RGB")
    return Image.fromarray(np.ascontiguousarray(pixels[:, :, :3]))


def _to_uint8(band: np.ndarray) -> np.ndarray:
    kind = band.dtype.kind
    if kind == "b":
        return band.astype(np.uint8) * 255
    if kind == "u" and band.dtype.itemsize == 2:
        return (band >> 8).astype(np.uint8)  # as Pillow reads 16-bit colour
    if kind in "ui":
        return band.astype(np.uint8)
    return np.rint(band.clip(0, 1) * 255).astype(np.uint8)
