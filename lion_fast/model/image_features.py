"""Image features that do not depend on the question: computed once per image, for any number of questions."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from numbers import Integral
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lion_fast.io.reading import shown
from lion_fast.model.validation import expect_integer, is_integer
from lion_kernels import values_on_host

MAX_REPEATS = 1 << 16
"""Largest number of questions about one image in a call; each takes the memory of an image's features."""


@dataclass(frozen=True)
class ImageFeatures:
    """Features of B images, from `LionForCausalLM.encode_images`.

    Indexing selects images, each any number of times, and always returns a batch: `features[2]`, `features[:4]`,
    `features[[0, 0, 1]]`, `features[mask]`.

    Args:
        qformer_context: [B, N, vision hidden size], what the Q-Former attends to; None for a model without a Q-Former.
        aggregated: [B, N, text hidden size], the aggregator's visual tokens; None for a model without an aggregator.

    Raises:
        ValueError: both are None, one is no tensor of three dimensions, or their numbers of images differ.
    """

    qformer_context: Tensor | None = None
    aggregated: Tensor | None = None

    def __post_init__(self) -> None:
        given = {name: getattr(self, name) for name in ("qformer_context", "aggregated")}
        given = {name: part for name, part in given.items() if part is not None}
        if not given:
            raise ValueError("qformer_context: expected qformer_context, aggregated or both, got neither")
        for name, part in given.items():
            if not isinstance(part, Tensor) or part.dim() != 3:
                raise ValueError(f"{name}: expected a tensor [B, N, hidden size], got {shown(part)}")
        if len({part.shape[0] for part in given.values()}) > 1:
            counts = " and ".join(str(part.shape[0]) for part in given.values())
            raise ValueError(f"aggregated: expected as many images as qformer_context, got {counts}")

    def __len__(self) -> int:
        return len(next(part for part in (self.qformer_context, self.aggregated) if part is not None))

    def __getitem__(self, index: int | slice | Sequence[int] | np.ndarray | Tensor) -> "ImageFeatures":
        """Select images.

        Raises:
            IndexError: there is no such image; on a GPU, a tensor's values are not checked.
            TypeError: `index` is no integer, slice, list, array or tensor of integers, and no mask of all images.
        """
        selected = _selection(index, len(self))
        return self._map(lambda part: part[selected])

    def repeat_interleave(self, repeats: int | Tensor) -> "ImageFeatures":
        """Repeat each image as often as it has questions, keeping the order.

        Args:
            repeats: one number for all images, or one per image, int64 [B].

        Raises:
            TypeError: `repeats` is neither an integer nor a tensor of integers.
            ValueError: a number is negative, or their number is not that of images.
        """
        if isinstance(repeats, Tensor):
            if repeats.dtype not in _INDEX_DTYPES:
                raise TypeError(f"repeats: expected an integer or a tensor of integers, got {shown(repeats)}")
            if repeats.dim() > 1 or (repeats.dim() == 1 and len(repeats) not in (1, len(self))):
                raise ValueError(f"repeats: expected one number per image ({len(self)}), got {list(repeats.shape)}")
            if values_on_host(repeats) and (repeats < 0).any():
                raise ValueError(f"repeats: expected numbers of 0 or more, got {repeats.flatten().tolist()[:10]}")
            repeats = repeats.long()
        else:
            repeats = expect_integer("repeats", repeats, 0, MAX_REPEATS)
        return self._map(lambda part: torch.repeat_interleave(part, _to_device_of(part, repeats), dim=0))

    def to(self, *args: Any, **kwargs: Any) -> "ImageFeatures":
        """Move the features to another device or dtype; the arguments are those of `Tensor.to`."""
        return self._map(lambda part: part.to(*args, **kwargs))

    def _map(self, change: Callable[[Tensor], Tensor]) -> "ImageFeatures":
        parts = (self.qformer_context, self.aggregated)
        return ImageFeatures(*(None if part is None else change(part) for part in parts))


_INDEX_DTYPES = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)


def _to_device_of(part: Tensor, repeats: int | Tensor) -> Any:
    return repeats.to(part.device) if isinstance(repeats, Tensor) else repeats


def _selection(index: Any, count: int) -> Any:
    """Return an index that selects a batch of `count` images, after a check."""
    if isinstance(index, Integral) and not isinstance(index, bool | np.bool_):
        return [_place("index", index, count)]
    if isinstance(index, slice):
        return _checked_slice(index)
    if isinstance(index, np.ndarray):
        index = index.tolist() if index.ndim == 1 else index
    if isinstance(index, list | tuple | range):
        return _listed(list(index), count)
    if isinstance(index, Tensor):
        return _of_tensor(index, count)
    raise _unusable(index)


def _unusable(index: Any) -> TypeError:
    return TypeError(f"index: expected an integer, a slice, a list of integers or a mask, got {shown(index)}")


def _place(name: str, index: Any, count: int) -> int:
    if not -count <= index < count:
        raise IndexError(f"{name}: expected an image in {-count}..{count - 1}, got {shown(index)}")
    return int(index)


def _checked_slice(index: slice) -> slice:
    for value in (index.start, index.stop, index.step):
        if not (value is None or (isinstance(value, Integral) and not isinstance(value, bool))):
            raise _unusable(index)
    if index.step is not None and not is_integer(index.step, 1):
        raise ValueError(f"index: expected a slice with a step of 1 or more, got {shown(index)}")
    return index


def _listed(index: list[Any], count: int) -> list[Any]:
    if index and all(isinstance(value, bool | np.bool_) for value in index):
        if len(index) != count:
            raise IndexError(f"index: expected a mask of {count} images, got {len(index)} values")
        return [place for place, chosen in enumerate(index) if chosen]
    for number, value in enumerate(index):
        if not isinstance(value, Integral) or isinstance(value, bool | np.bool_):
            raise TypeError(f"index[{number}]: expected an integer, got {shown(value)}")
    return [_place(f"index[{number}]", value, count) for number, value in enumerate(index)]


def _of_tensor(index: Tensor, count: int) -> Tensor:
    if index.dtype == torch.bool:
        if index.shape != (count,):
            raise IndexError(f"index: expected a mask of {count} images, got {list(index.shape)}")
        return index
    if index.dtype not in _INDEX_DTYPES or index.dim() > 1 or index.layout is not torch.strided:
        raise _unusable(index)
    index = index.long().reshape(-1)  # a tensor of uint8 would be a mask
    if values_on_host(index) and not ((index >= -count) & (index < count)).all():
        raise IndexError(f"index: expected images in {-count}..{count - 1}, got {index.tolist()[:10]}")
    return index
