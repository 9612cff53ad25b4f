"""Checks of the user's tensors, with errors that name the argument, the expected value and the actual one."""

import torch
from torch import Tensor

from lion_kernels import values_on_host


def expect_shape(name: str, tensor: Tensor, shape: tuple[int | None, ...]) -> None:
    """Raise ValueError unless `tensor` has the shape `shape`, where None stands for any length."""
    expected = ", ".join("L" if want is None else str(want) for want in shape)
    if not isinstance(tensor, Tensor):
        raise ValueError(f"{name}: expected a tensor [{expected}], got {type(tensor).__name__}")
    fits = tensor.dim() == len(shape) and all(
        want in (None, got) for got, want in zip(tensor.shape, shape, strict=True)
    )
    if not fits:
        raise ValueError(f"{name}: expected [{expected}], got {list(tensor.shape)}")


def expect_ids(name: str, ids: Tensor, rows: int, also: int | None = None) -> None:
    """Raise ValueError unless all ids are in 0..rows - 1 or equal to `also`.

    The check does not synchronise with a device: on CUDA, a device-side assertion prints the message, and the process
    can no longer use that GPU. In a compiled graph on a CPU, the check raises RuntimeError with the same message.
    """
    known = (ids >= 0) & (ids < rows)
    if also is not None:
        known = known | (ids == also)
    expected = f"{name}: expected ids in 0..{rows - 1}"
    if values_on_host(ids):
        if not known.all():
            raise ValueError(f"{expected}, got {ids[~known].unique().tolist()}")
    elif ids.device.type in ("cpu", "cuda"):
        torch._assert_async(known.all(), expected)  # pyright: ignore[reportPrivateImportUsage]
