"""Calls of lion_kernels' operators with arguments that are valid, and then changed in hostile ways.

What a call returns is compared with the reference in fp64, gradients too, so that a wrong result is found as well.
"""

import inspect
import random
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.nn import Parameter, UninitializedParameter

import lion_kernels
import lion_reference
from lion_kernels.core.arguments import shown
from tests.campaign.running import Trial

Arguments = dict[str, Any]
OPERATORS = (
    "assemble_inputs",
    "gated_gelu",
    "mixture_of_adapters",
    "mixture_of_lora_linear",
    "multi_scale_attention",
    "relative_bias_attention",
    "residual_layer_norm",
    "rms_norm",
)
# The relative error that is allowed beside the reference in fp64.
BOUNDS = {torch.float64: 1e-4, torch.float32: 1e-3, torch.float16: 0.05, torch.bfloat16: 0.2}
MEASURED = 0.1  # of the size of the reference's gradients, below which the error is absolute


class Subclass(Tensor):
    """A subclass of Tensor without behaviour of its own."""


class ParameterSubclass(Parameter):
    """A subclass of Parameter, such as libraries of quantization have."""


def make_trial(rng: random.Random, backends: tuple[Any, ...]) -> Trial:
    """Return a call of an operator with up to three changes to valid arguments."""
    torch.manual_seed(rng.getrandbits(32))
    warnings.simplefilter("ignore")
    operator = rng.choice(OPERATORS)
    sizes = Sizes(rng)
    arguments = VALID[operator](rng, sizes)
    dtype = rng.choice([torch.float32] * 4 + [torch.float16, torch.bfloat16, torch.float64])
    arguments = {name: _each(value, lambda x: x.to(dtype) if floating(x) else x) for name, value in arguments.items()}
    done = [f"{dtype} {sizes}"]
    for _ in range(rng.choice([0, 1, 1, 1, 2, 2, 3])):
        try:
            done.append(rng.choice(CHANGES)(rng, arguments))
        except (RuntimeError, ValueError, TypeError, IndexError) as error:
            done.append(f"not {type(error).__name__}")  # PyTorch has no such tensor
    backend = arguments.pop("backend", rng.choice(backends))
    context = rng.choice(["plain", "plain", "gradients", "gradients", "no_grad", "inference", "autocast"])
    description = f"{operator} {shown(backend)} {context}: {'; '.join(done)}"

    def call() -> dict[str, Tensor]:
        return _call(getattr(lion_kernels, operator), arguments, backend, context)

    parameters = inspect.signature(getattr(lion_kernels, operator)).parameters
    names = [text for name in parameters for text in (f"{name}:", f"{name}[", f"'{name}'")]
    names += [f"unexpected keyword argument '{name}'" for name in OPTIONS]
    return Trial(
        description,
        call,
        [*names, "task_ids, expert_ids:"],
        lambda found: _check(operator, arguments, context, found),
        refusals=(ValueError, TypeError),
    )


def floating(x: Any) -> bool:
    return isinstance(x, Tensor) and x.is_floating_point()


class Sizes:
    """Small sizes, of which some are zero."""

    def __init__(self, rng: random.Random) -> None:
        empty = rng.random() < 0.3
        for name in ("batch", "length", "keys", "heads", "width", "out", "experts", "rank", "rows", "maps", "prefix"):
            zero = empty and rng.random() < 0.2
            setattr(self, name, 0 if zero else rng.randint(1, {"width": 40, "out": 40, "rank": 17}.get(name, 4)))
        self.head_dim = 0 if empty and rng.random() < 0.1 else rng.choice([8, 8, 16, 12])

    batch: int
    length: int
    keys: int
    heads: int
    width: int
    out: int
    experts: int
    rank: int
    rows: int
    maps: int
    prefix: int

    def __str__(self) -> str:
        return ", ".join(f"{name} {value}" for name, value in vars(self).items())


def _gate(rng: random.Random, sizes: Sizes, channels: int) -> Arguments:
    leading = rng.choice([(sizes.batch, sizes.length), (sizes.batch, 1), (sizes.batch,), (1, sizes.length), ()])
    form = rng.choice(["channel", "dense", "sparse"])
    if form == "channel":
        ids = torch.randint(0, max(sizes.rows, 1), leading or (sizes.batch,))
        return {"gate": torch.randn(sizes.rows, sizes.experts, channels), "task_ids": _ids(rng, ids)}
    if form == "dense":
        return {"gate": torch.randn(*leading, sizes.experts)}
    named = rng.choice([0, 1, 1, 2, 5])
    ids = torch.randint(-1, max(sizes.experts, 1), (*leading, named))
    return {"gate": torch.randn(*leading, named), "expert_ids": _ids(rng, ids)}


def _ids(rng: random.Random, ids: Tensor) -> Tensor:
    dtype = rng.choice([torch.int64] * 3 + [torch.int32, torch.int16, torch.int8, torch.uint8])
    return (ids.clamp(min=0) if dtype == torch.uint8 else ids).to(dtype)


def _adapters(rng: random.Random, s: Sizes) -> Arguments:
    given = {
        "x": torch.randn(s.batch, s.length, s.width),
        "down_weight": torch.randn(s.experts, s.rank, s.width),
        "down_bias": rng.choice([None, torch.randn(s.experts, s.rank)]),
        "up_weight": torch.randn(s.experts, s.width, s.rank),
        "up_bias": rng.choice([None, torch.randn(s.experts, s.width)]),
        **_gate(rng, s, s.width),
        "residual": rng.choice([None, torch.randn(s.batch, s.length, s.width)]),
    }
    return given | rng.choice([{}, {"activation": "identity"}])


def _lora(rng: random.Random, s: Sizes) -> Arguments:
    given = {
        "x": torch.randn(s.batch, s.length, s.width),
        "weight": torch.randn(s.out, s.width),
        "bias": rng.choice([None, torch.randn(s.out)]),
        "lora_a": torch.randn(s.experts, s.rank, s.width),
        "lora_b": torch.randn(s.experts, s.out, s.rank),
        **_gate(rng, s, s.out),
    }
    return given | rng.choice([{}, {"scaling": 0.5}, {"update_input": torch.randn(s.batch, s.length, s.width)}])


def _mask(rng: random.Random, *shape: int) -> Tensor | None:
    dtype = rng.choice([torch.bool, torch.int64, torch.uint8, torch.float32])
    return rng.choice([None, torch.randint(0, 2, shape).to(dtype)])


def _dropout(rng: random.Random) -> Arguments:
    return rng.choice([{}, {}, {"dropout_p": 0.25, "seed": 3}, {"dropout_p": 0.5, "seed": torch.tensor(5)}])


def _maps(rng: random.Random, s: Sizes) -> Arguments:
    shapes = [(s.batch, rng.choice([s.keys, s.keys + 1]), s.heads, s.head_dim) for _ in range(s.maps)]
    keys, values = ([torch.randn(shape) for shape in shapes] for _ in range(2))
    return {
        "q": torch.randn(s.batch, s.length, s.heads, s.head_dim),
        "keys": keys,
        "values": values,
        "key_padding_mask": rng.choice([None, [_mask(rng, *shape[:2]) for shape in shapes]]),
        "scale_gate": rng.choice([None, torch.randn(s.maps)]),
        **rng.choice([{}, {"scale": 0.3}]),
        **_dropout(rng),
    }


def _biased(rng: random.Random, s: Sizes) -> Arguments:
    length = s.length + rng.choice([0, s.keys])
    return {
        "q": torch.randn(s.batch, s.length, s.heads, s.head_dim),
        "k": torch.randn(s.batch, length, s.heads, s.head_dim),
        "v": torch.randn(s.batch, length, s.heads, s.head_dim),
        "bias_table": torch.randn(rng.choice([32, 8, 5]), s.heads),
        "key_padding_mask": _mask(rng, s.batch, length),
        "causal": rng.choice([True, False]),
        "bidirectional": rng.choice([True, False]),
        "max_distance": rng.choice([128, 20]),
        **_dropout(rng),
    }


def _layer_norm(rng: random.Random, s: Sizes) -> Arguments:
    width = s.width and s.width + 8  # gradients of a few channels cancel
    given = {name: torch.randn(s.batch, s.length, width) for name in ("x", "residual")}
    given |= {name: torch.randn(width) for name in ("weight", "bias")}
    return given | {"eps": 1e-2, "x_bias": rng.choice([None, torch.randn(width)]), **_dropout(rng)}


def _assemble(rng: random.Random, s: Sizes) -> Arguments:
    ids = torch.randint(0, max(s.rows, 1), (s.batch, s.length))
    return {
        "prefix": torch.randn(s.batch, s.prefix, s.width),
        "input_ids": ids.to(rng.choice([torch.int64, torch.int32])),
        "embedding": torch.randn(s.rows, s.width),
        "soft_prompt": torch.randn(s.width),
        "soft_prompt_id": rng.choice([0, 1]),
    }


VALID: dict[str, Callable[[random.Random, Sizes], Arguments]] = {
    "assemble_inputs": _assemble,
    "gated_gelu": lambda rng, s: {name: torch.randn(s.batch, s.length, s.width) for name in ("gate", "up")},
    "mixture_of_adapters": _adapters,
    "mixture_of_lora_linear": _lora,
    "multi_scale_attention": _maps,
    "relative_bias_attention": _biased,
    "residual_layer_norm": _layer_norm,
    "rms_norm": lambda rng, s: {
        "x": torch.randn(s.batch, s.length, s.width),
        "weight": torch.randn(s.width),
        "eps": 1e-2,
    },
}


def _each(value: Any, change: Callable[[Any], Any]) -> Any:
    return [change(one) for one in value] if isinstance(value, list) else change(value)


def _pick(rng: random.Random, arguments: Arguments) -> tuple[str, int | None, Any]:
    """Return a plain tensor of the arguments, and its place: a name and, in a list, an index."""
    places: list[tuple[str, int | None, Any]] = [("unknown_argument", None, None)]
    for name, value in arguments.items():
        places += [(name, i, one) for i, one in enumerate(value)] if isinstance(value, list) else [(name, None, value)]
    tensors = [place for place in places if _plain(place[2])]
    return rng.choice(tensors or places)


def _put(arguments: Arguments, name: str, index: int | None, value: Any) -> None:
    if index is None:
        arguments[name] = value
    else:
        arguments[name] = [value if i == index else one for i, one in enumerate(arguments[name])]


OBJECTS: tuple[Callable[[], Any], ...] = (
    lambda: None, lambda: [], lambda: [1.0, 2.0], lambda: [[1]], lambda: (), lambda: {}, lambda: {"a": 1}, lambda: "x",
    lambda: "", lambda: "a\nb" * 999, lambda: b"x", lambda: 0, lambda: 1, lambda: -1, lambda: 10**30, lambda: 10**5000,
    lambda: 0.5, lambda: -0.5, lambda: float("nan"), lambda: float("inf"), lambda: 1e400, lambda: 1j, lambda: True,
    lambda: False, lambda: np.zeros((2, 3)), lambda: np.float32(0.5), lambda: np.int64(3), lambda: np.bool_(True),
    lambda: np.array("x"), lambda: object(), lambda: Tensor, lambda: torch.float32, lambda: len, lambda: range(3),
    lambda: iter([1]), lambda: torch.tensor(0.5), lambda: torch.tensor(3), lambda: torch.zeros(2, 3), lambda: ...,
    lambda: [torch.zeros(2, 3)], lambda: [None], lambda: {torch.zeros(1)}, lambda: torch.Size([2]),
    lambda: torch.device("cpu"), lambda: random.Random(), lambda: torch.Generator(), lambda: Ellipsis, lambda: set(),
    lambda: torch.nn.Linear(2, 3), lambda: UninitializedParameter(), lambda: np.random.default_rng(),
)  # fmt: skip
DTYPES = [value for value in vars(torch).values() if isinstance(value, torch.dtype)]


def an_object(rng: random.Random, arguments: Arguments) -> str:
    name = rng.choice(list(arguments))
    arguments[name] = rng.choice(OBJECTS)()
    return f"{name} = {shown(arguments[name])}"


def an_object_in_a_list(rng: random.Random, arguments: Arguments) -> str:
    name, index, _ = _pick(rng, arguments)
    value = rng.choice(OBJECTS)()
    _put(arguments, name, index, value)
    return f"{name}[{index}] = {shown(value)}"


OPTIONS = ("eps", "scale", "scaling", "dropout_p", "seed", "causal", "bidirectional", "max_distance", "activation",
           "backend", "soft_prompt_id", "key_padding_mask", "scale_gate", "task_ids", "expert_ids", "residual",
           "update_input", "x_bias", "unknown_argument")  # fmt: skip


def an_option(rng: random.Random, arguments: Arguments) -> str:
    name = rng.choice(OPTIONS)
    numbers = (0, 1, -1, 2, 0.0, -0.0, 1.0, 0.999999999, 1e-300, 1e300, -1e-9, 2**31, 2**63 - 1, 2**63, -(2**63), 7, 8)
    arguments[name] = rng.choice([rng.choice(OBJECTS)(), rng.choice(numbers), rng.choice(["auto", "torch", "TORCH"])])
    return f"{name} = {shown(arguments[name])}"


def left_out(rng: random.Random, arguments: Arguments) -> str:
    name = rng.choice(list(arguments))
    del arguments[name]
    if not arguments:
        arguments["unknown_argument"] = None
    return f"no {name}"


def a_dtype(rng: random.Random, arguments: Arguments) -> str:
    name, index, x = _pick(rng, arguments)
    dtype = rng.choice(DTYPES)
    if isinstance(x, Tensor):
        _put(arguments, name, index, torch.empty(x.shape, dtype=dtype))
        _put(arguments, name, index, x.detach().to(dtype))  # if there is a conversion
    return f"{name}[{index}] in {dtype}"


def another_floating_dtype(rng: random.Random, arguments: Arguments) -> str:
    name, index, x = _pick(rng, arguments)
    dtype = rng.choice([torch.float16, torch.bfloat16, torch.float32, torch.float64])
    if floating(x):
        _put(arguments, name, index, x.detach().to(dtype))
    return f"{name}[{index}] in {dtype}"


def _quantized(x: Tensor) -> Tensor:
    return torch.quantize_per_tensor(x.float(), 0.1, 10, torch.quint8)


LAYOUTS: dict[str, Callable[[Tensor], Any]] = {
    "sparse": lambda x: x.to_sparse(),
    "csr": lambda x: x.flatten(0, -2).to_sparse_csr(),
    "mkldnn": lambda x: x.float().to_mkldnn(),
    "nested": lambda x: torch.nested.nested_tensor([x, x]),
    "jagged": lambda x: torch.nested.nested_tensor([x, x], layout=torch.jagged),
    "quantized": _quantized,
    "meta": lambda x: x.to("meta"),
    "fake": lambda x: FakeTensorMode().from_tensor(x),
    "negative": lambda x: torch._neg_view(x) if x.is_floating_point() else x,
    "conjugate": lambda x: x.to(torch.complex64).conj(),
    "imaginary part of a conjugate": lambda x: torch.complex(x.float(), -x.float()).conj().imag.to(x.dtype),
    "parameter": lambda x: Parameter(x.detach(), requires_grad=x.is_floating_point()),
    "parameter's subclass": lambda x: ParameterSubclass(x.detach(), requires_grad=False),
    "subclass": lambda x: x.as_subclass(Subclass),
    "uninitialized": lambda x: UninitializedParameter(),
    "masked": lambda x: torch.masked.masked_tensor(x, torch.ones_like(x, dtype=torch.bool)),
    "every other": lambda x: x.repeat_interleave(2, -1)[..., ::2],
    "transposed in memory": lambda x: x.mT.contiguous().mT,
    "expanded": lambda x: x[:1].expand_as(x),
    "at an odd offset": lambda x: torch.cat([x.flatten()[:1], x.flatten()])[1:].view(x.shape),
}
VIEWS = (
    "negative",
    "imaginary part of a conjugate",
    "every other",
    "transposed in memory",
    "expanded",
    "at an odd offset",
)


def a_layout(rng: random.Random, arguments: Arguments, names: tuple[str, ...] = tuple(LAYOUTS)) -> str:
    name, index, x = _pick(rng, arguments)
    layout = rng.choice(names)
    if isinstance(x, Tensor):
        _put(arguments, name, index, LAYOUTS[layout](x.detach()))
    return f"{name}[{index}] {layout}"


def a_view(rng: random.Random, arguments: Arguments) -> str:
    return a_layout(rng, arguments, VIEWS)


def all_on_meta(rng: random.Random, arguments: Arguments) -> str:
    for name, value in arguments.items():
        if not isinstance(value, Tensor | list) or rng.random() < 0.02:
            continue
        arguments[name] = _each(value, lambda x: x.to("meta") if _plain(x) else x)
    return "on meta"


def a_shape(rng: random.Random, arguments: Arguments) -> str:
    name, index, x = _pick(rng, arguments)
    if not isinstance(x, Tensor):
        return "no tensor"
    dim = rng.randrange(max(1, x.dim()))
    shapes: list[Callable[[], Tensor]] = [
        lambda: x.unsqueeze(dim),
        lambda: x.flatten(),
        lambda: x.sum(),
        lambda: x.expand(2, *x.shape),
        lambda: x[(0,) * min(1, x.dim())],
        lambda: x.transpose(0, -1),
        lambda: torch.cat([x, x], dim),
        lambda: x.narrow(dim, 0, max(0, x.shape[dim] - 1)),
        lambda: x.narrow(dim, 0, 0),
        lambda: x.narrow(dim, 0, min(1, x.shape[dim])),
        lambda: x.view(*x.shape, *[1] * 50),
        lambda: torch.zeros(0),
        lambda: torch.zeros(()),
        lambda: x.squeeze(),
    ]
    _put(arguments, name, index, rng.choice(shapes)())
    return f"{name}[{index}] of another shape"


def values(rng: random.Random, arguments: Arguments) -> str:
    name, index, x = _pick(rng, arguments)
    if not isinstance(x, Tensor) or not x.numel() or x.dtype == torch.bool or type(x) is not Tensor:
        return "no values"
    if x.is_floating_point():
        value: Any = rng.choice([float("nan"), float("inf"), -1.0, 0.0, 1e4])
    else:
        value = rng.choice([-1, -2, 1, 3, 4, 5, 100, 127])
    x = x.detach().clone()
    x.view(-1)[rng.randrange(x.numel())] = value
    _put(arguments, name, index, x)
    return f"{name}[{index}] with {value}"


def requires_grad(rng: random.Random, arguments: Arguments) -> str:
    name, index, x = _pick(rng, arguments)
    if floating(x) and type(x) is Tensor and not x.is_inference():
        _put(arguments, name, index, x.detach().requires_grad_())
    return f"{name}[{index}] requires a gradient"


CHANGES = (
    *(an_object,) * 3,
    *(an_option,) * 3,
    an_object_in_a_list,
    left_out,
    *(a_dtype,) * 3,
    *(another_floating_dtype,) * 3,
    *(a_layout,) * 3,
    *(a_view,) * 2,
    all_on_meta,
    *(a_shape,) * 3,
    *(values,) * 2,
    requires_grad,
)


def _plain(value: Any) -> bool:
    return type(value) in (Tensor, Parameter) and value.layout is torch.strided and not value.is_nested


def _call(operator: Callable[..., Tensor], arguments: Arguments, backend: Any, context: str) -> dict[str, Tensor]:
    """Return the output and, with gradients, those of all floating tensors."""
    if context == "gradients":
        for name, value in arguments.items():
            arguments[name] = _each(value, _leaf)
    with (
        torch.set_grad_enabled(context != "no_grad"),
        torch.inference_mode(context == "inference"),
        torch.autocast("cpu", dtype=torch.float16, enabled=context == "autocast"),
    ):
        out = operator(**arguments, backend=backend)
    found = {"out": out.detach()}
    leaves = _leaves(arguments)
    if context == "gradients" and out.requires_grad and leaves:
        torch.manual_seed(0)
        grad = torch.randn(out.shape, device=out.device).to(out.dtype)
        gradients = torch.autograd.grad(out, list(leaves.values()), grad, allow_unused=True)
        found |= {name: value for name, value in zip(leaves, gradients, strict=True) if value is not None}
    return found


def _leaf(x: Any) -> Any:
    if not _plain(x) or not x.is_floating_point() or x.is_inference():
        return x
    return x if x.requires_grad and x.is_leaf else x.detach().requires_grad_()


def _leaves(arguments: Arguments) -> dict[str, Tensor]:
    found = {}
    for name, value in arguments.items():
        for i, one in enumerate(value if isinstance(value, list) else [value]):
            if _plain(one) and one.requires_grad and one.is_leaf:
                found[f"{name}[{i}]"] = one
    return found


def _check(operator: str, arguments: Arguments, context: str, found: dict[str, Tensor]) -> None:
    """Compare with the reference in fp64, unless tensors have no values or an unknown mask drops some."""
    tensors = [x for value in arguments.values() for x in (value if isinstance(value, list | tuple) else [value])]
    tensors = [x for x in tensors if isinstance(x, Tensor)]
    if isinstance(arguments.get("scale"), int | float) and abs(arguments["scale"]) > 100:
        return  # a score beyond fp32
    if not all(_has_values(x) and x.isfinite().all() for x in tensors):
        return
    if not isinstance(arguments.get("dropout_p", 0), int | float) or arguments.get("dropout_p"):
        return
    if not -1 < arguments.get("soft_prompt_id", 0) < len(arguments.get("embedding", [0])):
        return  # the reference reads a row of the table for it
    reference = getattr(lion_reference, operator)
    known = inspect.signature(reference).parameters
    given = {name: value for name, value in arguments.items() if name in known}
    leaves: dict[str, Tensor] = {}

    def wide(name: str, i: int, x: Any) -> Any:
        if not isinstance(x, Tensor):
            return x
        x = x.detach().as_subclass(Tensor)
        if not x.is_floating_point():
            return x.long() if name.endswith("_ids") else x
        x = x.double()
        return leaves.setdefault(f"{name}[{i}]", x.requires_grad_(f"{name}[{i}]" in found))

    for name, value in given.items():
        if isinstance(value, list | tuple):
            given[name] = [wide(name, i, x) for i, x in enumerate(value)]
        else:
            given[name] = wide(name, 0, value)
    expected = {"out": reference(**given)}
    if len(found) > 1:
        torch.manual_seed(0)
        grad = torch.randn(found["out"].shape).to(found["out"].dtype)
        wanted = {name: leaves[name] for name in found if name != "out"}
        gradients = torch.autograd.grad(expected["out"], list(wanted.values()), grad.double(), allow_unused=True)
        expected |= {name: g for name, g in zip(wanted, gradients, strict=True) if g is not None}
    dtypes = [x.dtype for x in [*tensors, found["out"]] if x.dtype in BOUNDS]
    bound = max(BOUNDS[torch.float16] if context == "autocast" else 0, *(BOUNDS[dtype] for dtype in dtypes))
    scale = max((float(value.norm()) for name, value in expected.items() if name != "out"), default=0.0)
    for name, value in expected.items():
        _compare(name, found[name], value.detach(), bound, MEASURED * (scale if name != "out" else 0.0))


def _has_values(x: Tensor) -> bool:
    return not isinstance(x, FakeTensor) and not x.is_meta


def _compare(name: str, got: Tensor, expected: Tensor, bound: float, least: float) -> None:
    assert got.shape == expected.shape, f"{name}: {list(got.shape)}, not {list(expected.shape)}"
    got = got.as_subclass(Tensor).double()
    if not expected.isfinite().all() or not expected.abs().sum() < 1e4:
        return
    assert got.isfinite().all(), f"{name} is not finite"
    error = float((got - expected).norm()) / max(float(expected.norm()), least, 1e-2)
    assert error < bound, f"{name} is {error:.1e} off, more than {bound:.1e}"
