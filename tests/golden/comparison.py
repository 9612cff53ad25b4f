"""How far results may be from the original's float64 results.

A distance is relative: the norm of the difference, divided by the norm of the original's result. For an array stored as
three numbers, it is the largest of their differences, divided by the array's norm.

The bounds are derived from float32. `FLOAT32` holds the largest distance seen for each kind of result, in
`lion_reference` and in `LionForCausalLM` with sdpa and eager attention, on one thread and two, with AVX2 and AVX-512.
Small rounding errors are amplified by the same factor in both precisions, and float64 rounds 2**29 times as finely, so
the float64 bound is 2**-29 times the float32 bound. `MARGIN` covers CPUs and libraries that sum in another order.
"""

import numpy as np
import torch
from torch import Tensor

from tests.golden.data import Golden
from tests.golden.weights import project

# For the golden values in tests/golden, in every clone; tests/rounding.py has the margin for those in LION_GOLDEN_DIR.
MARGIN = 10
FLOAT32 = {"values": 4e-6, "gradients": 8e-5, "losses": 2e-2, "parameters": 6e-2}
MORE_BITS = {torch.float32: 0, torch.float64: 29}


def bound(key: str, dtype: torch.dtype) -> float:
    """Return the largest allowed distance of the result `key` for a model that computes in `dtype`."""
    kind, _, step = key.partition(".")
    if kind == "losses":
        # AdamW takes a full step even if rounding determines a gradient's sign, so differences grow fast at first.
        worst = min(FLOAT32["losses"], 1e-6 * 30 ** int(step))
    elif kind == "after":
        worst = FLOAT32["parameters"]
    else:
        worst = FLOAT32["gradients" if ".grad." in key else "values"]
    return MARGIN * worst * 2.0 ** -MORE_BITS[dtype]


def distances(golden: Golden, results: dict[str, Tensor]) -> dict[str, float]:
    """Return the distance of each result, by key.

    A key is the name of a stored tensor, `TASK.grad.NAME` or `after.NAME` for a row of one, or `losses.STEP`.

    Raises:
        KeyError: no value is stored for a result.
    """
    return {key: _distance(golden, key, result) for key, result in results.items()}


def expect_close(golden: Golden, results: dict[str, Tensor], dtype: torch.dtype) -> None:
    """Raise AssertionError if results exceed their bounds; it lists up to eight, the largest excess first."""
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
    """Return the norm by which a gradient's difference is divided.

    A key bias shifts all scores of a softmax equally: its gradient is zero except for rounding, so the weight's norm is
    used. An adapter scale's gradient is one number, a sum that may nearly cancel, so all scales count as one vector.
    """
    if name.endswith(".key.bias"):
        return rows[name.removesuffix("bias") + "weight"][0]
    if name.endswith(".scale"):
        return float(np.linalg.norm([row[0] for other, row in rows.items() if other.endswith(".scale")]))
    return rows[name][0]


def _relative(found: np.ndarray, wanted: np.ndarray, scale: float) -> float:
    """Return the distance; if `scale` is 0 (a parameter without influence), 0 for equal values, else infinity."""
    assert found.shape == wanted.shape, f"expected {wanted.shape}, got {found.shape}"
    difference = found - wanted
    size = np.abs(difference).max() if wanted.shape == (3,) else np.linalg.norm(difference)
    return float(size / scale) if scale else float("inf") if size else 0.0
