"""BERT's bias, residual and norm, forward, backward and both, compared with PyTorch's operators and Liger-Kernel.

`pytest benchmarks` prints the table: on a GPU in bf16 with the kernels, on a CPU in fp32 without. Shapes are the vision
aggregator's (D 1408) and the Q-Former's (D 768), 257 tokens per image, without dropout, because eager dropout draws
another mask.
"""

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.harness.side_by_side import DTYPE, Inputs, Operator, Shape, Suite, draw, leaf, seeded
from benchmarks.shapes import ON_GPU, by_backend, compare_peers, star
from lion_kernels.residual_layer_norm import cost, residual_layer_norm
from lion_reference import residual_layer_norm as reference

try:
    from liger_kernel.transformers.functional import liger_layer_norm
except ImportError:
    liger_layer_norm = None

TOKENS = 257
EPS = 1e-12
IMAGES = (1, 16, 64, 256) if ON_GPU else (1, 4)
SHAPES = star({"images": IMAGES[-1], "channels": 1408}, {"images": IMAGES, "channels": (768, 1408)})


def make_inputs(shape: Shape) -> Inputs:
    generator = seeded()
    rows, channels = (shape["images"], shape.get("tokens", TOKENS), shape["channels"]), (shape["channels"],)
    sizes = {"x": rows, "residual": rows, "weight": channels, "bias": channels, "x_bias": channels}
    return {name: leaf(draw(*size, generator=generator)) for name, size in sizes.items()}


def eager(x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, x_bias: Tensor) -> Tensor:
    return F.layer_norm(x + x_bias + residual, weight.shape, weight, bias, EPS)


PEERS: dict[str, Operator] = {
    "eager": eager,
    "torch.compile": torch.compile(eager),
    **by_backend(residual_layer_norm, eps=EPS),
}
if ON_GPU and liger_layer_norm is not None:
    PEERS["Liger"] = lambda x, residual, weight, bias, x_bias: liger_layer_norm(
        x + x_bias + residual, weight, bias, EPS
    )


def suite(shape: Shape) -> Suite:
    rows, dropout = shape["images"] * shape.get("tokens", TOKENS), shape.get("dropout", 0.0) > 0
    costs = cost(rows, shape["channels"], DTYPE, dropout=dropout)
    reads = partial(reference, eps=EPS)
    return Suite("residual_layer_norm", PEERS, eager, reads, partial(make_inputs, shape), costs)


bench = compare_peers(suite, SHAPES)
