"""Checks of tensors that users pass, with errors that name the argument, what came and what was expected."""

from torch import Tensor

from lion_kernels.backend import can_read


def expect_shape(name: str, tensor: Tensor, shape: tuple[int | None, ...]) -> None:
    """Raise ValueError unless `tensor` is one of `shape`; None stands for any length."""
    expected = ", ".join("L" if want is None else str(want) for want in shape)
    if not isinstance(tensor, Tensor):
        raise ValueError(f"{name}: expected a tensor [{expected}], got {type(tensor).__name__}")
    fits = tensor.dim() == len(shape) and all(
        want in (None, got) for got, want in zip(tensor.shape, shape, strict=True)
    )
    if not fits:
        raise ValueError(f"{name}: expected [{expected}], got {list(tensor.shape)}")


def expect_ids(name: str, ids: Tensor, rows: int, also: int | None = None) -> None:
    """Raise ValueError unless all ids are in 0..rows - 1 or equal to `also`."""
    if not can_read(ids):
        return  # an index out of range fails in the gather
    outside = set(ids[(ids < 0) | (ids >= rows)].tolist()) - {also}
    if outside:
        raise ValueError(f"{name}: expected ids in 0..{rows - 1}, got {sorted(outside)}")
