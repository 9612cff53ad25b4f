"""The gated activation of T5 1.1's feed-forward layer (Shazeer, arXiv 2002.05202), with the exact GELU as in LION.

out = gate * Phi(gate) * up, where Phi is the standard normal distribution function
"""

import torch.nn.functional as F
from torch import Tensor


def gated_gelu(gate: Tensor, up: Tensor) -> Tensor:
    """gate, up [..., D] -> [..., D]."""
    return F.gelu(gate) * up
