"""Every operator rejects unsupported input: a ValueError names the argument, what came and what was expected.

The reference says the same of shapes, ids and the activation.
"""

from typing import Any

import pytest
import torch
from torch import Tensor

import lion_kernels
import lion_reference
from lion_kernels.core.backend import interpreting
from tests.kernels.contract import ATTENTION, SMALL, by_case, make, operator_of, recorded

Arguments = dict[str, Any]


def zeros(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.zeros(shape, dtype=dtype)


META = torch.device("meta")
INT64 = torch.int64
# Valid arguments of each operator; each row of `ERRORS` changes some of them.
FITTING: dict[str, Arguments] = {
    "assemble_inputs": {
        "prefix": zeros(2, 3, 8),
        "input_ids": zeros(2, 4, dtype=INT64),
        "embedding": zeros(9, 8),
        "soft_prompt": zeros(8),
        "soft_prompt_id": 20,
    },
    "gated_gelu": {"gate": zeros(3, 8), "up": zeros(3, 8)},
    "mixture_of_adapters": {
        "x": zeros(3, 5, 32),
        "down_weight": zeros(2, 8, 32),
        "down_bias": zeros(2, 8),
        "up_weight": zeros(2, 32, 8),
        "up_bias": zeros(2, 32),
        "gate": zeros(4, 2, 32),
        "task_ids": torch.tensor([0, 3, 1]),
        "residual": zeros(3, 5, 32),
    },
    "mixture_of_lora_linear": {
        "x": zeros(3, 5, 32),
        "weight": zeros(40, 32),
        "bias": zeros(40),
        "lora_a": zeros(2, 8, 32),
        "lora_b": zeros(2, 40, 8),
        "gate": zeros(4, 2, 40),
        "task_ids": torch.tensor([0, 3, 1]),
    },
    "multi_scale_attention": {
        "q": zeros(2, 3, 2, 16),
        "keys": [zeros(2, 4, 2, 16)] * 2,
        "values": [zeros(2, 4, 2, 16)] * 2,
    },
    "relative_bias_attention": {
        **dict.fromkeys(("q", "k", "v"), zeros(2, 4, 2, 16)),
        "bias_table": zeros(32, 2),
    },
    "residual_layer_norm": {
        **dict.fromkeys(("x", "residual"), zeros(3, 8)),
        **dict.fromkeys(("weight", "bias"), zeros(8)),
        "eps": 1e-12,
    },
    "rms_norm": {"x": zeros(3, 8), "weight": zeros(8), "eps": 1e-6},
}
DENSE = {"task_ids": None, "gate": zeros(3, 5, 2)}  # of mixture_of_adapters
# What the reference rejects in the same words, and then what only the kernels do.
SHARED: dict[str, list[tuple[Arguments, str]]] = {
    "mixture_of_adapters": [
        ({"down_weight": zeros(2, 8, 31)}, r"down_weight: expected \[E, r, D\] with D=32 \(from x\), got \[2, 8, 31\]"),
        ({"down_bias": zeros(2, 7)}, r"down_bias: expected \[2, 8\], got \[2, 7\]"),
        ({"up_weight": zeros(2, 8, 32)}, r"up_weight: expected \[2, 32, 8\], got \[2, 8, 32\]"),
        ({"up_bias": zeros(3, 32)}, r"up_bias: expected \[2, 32\], got \[3, 32\]"),
        ({"residual": zeros(3, 4, 32)}, r"residual: expected \[3, 5, 32\], got \[3, 4, 32\]"),
        ({"gate": zeros(4, 2, 31)}, r"gate: expected \[R, 2, 32\] with task_ids, got \[4, 2, 31\]"),
        ({"task_ids": torch.tensor([0, 1])}, r"task_ids: expected leading dimensions \[3, 5\].*got \[2\]"),
        ({"task_ids": torch.tensor([0, 4, 1])}, r"task_ids: expected values from 0 to 3, got \[4\]"),
        ({"task_ids": torch.tensor([0, -1, 1])}, r"task_ids: expected values from 0 to 3, got \[-1\]"),
        ({"task_ids": zeros(3)}, "task_ids: expected integers, got torch.float32"),
        ({"task_ids": None}, r"gate: expected \[..., 2\] \(E from down_weight\), got \[4, 2, 32\]"),
        ({"expert_ids": zeros(3, 5, 1).long()}, "task_ids, expert_ids: expected at most one"),
        ({**DENSE, "gate": zeros(3, 4, 2)}, r"gate: expected leading dimensions \[3, 5\].*got \[3, 4\]"),
        (
            {**DENSE, "expert_ids": zeros(3, 5, 1).long()},
            r"expert_ids: expected \[3, 5, 2\] \(from gate\), got \[3, 5, 1\]",
        ),
        ({**DENSE, "expert_ids": torch.full((3, 5, 2), 2)}, r"expert_ids: expected values from -1 to 1, got \[2\]"),
        ({"activation": "gelu"}, "activation: expected 'relu' or 'identity', got 'gelu'"),
    ],
    "mixture_of_lora_linear": [
        ({"weight": zeros(40, 31)}, r"weight: expected \[Dout, 32\] \(Din from x\), got \[40, 31\]"),
        ({"bias": zeros(41)}, r"bias: expected \[40\], got \[41\]"),
        ({"lora_a": zeros(2, 8, 31)}, r"lora_a: expected \[E, r, 32\] \(Din from x\), got \[2, 8, 31\]"),
        ({"lora_b": zeros(2, 8, 40)}, r"lora_b: expected \[2, 40, 8\], got \[2, 8, 40\]"),
        ({"gate": zeros(4, 2, 32)}, r"gate: expected \[R, 2, 40\] with task_ids, got \[4, 2, 32\]"),
        ({"task_ids": torch.tensor([0, 4, 1])}, r"task_ids: expected values from 0 to 3, got \[4\]"),
    ],
    "multi_scale_attention": [
        ({"values": [zeros(2, 4, 2, 16)]}, "values: expected one per feature map of keys, got 1 for 2 keys"),
        ({"keys": [], "values": []}, "values: expected one per feature map of keys, got 0 for 0 keys"),
        ({"keys": [zeros(2, 4, 1, 16)] * 2}, r"keys\[0\]: expected \[2, 'L_s', 2, 16\] .*got \[2, 4, 1, 16\]"),
        ({"values": [zeros(2, 3, 2, 16)] * 2}, r"values\[0\]: expected \[2, 4, 2, 16\]"),
        ({"key_padding_mask": zeros(2, 3)}, r"key_padding_mask: expected \[2, 4\] for keys\[0\], got \[2, 3\]"),
        ({"key_padding_mask": [None]}, r"key_padding_mask: expected 2 \(from keys\), got 1"),
        ({"scale_gate": zeros(3)}, r"scale_gate: expected \[2\] .*got \[3\]"),
    ],
    "relative_bias_attention": [
        ({"k": zeros(2, 3, 2, 16)}, r"k: expected \[2, 'M >= 4', 2, 16\] .*got \[2, 3, 2, 16\]"),
        ({"v": zeros(2, 3, 2, 16)}, r"v: expected \[2, 4, 2, 16\] .*got \[2, 3, 2, 16\]"),
        ({"bias_table": zeros(32, 3)}, r"bias_table: expected \[num_buckets, 2\] .*got \[32, 3\]"),
        ({"key_padding_mask": zeros(2, 3)}, r"key_padding_mask: expected \[2, 4\] .*got \[2, 3\]"),
    ],
}
ERRORS: dict[str, list[tuple[Arguments, str]]] = {
    "assemble_inputs": [
        ({"embedding": zeros(8)}, r"embedding: expected floating \[vocabulary, D\], got torch.float32 \[8\]"),
        ({"embedding": zeros(9, 8).int()}, r"embedding: expected floating .*, got torch.int32 \[9, 8\]"),
        ({"prefix": zeros(2, 3, 7)}, r"prefix: expected floating \[B, P, 8\] \(D from .*\), got .* \[2, 3, 7\]"),
        ({"prefix": zeros(3, 8)}, r"prefix: expected floating \[B, P, 8\] \(D from embedding\), got .* \[3, 8\]"),
        ({"prefix": zeros(2, 3, 8).int()}, r"prefix: expected floating \[B, P, 8\] .*, got torch.int32"),
        ({"input_ids": zeros(3, 4).long()}, r"input_ids: expected int32 or int64 \[2, L\] .*, got .* \[3, 4\]"),
        ({"input_ids": zeros(2).long()}, r"input_ids: expected int32 or int64 \[2, L\] .*, got .* \[2\]"),
        ({"input_ids": zeros(2, 4)}, r"input_ids: expected int32 or int64 \[2, L\] .*, got torch.float32 \[2, 4\]"),
        ({"soft_prompt": zeros(1, 8)}, r"soft_prompt: expected floating \[8\] .*, got torch.float32 \[1, 8\]"),
        ({"soft_prompt": zeros(8).int()}, r"soft_prompt: expected floating \[8\] .*, got torch.int32 \[8\]"),
        ({"soft_prompt": zeros(8).to(META)}, r"soft_prompt: expected device cpu \(from .*\), got meta"),
        (
            {"input_ids": torch.tensor([[0, 9], [-1, 20]])},
            r"input_ids: expected ids from 0 to 8 \(from embedding\) or soft_prompt_id 20, got \[-1, 9\]",
        ),
    ],
    "gated_gelu": [
        ({"gate": zeros()}, r"gate: expected floating \[..., D\], got torch.float32 \[\]"),
        ({"gate": zeros(3, 8).long()}, r"gate: expected floating \[..., D\], got torch.int64 \[3, 8\]"),
        ({"up": zeros(8)}, r"up: expected torch.float32 \[3, 8\] on cpu \(from gate\), got torch.float32 \[8\]"),
        ({"up": zeros(3, 8).half()}, r"up: expected torch.float32 \[3, 8\] .*, got torch.float16 \[3, 8\]"),
        ({"up": zeros(3, 8).to(META)}, r"up: expected .* on cpu \(from gate\), got .* on meta"),
    ],
    "mixture_of_adapters": [
        ({"task_ids": zeros(3).to(torch.complex64)}, "task_ids: expected integers, got torch.complex64"),
        ({"up_bias": zeros(2, 32).double()}, r"up_bias: expected torch.float32 \(as x\), got torch.float64"),
        ({"residual": zeros(3, 5, 32).to(META)}, r"residual: expected on cpu \(as x\), got meta"),
        ({"residual": zeros(3, 5, 32).bool()}, "residual: expected a floating dtype, got torch.bool"),
        ({"x": zeros()}, r"x: expected floating \[..., D\], got torch.float32 \[\]"),
        ({"x": zeros(3, 5, 32).long()}, r"x: expected floating \[..., D\], got torch.int64 \[3, 5, 32\]"),
        ({"gate": zeros(4, 2, 32).long()}, "gate: expected a floating dtype, got torch.int64"),
    ],
    "mixture_of_lora_linear": [
        ({"x": zeros()}, r"x: expected floating \[..., Din\], got torch.float32 \[\]"),
        ({"gate": zeros(4, 2, 40).bool()}, "gate: expected a floating dtype, got torch.bool"),
        ({"lora_b": zeros(2, 40, 8).double()}, r"lora_b: expected torch.float32 \(as x\), got torch.float64"),
        ({"bias": zeros(40).to(META)}, r"bias: expected on cpu \(as x\), got meta"),
        (
            {"update_input": zeros(3, 5, 32).double()},
            r"update_input: expected \[3, 5, 32\] in torch.float32 like x, got",
        ),
    ],
    "multi_scale_attention": [
        ({"q": zeros(2, 3, 16)}, r"q: expected \[B, L, H, Dh\], got \[2, 3, 16\]"),
        ({"q": zeros(2, 3, 2, 16).long()}, "q: expected a floating dtype, got torch.int64"),
        ({"keys": [zeros(2, 4, 2, 16).to(META)] * 2}, r"keys\[0\]: expected on cpu .*got meta"),
        ({"values": [zeros(2, 4, 2, 16).half()] * 2}, r"values\[0\]: expected torch.float32 .*torch.float16"),
        ({"scale_gate": zeros(2).long()}, "scale_gate: expected a floating dtype, got torch.int64"),
    ],
    "relative_bias_attention": [
        ({"q": zeros(2, 4, 16)}, r"q: expected \[B, L, H, Dh\], got \[2, 4, 16\]"),
        ({"k": zeros(2, 4, 2, 16).to(META)}, r"k: expected on cpu .*got meta"),
        ({"v": zeros(2, 4, 2, 16).half()}, r"v: expected torch.float32 \(from q\), got torch.float16"),
        ({"bias_table": zeros(32, 2).long()}, "bias_table: expected a floating dtype, got torch.int64"),
        ({"bias_table": zeros(3, 2)}, "bias_table: expected num_buckets >= 4, got 3"),
        ({"max_distance": 8}, r"max_distance: expected more than 8 \(from bias_table\), got 8"),
    ],
    "residual_layer_norm": [
        ({"x": zeros()}, r"x: expected floating \[..., D\], got torch.float32 \[\]"),
        ({"x": zeros(3, 8).long()}, r"x: expected floating \[..., D\], got torch.int64 \[3, 8\]"),
        ({"residual": zeros(8)}, r"residual: expected floating \[3, 8\] \(from x\), got torch.float32 \[8\]"),
        ({"residual": zeros(3, 8).int()}, r"residual: expected floating \[3, 8\] .*, got torch.int32 \[3, 8\]"),
        ({"weight": zeros(7)}, r"weight: expected floating \[8\] \(D from x\), got torch.float32 \[7\]"),
        ({"bias": zeros(1, 8)}, r"bias: expected floating \[8\] \(D from x\), got torch.float32 \[1, 8\]"),
        ({"bias": zeros(8).to(META)}, r"bias: expected device cpu \(from x\), got meta"),
        ({"x_bias": zeros(8).int()}, r"x_bias: expected floating \[8\] \(D from x\), got torch.int32 \[8\]"),
    ],
    "rms_norm": [
        ({"x": zeros()}, r"x: expected floating \[..., D\], got torch.float32 \[\]"),
        ({"x": zeros(3, 8).long()}, r"x: expected floating \[..., D\], got torch.int64 \[3, 8\]"),
        ({"weight": zeros(7)}, r"weight: expected floating \[8\] \(D from x\), got torch.float32 \[7\]"),
        ({"weight": zeros(1, 8)}, r"weight: expected floating \[8\] \(D from x\), got torch.float32 \[1, 8\]"),
        ({"weight": zeros(8).int()}, r"weight: expected floating \[8\] \(D from x\), got torch.int32 \[8\]"),
        ({"weight": zeros(8).to(META)}, r"weight: expected device cpu \(from x\), got meta"),
    ],
}
DROPOUT: list[tuple[Arguments, str]] = [
    ({"dropout_p": 1.0}, "dropout_p: expected 0 <= dropout_p < 1, got 1.0"),
    ({"dropout_p": -0.1}, "dropout_p: expected 0 <= dropout_p < 1, got -0.1"),
    ({"seed": 2**63}, "seed: expected an int64, got 9223372036854775808"),
    ({"seed": -(2**63) - 1}, "seed: expected an int64, got -9223372036854775809"),
    ({"seed": zeros(1).long()}, r"seed: expected torch.int64 \[\] on cpu, got torch.int64 \[1\] on cpu"),
    ({"seed": torch.tensor(0.0)}, r"seed: expected torch.int64 \[\] on cpu, got torch.float32 \[\] on cpu"),
    ({"seed": torch.tensor(0).int()}, r"seed: expected torch.int64 \[\] on cpu, got torch.int32 \[\] on cpu"),
    ({"seed": torch.tensor(0, device=META)}, r"seed: expected torch.int64 \[\] on cpu, .* on meta"),
]
EVERY: list[tuple[Arguments, str]] = [
    ({"backend": "cuda"}, "backend: expected one of 'auto', 'triton', 'torch', got 'cuda'"),
]
DROPS = ("multi_scale_attention", "relative_bias_attention", "residual_layer_norm")


@pytest.mark.parametrize(
    ("operator", "change", "message"),
    [
        (operator, change, message)
        for operator, errors in ERRORS.items()
        for change, message in [*SHARED.get(operator, []), *errors, *(DROPOUT if operator in DROPS else []), *EVERY]
    ],
)
def test_what_does_not_fit_is_named(operator: str, change: Arguments, message: str) -> None:
    backends = [change["backend"]] if "backend" in change else ["auto", *(["triton"] if interpreting() else [])]
    for backend in backends:
        with pytest.raises(ValueError, match=message):
            getattr(lion_kernels, operator)(**{**FITTING[operator], **change, "backend": backend})


@pytest.mark.parametrize(
    ("operator", "change", "message"), [(operator, *row) for operator, rows in SHARED.items() for row in rows]
)
def test_the_reference_names_it_too(operator: str, change: Arguments, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        getattr(lion_reference, operator)(**FITTING[operator] | change)


WIDE, DOUBLE = zeros(1, 8193), zeros(3, 8).double()
ONLY_TORCH: list[tuple[str, Arguments, str]] = [
    ("rms_norm", {"x": WIDE, "weight": WIDE[0]}, "x: expected D from 1 to 8192 for backend 'triton', got 8193"),
    (
        "residual_layer_norm",
        {**dict.fromkeys(("x", "residual"), WIDE[:, :4097]), **dict.fromkeys(("weight", "bias"), WIDE[0, :4097])},
        "x: expected D from 1 to 4096 for backend 'triton', got 4097",
    ),
    *(
        (
            "multi_scale_attention",
            {"q": zeros(2, 4, 2, width), "keys": [zeros(2, 4, 2, width)], "values": [zeros(2, 4, 2, width)]},
            rf"q: expected Dh a multiple of 8 up to 128 for backend 'triton', got \[2, 4, 2, {width}\]",
        )
        for width in (12, 136)
    ),
    (
        "residual_layer_norm",
        {"residual": DOUBLE},
        "residual: expected float16, bfloat16 or float32 for .*'triton', got",
    ),
    ("rms_norm", {"x": DOUBLE}, r"x: expected float16, bfloat16 or float32 for backend 'triton', got torch\.float64"),
]


@pytest.mark.parametrize(("operator", "change", "message"), ONLY_TORCH)
def test_what_no_kernel_takes_pytorch_does(
    operator: str, change: Arguments, message: str, device: torch.device
) -> None:
    arguments = {name: _to(value, device) for name, value in {**FITTING[operator], **change}.items()}
    with pytest.raises(ValueError, match=message):
        getattr(lion_kernels, operator)(**arguments, backend="triton")
    assert getattr(lion_kernels, operator)(**arguments).isfinite().all()


def _to(value: Any, device: torch.device) -> Any:
    if isinstance(value, list):
        return [_to(one, device) for one in value]
    return value.to(device) if isinstance(value, Tensor) else value


@by_case(SMALL)
def test_no_kernel_takes_fp64(case: Any, device: torch.device) -> None:
    tensors = make(case, torch.float64, device)
    names = {"relative_bias_attention": "q", "multi_scale_attention": "q", "assemble_inputs": "prefix"}
    name = names.get(case.operator, next(iter(tensors)))
    with pytest.raises(ValueError, match=rf"^{name}: expected float.*triton'?, got torch\.float64"):
        operator_of(case)(**case.arguments(tensors), backend="triton")
    assert operator_of(case)(**case.arguments(tensors)).dtype == torch.float64


# Tensors whose dtype is checked; the others must have one of their dtypes, or are cast.
INTERPRETED = {
    "assemble_inputs": ("prefix", "embedding", "soft_prompt"),
    "gated_gelu": ("gate",),
    "mixture_of_adapters": ("x",),
    "mixture_of_lora_linear": ("x",),
    "multi_scale_attention": ("q",),
    "relative_bias_attention": ("q", "bias_table"),
    "residual_layer_norm": ("x", "residual", "weight", "bias", "x_bias"),
    "rms_norm": ("x", "weight"),
}


@pytest.mark.skipif(not interpreting(), reason="the kernels are compiled here")
@by_case(SMALL)
def test_the_interpreter_refuses_bfloat16(case: Any) -> None:
    """The interpreter would silently give wrong results, also in backward for a bfloat16 gradient."""
    for name in [name for name in INTERPRETED[case.operator] if name in make(case)]:
        tensors = make(case)
        alone = case.operator in ("assemble_inputs", "residual_layer_norm", "rms_norm") or name == "bias_table"
        for other, value in tensors.items():
            if value.is_floating_point() and (other == name or not alone):
                tensors[other] = value.bfloat16()
        with pytest.raises(ValueError, match=f"^{name}: bfloat16 is not supported by Triton's interpreter"):
            operator_of(case)(**case.arguments(tensors), backend="triton")
    if case.operator not in ATTENTION:
        op, arguments = recorded(case, make(case), "triton")[-1]
        half = [value.bfloat16() if getattr(value, "dtype", None) == torch.float32 else value for value in arguments]
        with pytest.raises(ValueError, match=r"^(grad|gate): bfloat16 is not supported"):
            op(*half)
