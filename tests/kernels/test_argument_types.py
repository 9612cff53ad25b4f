"""What an argument may be: other types, kinds of tensors and numbers raise an error of one line that names it.

`test_errors.py` has shapes, dtypes and devices.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import Parameter, UninitializedParameter

import lion_kernels
from lion_kernels.core.backend import interpreting
from tests.kernels.contract import SMALL, by_case_and_way, computing, expect_close, make, run
from tests.kernels.test_errors import DROPS, FITTING, Arguments, zeros

BACKENDS = ["auto", "torch", *(["triton"] if interpreting() else [])]
OPTIONAL = {
    "mixture_of_adapters": ("down_bias", "up_bias", "task_ids", "residual"),
    "mixture_of_lora_linear": ("bias", "task_ids", "update_input"),
    "multi_scale_attention": ("scale_gate", "key_padding_mask"),
    "relative_bias_attention": ("key_padding_mask",),
    "residual_layer_norm": ("x_bias",),
}
OTHER_TYPES: list[Any] = [[], [1.0], (), {}, "x", b"x", 0, 1.5, True, np.zeros((3, 8)), Tensor, object(), len]


def _quantized(x: Tensor) -> Tensor:
    return torch.quantize_per_tensor(x.float(), 0.1, 10, torch.quint8)


OTHER_TENSORS: dict[str, Callable[[Tensor], Any]] = {
    "sparse": lambda x: x.to_sparse(),
    "compressed": lambda x: x.flatten(0, -2).to_sparse_csr() if x.dim() > 1 else x.to_sparse(),
    "mkldnn": lambda x: x.float().to_mkldnn(),
    "nested": lambda x: torch.nested.nested_tensor([x, x]),
    "jagged": lambda x: torch.nested.nested_tensor([x, x], layout=torch.jagged) if x.dim() else x.to_sparse(),
    "quantized": _quantized,
    "eight bits": lambda x: x.to(torch.float8_e4m3fn),
    "complex": lambda x: x.to(torch.complex64).conj(),
    "masked": lambda x: torch.masked.masked_tensor(x, torch.ones_like(x, dtype=torch.bool)),
    "uninitialized": lambda x: UninitializedParameter(),
}


def tensors_of(operator: str) -> dict[str, tuple[Tensor, Callable[[Any], Arguments]]]:
    """Return the operator's tensors by name, each with a function that replaces it in fitting arguments."""
    fitting, found = FITTING[operator], {}
    for name, value in fitting.items():
        if isinstance(value, Tensor):
            found[name] = value, lambda other, name=name: fitting | {name: other}
        elif isinstance(value, list):
            found[f"{name}[1]"] = value[1], lambda other, name=name, value=value: fitting | {name: [value[0], other]}
    return found


def expect_refusal(operator: str, arguments: Arguments, name: str, kind: type[Exception] | tuple[Any, ...]) -> None:
    for backend in BACKENDS:
        with pytest.raises(kind) as error:
            getattr(lion_kernels, operator)(**{"backend": backend, **arguments})
        message = str(error.value)
        assert message.startswith(f"{name}: expected "), message
        assert "\n" not in message
        assert len(message) < 300


@pytest.mark.parametrize("operator", FITTING)
def test_other_types(operator: str) -> None:
    for name, (_, replaced) in tensors_of(operator).items():
        values = OTHER_TYPES if name in OPTIONAL.get(operator, ()) else [None, *OTHER_TYPES]
        for value in values:
            expect_refusal(operator, replaced(value), name, TypeError)
    for name in OPTIONAL.get(operator, ()):
        for value in OTHER_TYPES:
            given = FITTING[operator] | {name: value}
            expect_refusal(
                operator, given, name, (TypeError, ValueError) if isinstance(value, list | tuple) else TypeError
            )


@pytest.mark.parametrize("operator", FITTING)
@pytest.mark.filterwarnings("ignore")
def test_other_kinds_of_tensors(operator: str) -> None:
    for name, (value, replaced) in tensors_of(operator).items():
        for change in OTHER_TENSORS.values():
            expect_refusal(operator, replaced(change(value)), name, ValueError)


LISTS: list[Any] = [None, zeros(2, 2, 4, 2, 16), {}, "xy", range(2), iter([1])]
OPTIONS: list[tuple[str, str, list[Any], type[Exception]]] = [
    *(
        (name, "eps", [None, "1e-6", [1e-6], True, zeros(), 1j], TypeError)
        for name in ("rms_norm", "residual_layer_norm")
    ),
    *(
        (name, "eps", [0, 0.0, -1e-6, float("nan"), float("inf"), 10**400, 1e300], ValueError)
        for name in ("rms_norm", "residual_layer_norm")
    ),
    *((name, "dropout_p", [None, "0.1", [0.1], True, zeros()], TypeError) for name in DROPS),
    *((name, "dropout_p", [1, 1.0, -0.1, 2, float("nan"), float("inf"), 10**400], ValueError) for name in DROPS),
    *((name, "seed", ["1", 1.5, True, [1], torch.Generator()], TypeError) for name in DROPS),
    *((name, "seed", [2**63, -(2**63) - 1, 10**5000], ValueError) for name in DROPS),
    ("multi_scale_attention", "scale", ["1", [1.0], True, zeros(), 1j], TypeError),
    ("multi_scale_attention", "scale", [float("nan"), float("-inf"), 1e300], ValueError),
    ("multi_scale_attention", "keys", LISTS, TypeError),
    ("multi_scale_attention", "values", LISTS, TypeError),
    ("multi_scale_attention", "key_padding_mask", [zeros(2, 4).to(torch.complex64), zeros(2, 4) - 1], ValueError),
    ("multi_scale_attention", "q", [zeros(2, 3, 2, 0)], ValueError),
    ("relative_bias_attention", "key_padding_mask", [zeros(2, 4).to(torch.complex64), zeros(2, 4) - 1], ValueError),
    ("relative_bias_attention", "causal", [None, 0, 1, "yes", zeros()], TypeError),
    ("relative_bias_attention", "bidirectional", [None, 0, 1, "yes", zeros()], TypeError),
    ("relative_bias_attention", "max_distance", [None, 128.0, "128", True, torch.tensor(128)], TypeError),
    ("relative_bias_attention", "max_distance", [-1, 0, 65537, 2**63, 10**5000], ValueError),
    ("mixture_of_adapters", "activation", [None, 1, ["relu"], np.array(["relu", "relu"]), torch.relu], TypeError),
    ("mixture_of_adapters", "activation", ["", "RELU", "gelu" * 999], ValueError),
    ("mixture_of_lora_linear", "scaling", [None, "1", [1.0], True, zeros()], TypeError),
    ("mixture_of_lora_linear", "scaling", [float("nan"), float("inf")], ValueError),
    ("assemble_inputs", "soft_prompt_id", [None, 20.0, "20", True, torch.tensor(20)], TypeError),
    ("assemble_inputs", "soft_prompt_id", [2**63, 10**5000], ValueError),
    ("assemble_inputs", "input_ids", [torch.arange(30, 3000).view(2, -1)], ValueError),
    *((name, "backend", [None, 0, ["auto"], np.array(["auto", "auto"]), zeros(2)], TypeError) for name in FITTING),
    *((name, "backend", ["", "Auto", "cuda" * 999], ValueError) for name in FITTING),
]


@pytest.mark.parametrize(("operator", "name", "values", "kind"), OPTIONS)
def test_options(operator: str, name: str, values: list[Any], kind: type[Exception]) -> None:
    for value in values:
        expect_refusal(operator, FITTING[operator] | {name: value}, name, kind)


@pytest.mark.parametrize(
    ("operator", "change", "name"),
    [
        ("mixture_of_adapters", {"down_weight": zeros(0, 8, 32), "up_weight": zeros(0, 32, 8)}, "down_weight"),
        ("mixture_of_adapters", {"down_weight": zeros(2, 0, 32), "up_weight": zeros(2, 32, 0)}, "down_weight"),
        ("mixture_of_adapters", {"gate": zeros(0, 2, 32)}, "gate"),
        ("mixture_of_lora_linear", {"lora_a": zeros(0, 8, 32), "lora_b": zeros(0, 40, 8)}, "lora_a"),
        ("mixture_of_lora_linear", {"lora_a": zeros(2, 0, 32), "lora_b": zeros(2, 40, 0)}, "lora_a"),
        ("mixture_of_lora_linear", {"gate": zeros(0, 2, 40)}, "gate"),
        ("assemble_inputs", {"embedding": zeros(0, 8)}, "embedding"),
    ],
)
def test_nothing_to_choose_from(operator: str, change: Arguments, name: str) -> None:
    """Without experts, ranks, tasks or a vocabulary there is no operator."""
    expect_refusal(operator, FITTING[operator] | change, name, ValueError)


@pytest.mark.parametrize(
    ("operator", "options"),
    [
        ("rms_norm", {"eps": np.float32(1e-6)}),
        ("rms_norm", {"eps": 1}),
        ("residual_layer_norm", {"dropout_p": np.float32(0.5), "seed": np.int64(3)}),
        ("relative_bias_attention", {"max_distance": np.int32(100)}),
        ("multi_scale_attention", {"scale": np.float16(0.5)}),
        ("mixture_of_lora_linear", {"scaling": 2}),
        ("assemble_inputs", {"soft_prompt_id": np.int64(20)}),
    ],
)
@pytest.mark.parametrize("backend", BACKENDS)
def test_numbers_of_numpy_and_integers_are_numbers(operator: str, options: Arguments, backend: str) -> None:
    leaves = {name: _requiring_gradients(value) for name, value in FITTING[operator].items()}
    getattr(lion_kernels, operator)(**leaves | options, backend=backend).sum().backward()


def _requiring_gradients(value: Any) -> Any:
    return value.clone().requires_grad_() if isinstance(value, Tensor) and value.is_floating_point() else value


class OfALibrary(Parameter):
    """A subclass of Parameter, as libraries of quantization have."""


def _negative(x: Tensor) -> Tensor:
    """Return the same values as the negatives of those in memory."""
    return torch.complex(x.detach(), -x.detach()).conj().imag


@by_case_and_way(SMALL, "triton", "torch", "fused")
def test_negative_views_and_subclasses_have_the_same_values(case: Any, way: str, device: torch.device) -> None:
    tensors = make(case, device=device)
    floating = {name: value.detach() for name, value in tensors.items() if value.is_floating_point()}
    expected = {name: value.detach() for name, value in tensors.items()} | floating
    assert all(_negative(value).is_neg() for value in floating.values())
    with computing(way) as backend:
        wanted = run(case, expected, backend)
        expect_close(run(case, expected | {name: _negative(x) for name, x in floating.items()}, backend), wanted)
        subclasses = {name: OfALibrary(x, requires_grad=False) for name, x in floating.items()}
        got = run(case, expected | subclasses, backend)
    expect_close({name: value.as_subclass(Tensor) for name, value in got.items()}, wanted)


def test_a_fake_tensor_beside_a_real_one() -> None:
    fake = FakeTensorMode().from_tensor(zeros(3, 8))
    for given, name in (({"x": fake, "weight": zeros(8)}, "weight"), ({"x": zeros(3, 8), "weight": fake[0]}, "x")):
        expect_refusal("rms_norm", {"eps": 1e-6, **given}, name, TypeError)


@pytest.mark.parametrize("operator", ["mixture_of_adapters", "mixture_of_lora_linear"])
def test_one_task_for_all_without_reading_its_id(operator: str) -> None:
    given = FITTING[operator] | {"task_ids": torch.tensor(1)}
    expected = getattr(lion_kernels, operator)(**given)
    meta = {name: value.to("meta") if isinstance(value, Tensor) else value for name, value in given.items()}
    assert getattr(lion_kernels, operator)(**meta).shape == expected.shape


def test_autocast_in_the_other_half_precision() -> None:
    """PyTorch's autocast refuses to concatenate tensors in it."""
    given = {name: value.bfloat16() if isinstance(value, Tensor) and value.is_floating_point() else value
             for name, value in FITTING["assemble_inputs"].items()}  # fmt: skip
    with torch.autocast("cpu", dtype=torch.float16):
        assert lion_kernels.assemble_inputs(**given).dtype == torch.bfloat16


@pytest.mark.parametrize("operator", ["mixture_of_adapters", "mixture_of_lora_linear"])
def test_autocast_does_not_cast_fp64(operator: str) -> None:
    name = {"mixture_of_adapters": "up_weight", "mixture_of_lora_linear": "lora_b"}[operator]
    wide = FITTING[operator] | {name: FITTING[operator][name].double()}
    with torch.autocast("cpu", dtype=torch.float16):
        expect_refusal(operator, wide, name, ValueError)
        expect_refusal(operator, FITTING[operator] | {name: FITTING[operator][name].int()}, name, ValueError)


@pytest.mark.parametrize(
    ("operator", "change", "message"),
    [
        ("rms_norm", {"eps": -1.0}, "eps: expected a positive, finite number, got -1.0"),
        ("gated_gelu", {"gate": [1.0]}, "gate: expected a torch.Tensor, got list"),
        ("residual_layer_norm", {"dropout_p": 2.0}, "dropout_p: expected 0 <= dropout_p < 1, got 2.0"),
        ("relative_bias_attention", {"causal": 1}, "causal: expected True or False, got 1"),
        ("mixture_of_adapters", {"gate": zeros(4, 2, 32).to_sparse()}, "gate: expected a dense tensor"),
    ],
)
def test_a_compiled_operator_raises_the_same(operator: str, change: Arguments, message: str) -> None:
    torch.compiler.reset()
    compiled = torch.compile(getattr(lion_kernels, operator), backend="eager")
    with pytest.raises((TypeError, ValueError), match=message):
        compiled(**FITTING[operator] | change)


def test_where_backends_run() -> None:
    with pytest.raises(TypeError, match=r"device: expected a torch.device, got 'cpu'"):
        lion_kernels.resolve_backend("auto", "op", "cpu")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"ids: expected a torch.Tensor, got list"):
        lion_kernels.values_on_host([1])  # type: ignore[arg-type]
    assert lion_kernels.values_on_host(torch.tensor([1]).as_subclass(OfALibrary))
    assert not lion_kernels.values_on_host(FakeTensorMode().from_tensor(torch.tensor([1])))
