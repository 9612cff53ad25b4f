"""`lion_kernels.mixture_of_adapters` against the fp64 reference: outputs, gradients, dtypes, errors."""

from typing import Any

import pytest
import torch
from torch import Tensor

from lion_kernels import mixture_of_adapters
from lion_reference import mixture_of_adapters as reference

GATES = ("channel", "channel_by_row", "dense", "dense_by_sequence", "dense_shared", "sparse")


def make_inputs(gate: str, experts: int, rank: int, channels: int, shape: tuple[int, ...] = (3, 5)) -> dict[str, Any]:
    """fp64 inputs of one gate form, every floating tensor asking for its gradient."""
    generator = torch.Generator().manual_seed(0)

    def randn(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator, dtype=torch.float64).requires_grad_()

    inputs: dict[str, Any] = {
        "x": randn(*shape, channels),
        "down_weight": randn(experts, rank, channels),
        "down_bias": randn(experts, rank),
        "up_weight": randn(experts, channels, rank),
        "up_bias": randn(experts, channels),
        "residual": randn(*shape, channels),
    }
    if gate.startswith("channel"):
        rows = shape if gate == "channel_by_row" else shape[:1]
        ids = torch.randint(0, 4, rows, generator=generator)
        return {**inputs, "gate": randn(4, experts, channels), "task_ids": ids}
    if gate == "sparse":
        k = min(2, experts)
        ids = torch.stack([torch.randperm(experts + 1, generator=generator)[:k] for _ in range(shape[0] * shape[1])])
        return {**inputs, "gate": randn(*shape, k), "expert_ids": ids.view(*shape, k) - 1}
    leading = {"dense": shape, "dense_by_sequence": shape[:1], "dense_shared": ()}[gate]
    return {**inputs, "gate": randn(*leading, experts)}


def cast(inputs: dict[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    return {
        name: value.detach().to(dtype).requires_grad_() if value.is_floating_point() else value
        for name, value in inputs.items()
    }


def outputs_and_gradients(operator: Any, inputs: dict[str, Any], **options: Any) -> dict[str, Tensor]:
    out = operator(**inputs, **options)
    seed = torch.randn(out.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    names = [name for name, value in inputs.items() if value.is_floating_point()]
    gradients = torch.autograd.grad(out, [inputs[name] for name in names], seed.to(out.dtype))
    return {"out": out, **dict(zip(names, gradients, strict=True))}


def relative_error(got: Tensor, expected: Tensor) -> float:
    return ((got.double() - expected).norm() / expected.norm().clamp(min=1e-12)).item()


@pytest.mark.parametrize("activation", ["relu", "identity"])
@pytest.mark.parametrize(("experts", "rank", "channels"), [(1, 4, 64), (2, 64, 176), (3, 8, 48), (8, 16, 32)])
@pytest.mark.parametrize("gate", GATES)
def test_agrees_with_the_reference(gate: str, experts: int, rank: int, channels: int, activation: str) -> None:
    inputs = make_inputs(gate, experts, rank, channels)
    expected = outputs_and_gradients(reference, inputs, activation=activation)
    for dtype, tolerance in ((torch.float64, 1e-12), (torch.float32, 1e-5)):
        got = outputs_and_gradients(mixture_of_adapters, cast(inputs, dtype), activation=activation)
        for name, value in got.items():
            assert value.dtype == dtype
            assert relative_error(value, expected[name]) < tolerance, (name, dtype)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("gate", GATES)
def test_half_precision_is_no_worse_than_the_plain_formula(gate: str, dtype: torch.dtype) -> None:
    inputs = make_inputs(gate, 2, 16, 64)
    expected = outputs_and_gradients(reference, inputs)
    plain = outputs_and_gradients(reference, cast(inputs, dtype))
    rounding = torch.finfo(dtype).eps / 2  # of the result itself: a gradient of few elements may be lucky in one form
    for name, value in outputs_and_gradients(mixture_of_adapters, cast(inputs, dtype)).items():
        assert relative_error(value, expected[name]) < 2 * relative_error(plain[name], expected[name]) + rounding, name


@pytest.mark.parametrize("absent", ["down_bias", "up_bias", "residual"])
@pytest.mark.parametrize("gate", ["channel", "dense"])
def test_what_may_be_left_out(gate: str, absent: str) -> None:
    inputs = make_inputs(gate, 2, 8, 32)
    del inputs[absent]
    given = {"down_bias": None, "up_bias": None, **inputs}
    expected = reference(**given)
    torch.testing.assert_close(mixture_of_adapters(**given), expected)


@pytest.mark.parametrize("shape", [(6,), (2, 3), (2, 1, 3)])
def test_any_leading_dimensions_and_strides(shape: tuple[int, ...]) -> None:
    inputs = make_inputs("dense_shared", 2, 8, 32)
    x = torch.randn(*shape, 64, dtype=torch.float64)[..., ::2]
    assert not x.is_contiguous()
    inputs |= {"x": x, "residual": x.flip(0)}
    torch.testing.assert_close(mixture_of_adapters(**inputs), reference(**inputs))


def test_a_batch_of_mixed_tasks_is_its_sequences() -> None:
    inputs = make_inputs("channel", 2, 8, 32)
    together = mixture_of_adapters(**inputs)
    for sequence in range(3):
        one = {name: inputs[name][sequence : sequence + 1] for name in ("x", "residual", "task_ids")}
        torch.testing.assert_close(mixture_of_adapters(**{**inputs, **one})[0], together[sequence])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"down_weight": torch.zeros(2, 8, 31)},
            r"down_weight: expected \[E, r, D\] with D=32 \(from x\), got \[2, 8, 31\]",
        ),
        ({"down_bias": torch.zeros(2, 7)}, r"down_bias: expected \[2, 8\], got \[2, 7\]"),
        ({"up_weight": torch.zeros(2, 8, 32)}, r"up_weight: expected \[2, 32, 8\], got \[2, 8, 32\]"),
        ({"up_bias": torch.zeros(3, 32)}, r"up_bias: expected \[2, 32\], got \[3, 32\]"),
        ({"residual": torch.zeros(3, 4, 32)}, r"residual: expected \[3, 5, 32\], got \[3, 4, 32\]"),
        ({"gate": torch.zeros(4, 2, 31)}, r"gate: expected \[R, 2, 32\] with task_ids, got \[4, 2, 31\]"),
        ({"task_ids": torch.tensor([0, 1])}, r"task_ids: expected leading dimensions \[3, 5\].*got \[2\]"),
        ({"task_ids": torch.tensor([0, 4, 1])}, r"task_ids: expected values from 0 to 3, got \[4\]"),
        ({"task_ids": torch.tensor([0, -1, 1])}, r"task_ids: expected values from 0 to 3, got \[-1\]"),
        ({"task_ids": torch.zeros(3)}, "task_ids: expected integers, got torch.float32"),
        ({"task_ids": None}, r"gate: expected \[..., 2\] \(E from down_weight\), got \[4, 2, 32\]"),
        ({"expert_ids": torch.zeros(3, 5, 1).long()}, "task_ids, expert_ids: expected at most one"),
        ({"task_ids": None, "gate": torch.zeros(3, 4, 2)}, r"gate: expected leading dimensions \[3, 5\].*got \[3, 4\]"),
        (
            {"task_ids": None, "gate": torch.zeros(3, 5, 2), "expert_ids": torch.zeros(3, 5, 1).long()},
            r"expert_ids: expected \[3, 5, 2\] \(from gate\), got \[3, 5, 1\]",
        ),
        (
            {"task_ids": None, "gate": torch.zeros(3, 5, 2), "expert_ids": torch.full((3, 5, 2), 2)},
            r"expert_ids: expected values from -1 to 1, got \[2\]",
        ),
        ({"activation": "gelu"}, "activation: expected 'relu' or 'identity', got 'gelu'"),
        ({"backend": "cuda"}, "backend: expected one of 'auto', 'triton', 'torch', got 'cuda'"),
        ({"backend": "triton"}, "mixture_of_adapters has no Triton implementation in this version"),
    ],
)
def test_bad_input_is_named(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        mixture_of_adapters(**{**make_inputs("channel", 2, 8, 32), **change})
