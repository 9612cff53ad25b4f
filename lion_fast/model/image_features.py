"""Image features that do not depend on the question: computed once per image, for any number of questions."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class ImageFeatures:
    """Features of B images, from `LionForCausalLM.encode_images`.

    Indexing selects images, each any number of times, and always returns a batch: `features[2]`, `features[:4]`,
    `features[[0, 0, 1]]`, `features[mask]`.

    Args:
        qformer_context: [B, N, vision hidden size], what the Q-Former attends to; None for a model without a Q-Former.
        aggregated: [B, N, text hidden size], the aggregator's visual tokens; None for a model without an aggregator.
    """

    qformer_context: Tensor | None = None
    aggregated: Tensor | None = None

    def __len__(self) -> int:
        return len(next(part for part in (self.qformer_context, self.aggregated) if part is not None))

    def __getitem__(self, index: int | slice | list[int] | Tensor) -> "ImageFeatures":
        selected = [index] if isinstance(index, int) else index
        return self._map(lambda part: part[selected])

    def repeat_interleave(self, repeats: int | Tensor) -> "ImageFeatures":
        """Repeat each image as often as it has questions, keeping the order.

        Args:
            repeats: one number for all images, or one per image, int64 [B].
        """
        return self._map(lambda part: torch.repeat_interleave(part, _to_device_of(part, repeats), dim=0))

    def to(self, *args: Any, **kwargs: Any) -> "ImageFeatures":
        """Move the features to another device or dtype; the arguments are those of `Tensor.to`."""
        return self._map(lambda part: part.to(*args, **kwargs))

    def _map(self, change: Callable[[Tensor], Tensor]) -> "ImageFeatures":
        parts = (self.qformer_context, self.aggregated)
        return ImageFeatures(*(None if part is None else change(part) for part in parts))


def _to_device_of(part: Tensor, repeats: int | Tensor) -> Any:
    return repeats.to(part.device) if isinstance(repeats, Tensor) else repeats
