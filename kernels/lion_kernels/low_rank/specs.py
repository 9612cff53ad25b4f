"""The compiled configurations of the low-rank kernels, for the ahead-of-time report."""

from itertools import product
from typing import Any

import torch

from lion_kernels.core.specs import KernelSpec
from lion_kernels.core.tuned_sizes import shipped
from lion_kernels.low_rank.kernels import (
    hidden_gradient_kernel,
    hidden_kernel,
    linear_kernel,
    outer_kernel,
    up_gradient_kernel,
    update_kernel,
)
from lion_kernels.low_rank.sizes import Problem

_BF16, _FP32 = torch.bfloat16, torch.float32
_ALL = ("hidden", "update", "hidden_gradient", "outer", "up_gradient")
# LION with FlanT5-XL, and a soft and a sparse mixture of LoRA; a training batch, a prompt and a decoding step.
_TYPICAL: dict[str, tuple[Problem, tuple[str, ...]]] = {
    "lion": (Problem(16384, 2048, 2048, 2, 64, "channel", _BF16, tasks=2), (*_ALL, "linear")),
    "lion-fp32": (Problem(16384, 2048, 2048, 2, 64, "channel", _FP32, tasks=2), _ALL),
    "lion-decode": (Problem(4, 2048, 2048, 2, 64, "channel", _BF16, tasks=2), ("hidden", "update", "linear")),
    "many-tasks": (Problem(16384, 2048, 2048, 2, 64, "channel", _BF16, tasks=32), ("update", "hidden_gradient")),
    "dense": (Problem(16384, 4096, 4096, 4, 8, "dense", _BF16, relu=False), (*_ALL, "linear")),
    "sparse": (Problem(16384, 4096, 4096, 8, 64, "sparse", _BF16, named=2, relu=False), (*_ALL[:-1], "linear")),
    "sparse-few": (
        Problem(320, 4096, 4096, 8, 64, "sparse", _BF16, named=2, relu=False),
        ("hidden", "update", "hidden_gradient"),
    ),
}


def kernel_specs() -> list[KernelSpec]:
    """Return every kernel at typical problems, with its default tiles and those of every shipped table."""
    specs = []
    kernels = {
        "hidden": hidden_kernel,
        "update": update_kernel,
        "hidden_gradient": hidden_gradient_kernel,
        "outer": outer_kernel,
        "up_gradient": up_gradient_kernel,
        "linear": linear_kernel,
    }
    for (problem_name, (typical, used)), compact in product(_TYPICAL.items(), (False, True)):
        problem = typical._replace(compact=compact)
        split = problem.rows_class == "decode"
        for kernel_name in used:
            kernel = kernels[kernel_name]
            constants = problem.constants(kernel_name, split=split, gate_gradient=problem.form != "channel")
            tables = [{}, *shipped(f"low_rank.{kernel_name}")]
            for number, table in enumerate(tables):
                name = f"low_rank.{kernel_name}[{problem_name}{', compact' if compact else ''}]"
                name += f"[table {number}]" if number else ""
                specs.append(_spec(name, kernel, problem, kernel_name, {**constants, **table}, split))
    return specs


def _spec(
    name: str, kernel: Any, problem: Problem, kernel_name: str, constants: dict[str, Any], split: bool
) -> KernelSpec:
    value = {torch.bfloat16: "*bf16", torch.float32: "*fp32"}[problem.dtype]
    fp32 = {"p_weights", "p_biases"} if kernel_name in ("outer", "up_gradient") else set()
    fp32 |= {"p_dgate"} if kernel_name == "hidden_gradient" else set()
    fp32 |= {"p_hidden"} if split else set()
    absent = {"p_ids"} & set(kernel.arg_names) if problem.form == "dense" else set()
    gates_by = "up_gradient" if problem.form == "channel" else "hidden_gradient"  # where dgate is written
    absent |= {"p_dgate"} & set(kernel.arg_names) if kernel_name != gates_by else set()
    signature = {}
    for argument in kernel.arg_names:
        if argument == "p_ids":
            signature[argument] = "*i64"
        elif argument.startswith("p_"):
            signature[argument] = "*fp32" if argument in fp32 else value
        else:
            signature[argument] = "i32"
    matrix = problem.dtype.itemsize == 2 and kernel_name != "up_gradient" and problem.rows_class == "many"
    return KernelSpec(
        name=name,
        kernel=kernel,
        signature=signature,
        constexprs={key: entry for key, entry in constants.items() if key in kernel.arg_names} | dict.fromkeys(absent),
        num_warps=constants["num_warps"],
        num_stages=constants["num_stages"],
        matrix=matrix,
        divisible=(
            "channels_in",
            "channels",
            "stride_x",
            "stride_grad",
            "stride_residual",
            "channels_per_split",
            "channels_per_program",
        ),
        compact=problem.compact,
    )
