"""How far results may be from what the original computed in float64.

A distance is relative: the norm of the difference by the norm of what the original computed. Where three numbers stand
for an array, it is the largest of their differences by the array's norm.

Bounds follow from float32. `FLOAT32` is what rounding to it was seen to make of each kind of result at the most, in
`lion_reference` and in `LionForCausalLM` with sdpa and eager attention, on one thread and two, with AVX2 and AVX-512.
What one rounding becomes does not depend on its size, as long as it is small, and float64 rounds 2**29 times as finely:
there the same computation is 2**-29 times as far off. `MARGIN` is for CPUs and libraries that add up in another order.
"""

import numpy as np
import torch
from torch import Tensor

from tests.golden.data import Golden
from tests.golden.weights import project

MARGIN = 10
FLOAT32 = {"values": 4e-6, "gradients": 8e-5, "losses": 2e-2, "parameters": 6e-2}
MORE_BITS = {torch.float32: 0, torch.float64: 29}


def bound(key: str, dtype: torch.dtype) -> float:
    """The largest distance of the result `key` for a model that computes in `dtype`."""
    kind, _, step = key.partition(".")
    if kind == "losses":
        # AdamW makes full steps of gradients that rounding gave their sign, so at first a difference grows fast.
        worst = min(FLOAT32["losses"], 1e-6 * 30 ** int(step))
    elif kind == "after":
        worst = FLOAT32["parameters"]
    else:
        worst = FLOAT32["gradients" if ".grad." in key else "values"]
    return MARGIN * worst * 2.0 ** -MORE_BITS[dtype]


def distances(golden: Golden, results: dict[str, Tensor]) -> dict[str, float]:
    """By key, the distance of each result.

    Keys are those of the stored tensors, `TASK.grad.NAME` and `after.NAME` for rows of them, and `losses.STEP`.

    Raises:
        KeyError: nothing is stored of a result.
    """
    return {key: _distance(golden, key, result) for key, result in results.items()}


def expect_close(golden: Golden, results: dict[str, Tensor], dtype: torch.dtype) -> None:
    """Raises AssertionError with the results that are beyond their bounds, the farthest first."""
    by_key = distances(golden, results)
    beyond = {key: distance / bound(key, dtype) for key, distance in by_key.items()}
    beyond = {key: times for key, times in beyond.items() if not times <= 1}
    worst = sorted(beyond, key=lambda key: -beyond[key])[:8]
    said = [f"{key}: {by_key[key]:.1e}, {beyond[key]:.3g} times what is allowed" for key in worst]
    assert not beyond, "\n".join([f"{len(beyond)} of {len(results)} results are not the original's", *said])


def _distance(golden: Golden, key: str, result: Tensor) -> float:
    found = result.detach().double().numpy()
    if key.startswith("losses."):
        wanted = np.array(golden.meta["losses"][int(key.removeprefix("losses."))])
        return _relative(found, wanted, np.linalg.norm(wanted))
    for table, prefix in (("after", "after."), *((f"{task}.gradients", f"{task}.grad.") for task in golden.tasks)):
        if key.startswith(prefix):
            name = key.removeprefix(prefix)
            rows = dict(zip(golden.meta["trainable"], golden.expected[table].numpy(), strict=True))
            scale = rows[name][0] if table == "after" else _gradient_scale(name, rows)
            return _relative(project(golden.meta["seed"], name, found), rows[name], scale)
    wanted = golden.expected[key].numpy()
    if wanted.shape == (3,):
        return _relative(project(golden.meta["seed"], key, found), wanted, wanted[0])
    return _relative(found, wanted, np.linalg.norm(wanted))


def _gradient_scale(name: str, rows: dict[str, np.ndarray]) -> float:
    """The norm that a gradient's difference is measured by.

    A bias of all keys moves all scores of a softmax alike: its gradient is zero but for rounding, measured by that of
    the weight. The adapters' scales have one number each, sums that may nearly cancel: they are taken as one vector.
    """
    if name.endswith(".key.bias"):
        return rows[name.removesuffix("bias") + "weight"][0]
    if name.endswith(".scale"):
        return float(np.linalg.norm([row[0] for other, row in rows.items() if other.endswith(".scale")]))
    return rows[name][0]


def _relative(found: np.ndarray, wanted: np.ndarray, scale: float) -> float:
    """Zero only for what is equal where `wanted` is zero: gradients of what has no influence."""
    assert found.shape == wanted.shape, f"expected {wanted.shape}, got {found.shape}"
    difference = found - wanted
    size = np.abs(difference).max() if wanted.shape == (3,) else np.linalg.norm(difference)
    return float(size / scale) if scale else float("inf") if size else 0.0
