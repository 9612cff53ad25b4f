"""The cases of `lion-fast check`: every operator on varied shapes, and on the model's own for timing."""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

import lion_kernels
import lion_reference
from lion_kernels.attention.plain import dropout_mask as attention_dropout_mask
from lion_kernels.core.cost import Cost
from lion_kernels.core.operator import OPERATORS as DEFINED
from lion_kernels.residual_layer_norm import dropout_mask as row_dropout_mask

DROPOUT_P = 0.25
SEED = 2**40 + 12345
Tensors = dict[str, Tensor]


@dataclass(frozen=True)
class Case:
    """One call of an operator.

    Attributes:
        operator: name of the function in lion_kernels and in lion_reference.
        label: the shapes in words, for the table.
        make: creates the tensor arguments from a generator: floating ones, in fp64, which get gradients, and others.
        options: the other arguments, the same in both packages.
        dropout: whether to drop values; the reference receives the mask as a tensor.
        cost: computes the costs of forward and backward from the tensors; set for timed cases.
    """

    operator: str
    label: str
    make: Callable[[torch.Generator], Tensors]
    options: dict[str, Any] = field(default_factory=dict)
    dropout: bool = False
    cost: Callable[[Tensors], tuple[Cost, Cost]] | None = None

    def run(self, tensors: Tensors) -> Tensor:
        """Run the Triton kernels; raise ValueError if they cannot run, without a fallback."""
        return getattr(lion_kernels, self.operator)(**self.arguments(tensors), backend="triton")

    def arguments(self, tensors: Tensors) -> dict[str, Any]:
        """Return the operator's arguments in lion_kernels, except the backend."""
        dropout = {"dropout_p": DROPOUT_P, "seed": SEED} if self.dropout else {}
        return {**_arguments(tensors), **self.options, **dropout}

    def reference(self, tensors: Tensors) -> Tensor:
        masks = {"dropout_mask": self._dropout_masks(tensors)} if self.dropout else {}
        return getattr(lion_reference, self.operator)(**_arguments(tensors), **self.options, **masks)

    def _dropout_masks(self, tensors: Tensors) -> Any:
        if self.operator == "residual_layer_norm":
            x = tensors["x"]
            return row_dropout_mask(x.shape, DROPOUT_P, SEED).to(x)
        q = tensors["q"]
        batch, queries, heads, _ = q.shape
        keys = _maps(tensors, "keys") or [tensors["k"]]
        masks = [
            attention_dropout_mask(batch, heads, queries, k.shape[1], DROPOUT_P, SEED, map_index=s).to(q)
            for s, k in enumerate(keys)
        ]
        return masks if "k" not in tensors else masks[0]


def _arguments(tensors: Tensors) -> dict[str, Any]:
    """Gather "keys.0", "keys.1" ... of `tensors` in a list, as the operators expect feature maps."""
    plain: dict[str, Any] = {name: value for name, value in tensors.items() if "." not in name}
    gathered = {name: _maps(tensors, name) for name in ("keys", "values", "key_padding_mask")}
    return {**plain, **{name: values for name, values in gathered.items() if values}}


def _maps(tensors: Tensors, name: str) -> list[Tensor]:
    return [value for key, value in tensors.items() if key.startswith(f"{name}.")]


def _where(generator: torch.Generator | None) -> torch.device | None:
    """Return the generator's device; None without a generator, for torch's default device, which may hold no values."""
    return None if generator is None else generator.device


def _randn(generator: torch.Generator, *size: int, scale: float = 1.0) -> Tensor:
    return torch.randn(*size, generator=generator, device=_where(generator), dtype=torch.float64) * scale


def _randint(generator: torch.Generator, low: int, high: int, size: tuple[int, ...]) -> Tensor:
    return torch.randint(low, high, size, generator=generator, device=_where(generator))


def _mask(generator: torch.Generator, *size: int) -> Tensor:
    """Return a mask with about 70 % true."""
    return torch.rand(*size, generator=generator, device=_where(generator)) > 0.3


def _gate(
    generator: torch.Generator, form: str, shape: tuple[int, ...], experts: int, channels: int, tasks: int
) -> Tensors:
    """Return a gate of `form` for x [*shape, D]; channel: for `tasks`, sparse: up to two experts per row."""
    if form in ("channel", "channel by row"):
        rows = shape[:1] if form == "channel" else shape
        ids = _randint(generator, 0, tasks, rows)
        return {"gate": _randn(generator, tasks, experts, channels), "task_ids": ids}
    if form == "sparse":
        ids = _randint(generator, -1, experts, (*shape, 2))
        return {"gate": _randn(generator, *ids.shape), "expert_ids": ids}
    leading = {"dense": shape, "dense by sequence": shape[:1], "dense for all": ()}[form]
    return {"gate": _randn(generator, *leading, experts)}


def adapters(
    form: str,
    shape: tuple[int, ...],
    channels: int,
    experts: int,
    rank: int,
    *,
    tasks: int = 3,
    biases: bool = True,
    timed: bool = False,
    **options: Any,
) -> Case:
    def make(generator: torch.Generator) -> Tensors:
        randn = partial(_randn, generator)
        tensors = {
            "x": randn(*shape, channels),
            "down_weight": randn(experts, rank, channels, scale=channels**-0.5),
            "up_weight": randn(experts, channels, rank, scale=rank**-0.5),
            "residual": randn(*shape, channels),
        }
        if biases:
            tensors |= {"down_bias": randn(experts, rank), "up_bias": randn(experts, channels)}
        return {**tensors, **_gate(generator, form, shape, experts, channels, tasks)}

    def cost(tensors: Tensors) -> tuple[Cost, Cost]:
        rows = tensors["x"].numel() // channels
        return _cost("mixture_of_adapters", rows, channels, experts, rank, tensors["x"].dtype)

    if not biases:
        options |= {"down_bias": None, "up_bias": None}
    label = f"{form} gate, x {_size(shape, channels)}, E {experts}, r {rank}{'' if biases else ', no biases'}"
    label += f", {options['activation']}" if "activation" in options else ""
    label += "" if tasks == 3 else f", {tasks} tasks"
    return Case("mixture_of_adapters", label, make, options, cost=cost if timed else None)


def lora(
    form: str,
    shape: tuple[int, ...],
    channels_in: int,
    channels_out: int,
    experts: int,
    rank: int,
    *,
    tasks: int = 3,
    timed: bool = False,
) -> Case:
    def make(generator: torch.Generator) -> Tensors:
        randn = partial(_randn, generator)
        return {
            "x": randn(*shape, channels_in),
            "weight": randn(channels_out, channels_in, scale=channels_in**-0.5),
            "bias": randn(channels_out),
            "lora_a": randn(experts, rank, channels_in, scale=channels_in**-0.5),
            "lora_b": randn(experts, channels_out, rank, scale=rank**-0.5),
            **_gate(generator, form, shape, experts, channels_out, tasks),
        }

    def cost(tensors: Tensors) -> tuple[Cost, Cost]:
        x = tensors["x"]
        rows = x.numel() // channels_in
        return _cost("mixture_of_lora_linear", rows, channels_in, channels_out, experts, rank, x.dtype, frozen=False)

    label = f"{form} gate, x {_size(shape, channels_in)} to {channels_out}, E {experts}, r {rank}"
    label += "" if tasks == 3 else f", {tasks} tasks"
    return Case("mixture_of_lora_linear", label, make, {"scaling": 0.5}, cost=cost if timed else None)


def maps_attention(
    queries: int,
    lengths: tuple[int, ...],
    head_dim: int,
    *,
    batch: int = 2,
    heads: int = 2,
    mask: bool = False,
    gate: bool = False,
    dropout: bool = False,
    timed: bool = False,
    **options: Any,
) -> Case:
    """Return a case of attention to feature maps.

    `mask` adds a padding mask in which the first element attends nothing of the first map.
    """

    def make(generator: torch.Generator) -> Tensors:
        tensors = {"q": _randn(generator, batch, queries, heads, head_dim)}
        for name in ("keys", "values"):
            for s, length in enumerate(lengths):
                tensors[f"{name}.{s}"] = _randn(generator, batch, length, heads, head_dim)
        if gate:
            tensors["scale_gate"] = _randn(generator, len(lengths))
        if mask:
            for s, length in enumerate(lengths):
                tensors[f"key_padding_mask.{s}"] = _mask(generator, batch, length)
                tensors[f"key_padding_mask.{s}"][0] &= s > 0
        return tensors

    def cost(tensors: Tensors) -> tuple[Cost, Cost]:
        return _cost("multi_scale_attention", tensors["q"], _maps(tensors, "keys"))

    keys = "+".join(map(str, lengths))
    label = f"{batch} x {queries} queries, {keys} keys, {heads} heads of {head_dim}"
    features = " and ".join(name for name, on in (("mask", mask), ("gate", gate)) if on)
    label += f"{', ' if features else ''}{features}{', dropout' if dropout else ''}{_named(options)}"
    return Case("multi_scale_attention", label, make, options, dropout, cost if timed else None)


def biased_attention(
    queries: int,
    keys: int,
    head_dim: int,
    *,
    batch: int = 2,
    heads: int = 2,
    buckets: int = 32,
    mask: bool = False,
    decoder: bool = False,
    dropout: bool = False,
    timed: bool = False,
    **options: Any,
) -> Case:
    def make(generator: torch.Generator) -> Tensors:
        tensors = {
            "q": _randn(generator, batch, queries, heads, head_dim, scale=head_dim**-0.5),
            "k": _randn(generator, batch, keys, heads, head_dim),
            "v": _randn(generator, batch, keys, heads, head_dim),
            "bias_table": _randn(generator, buckets, heads),
        }
        if mask:
            tensors["key_padding_mask"] = _mask(generator, batch, keys)
            tensors["key_padding_mask"][0] = False
        return tensors

    def cost(tensors: Tensors) -> tuple[Cost, Cost]:
        return _cost("relative_bias_attention", tensors["q"], tensors["k"], causal=decoder, learn_bias=True)

    label = f"{batch} x {queries} queries, {keys} keys, {heads} heads of {head_dim}"
    label += "".join(f", {name}" for name, on in (("causal", decoder), ("mask", mask), ("dropout", dropout)) if on)
    label += _named(options | ({} if buckets == 32 else {"buckets": buckets}))
    options = {"causal": decoder, "bidirectional": not decoder, **options}
    return Case("relative_bias_attention", label, make, options, dropout, cost if timed else None)


def layer_norm(
    shape: tuple[int, ...], channels: int, *, x_bias: bool = True, dropout: bool = False, timed: bool = False
) -> Case:
    def make(generator: torch.Generator) -> Tensors:
        tensors = {name: _randn(generator, *shape, channels) for name in ("x", "residual")}
        tensors |= {name: _randn(generator, channels) for name in ("weight", "bias")}
        return {**tensors, "x_bias": _randn(generator, channels)} if x_bias else tensors

    label = f"{_size(shape, channels)}{'' if x_bias else ', no x_bias'}{', dropout' if dropout else ''}"
    cost = _row_cost("residual_layer_norm", "x") if timed else None
    return Case("residual_layer_norm", label, make, {"eps": 1e-12}, dropout, cost)


def rms_norm(shape: tuple[int, ...], channels: int, *, timed: bool = False) -> Case:
    def make(generator: torch.Generator) -> Tensors:
        return {"x": _randn(generator, *shape, channels), "weight": _randn(generator, channels)}

    cost = _row_cost("rms_norm", "x") if timed else None
    return Case("rms_norm", _size(shape, channels), make, {"eps": 1e-6}, cost=cost)


def gated_gelu(shape: tuple[int, ...], channels: int, *, timed: bool = False) -> Case:
    def make(generator: torch.Generator) -> Tensors:
        return {name: _randn(generator, *shape, channels) for name in ("gate", "up")}

    cost = _row_cost("gated_gelu", "gate") if timed else None
    return Case("gated_gelu", _size(shape, channels), make, cost=cost)


def assemble(
    batch: int, prefix_length: int, length: int, channels: int, vocabulary: int, *, timed: bool = False
) -> Case:
    def make(generator: torch.Generator) -> Tensors:
        input_ids = _randint(generator, 0, vocabulary, (batch, length))
        input_ids[:, length // 2] = vocabulary  # the soft prompt's id, beyond the table
        input_ids[-1, -1] = vocabulary
        return {
            "prefix": _randn(generator, batch, prefix_length, channels),
            "input_ids": input_ids,
            "embedding": _randn(generator, vocabulary + 1, channels),
            "soft_prompt": _randn(generator, channels),
        }

    def cost(tensors: Tensors) -> tuple[Cost, Cost]:
        return _cost("assemble_inputs", batch, prefix_length, length, channels, tensors["prefix"].dtype)

    label = f"{batch} x ({prefix_length} + {length}) x {channels}"
    return Case("assemble_inputs", label, make, {"soft_prompt_id": vocabulary}, cost=cost if timed else None)


def _size(shape: tuple[int, ...], channels: int) -> str:
    return " x ".join(map(str, (*shape, channels)))


def _named(options: dict[str, Any]) -> str:
    return "".join(f", {name} {value}" for name, value in options.items())


def _cost(operator: str, *arguments: Any, **options: Any) -> tuple[Cost, Cost]:
    return DEFINED[operator].cost(*arguments, **options)


def _row_cost(operator: str, rows_of: str) -> Callable[[Tensors], tuple[Cost, Cost]]:
    def cost(tensors: Tensors) -> tuple[Cost, Cost]:
        x = tensors[rows_of]
        return _cost(operator, x.numel() // x.shape[-1], x.shape[-1], x.dtype)

    return cost


# Small enough for the interpreter: odd numbers of rows, widths that no tile divides, every form of gate.
CASES: tuple[Case, ...] = (
    adapters("channel", (3, 17), 64, 2, 64),
    adapters("channel", (1, 5), 2048, 1, 4),
    adapters("channel by row", (257,), 40, 2, 8),
    adapters("dense", (417,), 24, 3, 4, activation="identity"),
    adapters("dense by sequence", (2, 9), 1408, 1, 8, biases=False),
    adapters("dense for all", (1, 1), 176, 3, 16),
    adapters("sparse", (3, 5), 72, 8, 16),
    lora("channel", (3, 17), 64, 72, 2, 64),
    lora("channel by row", (129,), 64, 48, 3, 8),
    lora("dense", (17,), 1408, 176, 2, 4),
    lora("dense for all", (1, 1), 176, 64, 1, 16),
    lora("sparse", (2, 17), 176, 64, 8, 16),
    maps_attention(257, (257,), 88, batch=1, heads=1),
    maps_attention(17, (17, 40, 9), 40, mask=True, gate=True),
    maps_attention(17, (33, 17), 88, heads=1, dropout=True),
    maps_attention(1, (257,), 64, heads=1),
    maps_attention(33, (33,), 8),
    maps_attention(17, (33,), 80, heads=1),
    maps_attention(17, (33,), 96, heads=1, mask=True, gate=True, dropout=True),
    maps_attention(5, (65,), 128, heads=1),
    biased_attention(97, 97, 64, batch=1, heads=1),
    biased_attention(33, 33, 40, mask=True),
    biased_attention(65, 65, 24, heads=1, decoder=True),
    biased_attention(1, 257, 64, heads=1, decoder=True),
    biased_attention(17, 50, 88, heads=1, decoder=True, mask=True, dropout=True),
    biased_attention(17, 17, 128, dropout=True),
    layer_norm((1,), 64),
    layer_norm((17,), 176, dropout=True),
    layer_norm((17,), 1408, dropout=True),
    layer_norm((417,), 64, x_bias=False),
    layer_norm((2, 3), 4096),
    rms_norm((1,), 64),
    rms_norm((257,), 176),
    rms_norm((417,), 64),
    rms_norm((2, 17), 2048),
    rms_norm((3,), 4096),
    gated_gelu((1,), 64),
    gated_gelu((257,), 176),
    gated_gelu((417,), 8),
    gated_gelu((2, 5), 5120),
    assemble(1, 1, 3, 64, 7),
    assemble(3, 17, 33, 176, 50),
    assemble(2, 40, 17, 2048, 20),
)

# Shapes of LION-FlanT5-XL in training (64 images, 16 x 1024 tokens) and decoding, in bf16.
TIMED: tuple[Case, ...] = (
    adapters("channel", (16, 1024), 2048, 2, 64, timed=True),
    adapters("channel", (4, 1), 2048, 2, 64, timed=True),
    adapters("dense", (16, 1024), 4096, 4, 8, timed=True),
    adapters("sparse", (16, 1024), 4096, 8, 64, timed=True),
    lora("channel", (16, 1024), 2048, 2048, 2, 64, timed=True),
    lora("sparse", (4, 1), 4096, 4096, 8, 64, timed=True),
    maps_attention(257, (257,), 88, batch=64, heads=16, timed=True),
    maps_attention(257, (257, 257), 88, batch=64, heads=16, timed=True),
    maps_attention(32, (257,), 64, batch=64, heads=12, timed=True),
    biased_attention(417, 417, 64, batch=16, heads=32, timed=True),
    biased_attention(1, 417, 64, batch=16, heads=32, decoder=True, timed=True),
    layer_norm((64, 257), 1408, timed=True),
    rms_norm((16, 1024), 2048, timed=True),
    gated_gelu((16, 1024), 5120, timed=True),
    assemble(16, 289, 128, 2048, 32128, timed=True),
)
OPERATORS = tuple(dict.fromkeys(case.operator for case in CASES))
