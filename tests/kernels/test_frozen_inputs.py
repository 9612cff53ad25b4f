"""Backward with frozen inputs: the remaining gradients have the same bits, and the others are not computed."""

import importlib
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from lion_kernels import (
    gated_gelu,
    mixture_of_adapters,
    mixture_of_lora_linear,
    multi_scale_attention,
    relative_bias_attention,
    residual_layer_norm,
    rms_norm,
)

# The backward kernels, and the modules that launch them.
MODULES = {
    "attention": "attention.launch",
    "low_rank": "low_rank.launch",
    "relative_bias_attention": "attention.bias",
    "residual_layer_norm": "core.layer_norm",
}
KERNELS = {
    "attention": ("attention_backward_queries", "attention_backward_keys"),
    "relative_bias_attention": ("_bias_gradient",),
    "low_rank": ("hidden_gradient_kernel", "outer_kernel", "up_gradient_kernel"),
    "rms_norm": ("rms_norm_backward_kernel",),
    "residual_layer_norm": ("residual_layer_norm_backward_kernel",),
    "gated_gelu": ("gated_gelu_backward_kernel",),
}
# The outputs that these kernels may write; a pointer that is None is not written.
OUTPUTS = {"p_delta", "p_dq", "p_dk", "p_dv", "p_dhidden", "p_dgate", "p_dweight", "p_dbias", "p_dx", "p_dresidual",
           "p_partial", "p_dup"}  # fmt: skip
Launches = list[tuple[str, set[str]]]


class Recorder(NamedTuple):
    """A kernel that records its launches and the outputs passed to them."""

    kernel: Any
    name: str
    launches: Launches

    def __getitem__(self, grid: Any) -> Callable[..., None]:
        def launch(*args: Any, **kwargs: Any) -> None:
            given = dict(zip(self.kernel.arg_names, args, strict=False)) | kwargs
            self.launches.append((self.name, {name for name in OUTPUTS if given.get(name) is not None}))
            self.kernel[grid](*args, **kwargs)

        return launch


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> Launches:
    found: Launches = []
    for module_name, names in KERNELS.items():
        module = importlib.import_module(f"lion_kernels.{MODULES.get(module_name, module_name)}")
        for name in names:
            monkeypatch.setattr(module, name, Recorder(getattr(module, name), name, found))
    return found


def attention(q: Tensor, k: Tensor, v: Tensor, scale_gate: Tensor, **options: Any) -> Tensor:
    return multi_scale_attention(q, [k], [v], scale_gate=scale_gate, dropout_p=0.2, seed=1, **options)


def layer_norm(**given: Any) -> Tensor:
    return residual_layer_norm(**given, eps=1e-6, dropout_p=0.2, seed=1)


OPERATORS: dict[str, tuple[Callable[..., Tensor], dict[str, tuple[int, ...]], dict[str, Any]]] = {
    "attention": (
        attention,
        {"q": (2, 18, 2, 16), "k": (2, 20, 2, 16), "v": (2, 20, 2, 16), "scale_gate": (1,)},
        {},
    ),
    "relative": (
        relative_bias_attention,
        {"q": (2, 18, 2, 16), "k": (2, 20, 2, 16), "v": (2, 20, 2, 16), "bias_table": (8, 2)},
        {"max_distance": 9, "causal": True},
    ),
    "adapters": (
        mixture_of_adapters,
        {"x": (2, 9, 32), "down_weight": (2, 8, 32), "down_bias": (2, 8), "up_weight": (2, 32, 8), "up_bias": (2, 32),
         "gate": (3, 2, 32)},
        {"task_ids": torch.tensor([2, 0])},
    ),
    "dense adapters": (
        mixture_of_adapters,
        {"x": (2, 9, 32), "down_weight": (2, 8, 32), "down_bias": (2, 8), "up_weight": (2, 32, 8), "up_bias": (2, 32),
         "gate": (2, 9, 2)},
        {},
    ),
    "lora": (
        mixture_of_lora_linear,
        {"x": (2, 9, 32), "weight": (40, 32), "bias": (40,), "lora_a": (2, 8, 32), "lora_b": (2, 40, 8),
         "gate": (2, 9, 2)},
        {},
    ),
    "rms_norm": (rms_norm, {"x": (17, 48), "weight": (48,)}, {"eps": 1e-6}),
    "layer norm": (
        layer_norm, {"x": (17, 48), "residual": (17, 48), "weight": (48,), "bias": (48,), "x_bias": (48,)}, {},
    ),
    "gated_gelu": (gated_gelu, {"gate": (17, 48), "up": (17, 48)}, {}),
}  # fmt: skip

QUERIES, KEYS = KERNELS["attention"]
LAYER_NORM = "residual_layer_norm_backward_kernel"
OUTER = ("outer_kernel", set[str]())
HIDDEN = ("hidden_gradient_kernel", {"p_dhidden"})
ONLY: list[tuple[str, tuple[str, ...], Launches]] = [
    ("attention", ("q",), [(QUERIES, {"p_delta", "p_dq"})]),
    ("attention", ("k",), [(QUERIES, {"p_delta"}), (KEYS, {"p_delta", "p_dk"})]),
    ("attention", ("v",), [(KEYS, {"p_dv"})]),
    ("attention", ("scale_gate",), [(QUERIES, {"p_delta"})]),
    ("attention", ("k", "v"), [(QUERIES, {"p_delta"}), (KEYS, {"p_delta", "p_dk", "p_dv"})]),
    ("attention", ("q", "v"), [(QUERIES, {"p_delta", "p_dq"}), (KEYS, {"p_delta", "p_dv"})]),
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


def gradients(name: str, trained: tuple[str, ...], backend: str, device: torch.device) -> dict[str, Tensor]:
    operator, shapes, options = OPERATORS[name]
    generator = torch.Generator().manual_seed(0)
    inputs = {key: torch.randn(shape, generator=generator).to(device) for key, shape in shapes.items()}
    for key in trained:
        inputs[key].requires_grad_()
    options = {key: value.to(device) if isinstance(value, Tensor) else value for key, value in options.items()}
    out = operator(**inputs, **options, backend=backend)
    out.backward(torch.randn(out.shape, generator=generator).to(device))
    assert all((value.grad is not None) == (key in trained) for key, value in inputs.items())
    return {key: inputs[key].grad for key in trained}  # type: ignore[misc]


@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize(("name", "trained", "expected"), ONLY, ids=[f"{name}: {', '.join(t)}" for name, t, _ in ONLY])
def test_only_what_is_asked_for_is_computed(
    name: str, trained: tuple[str, ...], expected: Launches, launches: Launches, device: torch.device
) -> None:
    whole = gradients(name, tuple(OPERATORS[name][1]), "triton", device)
    launches.clear()
    for key, value in gradients(name, trained, "triton", device).items():
        assert torch.equal(value, whole[key]), key
    assert launches == expected


@pytest.mark.parametrize("name", OPERATORS)
def test_the_formulas_too(name: str, device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """The custom ops compute these formulas on a CPU without the interpreter."""
    if device.type == "cuda":
        pytest.skip("the kernels are compiled here")
    monkeypatch.setattr("lion_kernels.core.operator.launches_on_cpu", lambda: False)
    whole = gradients(name, tuple(OPERATORS[name][1]), "triton", device)
    for trained in OPERATORS[name][1]:
        assert torch.equal(gradients(name, (trained,), "triton", device)[trained], whole[trained]), trained
