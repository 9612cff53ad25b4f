"""Frozen inputs: backward computes only the gradients that are asked for, and with none, forward saves nothing."""

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import pytest
import torch

from lion_fast.check import cases
from lion_fast.check.cases import Tensors
from lion_kernels.core.operator import all_kernels
from tests.kernels.contract import expect_equal, gradient_of, make, operator_of, run

CASES = {
    "attention": cases.maps_attention(18, (20,), 16, heads=1, gate=True, dropout=True),
    "relative": cases.biased_attention(18, 20, 16, heads=1, decoder=True),
    "adapters": cases.adapters("channel", (2, 9), 32, 2, 8),
    "dense adapters": cases.adapters("dense", (2, 9), 32, 2, 8),
    "lora": cases.lora("dense", (2, 9), 32, 40, 2, 8),
    "rms_norm": cases.rms_norm((17,), 48),
    "layer norm": cases.layer_norm((17,), 48, dropout=True),
    "gated_gelu": cases.gated_gelu((17,), 48),
}
# The outputs that backward's kernels may write, and what forward saves; a pointer that is None is not written.
OUTPUTS = {"p_delta", "p_dq", "p_dk", "p_dv", "p_dhidden", "p_dgate", "p_dweight", "p_dbias", "p_dx", "p_dresidual",
           "p_partial", "p_dup"}  # fmt: skip
SAVED = {"p_lse", "p_rstd", "p_statistics"}
Launches = list[tuple[str, set[str]]]


@contextmanager
def recorded(pointers: set[str]) -> Iterator[Launches]:
    """Record each launch within the context, and which of these pointers it was given."""
    found: Launches = []

    def record(kernel: Any, *args: Any, **kwargs: Any) -> None:
        given = dict(zip(kernel.arg_names, args, strict=False)) | kwargs
        found.append((kernel.__name__, {name for name in pointers if given.get(name) is not None}))

    with pytest.MonkeyPatch.context() as patch:
        for kernel in all_kernels():
            patch.setattr(kernel, "pre_run_hooks", [partial(record, kernel)])
        yield found


QUERIES, KEYS = "attention_backward_queries", "attention_backward_keys"
LAYER_NORM = "residual_layer_norm_backward_kernel"
OUTER = ("outer_kernel", set[str]())
HIDDEN = ("hidden_gradient_kernel", {"p_dhidden"})
ONLY: list[tuple[str, tuple[str, ...], Launches]] = [
    ("attention", ("q",), [(QUERIES, {"p_delta", "p_dq"})]),
    ("attention", ("keys.0",), [(QUERIES, {"p_delta"}), (KEYS, {"p_delta", "p_dk"})]),
    ("attention", ("values.0",), [(KEYS, {"p_dv"})]),
    ("attention", ("scale_gate",), [(QUERIES, {"p_delta"})]),
    ("attention", ("keys.0", "values.0"), [(QUERIES, {"p_delta"}), (KEYS, {"p_delta", "p_dk", "p_dv"})]),
    ("attention", ("q", "values.0"), [(QUERIES, {"p_delta", "p_dq"}), (KEYS, {"p_delta", "p_dv"})]),
    ("relative", ("q",), [(QUERIES, {"p_delta", "p_dq"})]),
    ("relative", ("v",), [(KEYS, {"p_dv"})]),
    ("relative", ("q", "k", "v"), [(QUERIES, {"p_delta", "p_dq"}), (KEYS, {"p_delta", "p_dk", "p_dv"})]),
    ("relative", ("bias_table",), [(QUERIES, {"p_delta"}), ("_bias_gradient", {"p_delta"})]),
    ("adapters", ("x",), [HIDDEN]),
    ("adapters", ("down_bias",), [HIDDEN]),
    ("adapters", ("up_weight",), [OUTER, ("up_gradient_kernel", {"p_dweight"})]),
    ("adapters", ("up_bias",), [OUTER, ("up_gradient_kernel", {"p_dbias"})]),
    ("adapters", ("gate",), [OUTER, ("up_gradient_kernel", {"p_dgate"})]),
    ("adapters", ("x", "gate"), [HIDDEN, OUTER, ("up_gradient_kernel", {"p_dgate"})]),
    ("dense adapters", ("gate",), [("hidden_gradient_kernel", {"p_dhidden", "p_dgate"})]),
    ("dense adapters", ("up_weight",), [OUTER, ("up_gradient_kernel", {"p_dweight"})]),
    ("lora", ("weight", "bias"), []),
    ("lora", ("x",), [HIDDEN]),
    ("lora", ("lora_a",), [HIDDEN]),
    ("lora", ("lora_a", "lora_b"), [HIDDEN, OUTER, ("up_gradient_kernel", {"p_dweight"})]),
    ("rms_norm", ("x",), [("rms_norm_backward_kernel", {"p_dx"})]),
    ("rms_norm", ("weight",), [("rms_norm_backward_kernel", {"p_partial"})]),
    ("layer norm", ("x",), [(LAYER_NORM, {"p_dx"})]),
    ("layer norm", ("residual",), [(LAYER_NORM, {"p_dresidual"})]),
    ("layer norm", ("x", "residual"), [(LAYER_NORM, {"p_dx", "p_dresidual"})]),
    ("layer norm", ("bias",), [(LAYER_NORM, {"p_partial"})]),
    ("gated_gelu", ("gate",), [("gated_gelu_backward_kernel", {"p_dgate"})]),
    ("gated_gelu", ("up",), [("gated_gelu_backward_kernel", {"p_dup"})]),
]


@functools.cache
def whole(name: str, device: torch.device) -> Tensors:
    """Return the output and all gradients."""
    return run(CASES[name], make(CASES[name], device=device), "triton")


@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize(("name", "trained", "expected"), ONLY, ids=[f"{name}: {', '.join(t)}" for name, t, _ in ONLY])
def test_only_what_is_asked_for_is_computed(
    name: str, trained: tuple[str, ...], expected: Launches, device: torch.device
) -> None:
    case = CASES[name]
    tensors = make(case, device=device)
    for key, value in tensors.items():
        value.requires_grad_(key in trained)
    out = operator_of(case)(**case.arguments(tensors), backend="triton")
    with recorded(OUTPUTS) as launches:
        gradients = torch.autograd.grad(out, [tensors[key] for key in trained], gradient_of(out))
    expect_equal(dict(zip(trained, gradients, strict=True)), {key: whole(name, device)[key] for key in trained})
    assert launches == expected


@pytest.mark.parametrize("name", ["attention", "relative", "rms_norm", "layer norm"])
def test_without_gradients_nothing_is_saved(name: str, device: torch.device) -> None:
    """Neither without autograd nor if all inputs are frozen."""
    case = CASES[name]
    tensors = make(case, device=device)
    with recorded(SAVED) as launches:
        trained = run(case, tensors, "triton")["out"]
        assert launches[0][1]
        launches.clear()
        with torch.no_grad():
            outs = [run(case, tensors, "triton")["out"]]
        outs.append(run(case, {key: value.detach() for key, value in tensors.items()}, "triton")["out"])
    assert all(torch.equal(out, trained) for out in outs)
    assert len(launches) >= len(outs)
    assert not any(saved for _, saved in launches)
