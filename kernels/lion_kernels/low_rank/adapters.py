"""The weights of a mixture's low-rank maps, bundled."""

from typing import NamedTuple

from torch import Tensor


class Adapters(NamedTuple):
    """E maps from D channels through r to N; the custom ops have these four arguments in this order.

    Attributes:
        down_weight: [E, r, D].
        down_bias: [E, r] or None.
        up_weight: [E, N, r].
        up_bias: [E, N] or None.
    """

    down_weight: Tensor
    down_bias: Tensor | None
    up_weight: Tensor
    up_bias: Tensor | None
