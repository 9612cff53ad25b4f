"""LoRA layers of PEFT as one product each, and training with batches that mix adapters.

    y = x W^T + b + sum_e scaling_e * (x A_e^T) B_e^T        (mixture_of_lora_linear)

over the active adapters, or over the adapter that `model(..., adapter_names=[...])` names for each sample. With
`lora_dropout`, the input of the A_e comes from PEFT's own dropout, so that the random numbers are the same. PEFT
supports `adapter_names` only outside training, and its per-layer hooks are gone when gradient checkpointing recomputes
a layer; this module handles both.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from peft.tuners.lora import Linear as LoraLinear
from peft.tuners.lora import LoraLayer, LoraModel
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn
from transformers.modeling_layers import GradientCheckpointingLayer

from lion_fast.drop_in.rewiring import Rewirer, has_own_forward, is_plain_linear
from lion_fast.model.attention import on_kernels
from lion_kernels import mixture_of_lora_linear


class MixedBatch:
    """The state of the current batch, shared by the rewired modules of one PEFT model.

    Attributes:
        names: the adapter of every sample, during a forward pass with `adapter_names`.
        was_mixed: whether the last forward pass of a layer was part of such a pass.
    """

    def __init__(self) -> None:
        self.names: Sequence[str] | None = None
        self.was_mixed = False
        self._routes: dict[tuple, tuple[Tensor, Tensor]] = {}
        self._rows: dict[tuple, Tensor] = {}

    @contextmanager
    def passing(self, names: Sequence[str] | None) -> Iterator[None]:
        """Set the names during a forward pass, or during the second one of a checkpointed layer in backward."""
        self.names, before = names, self.names
        self._routes.clear()
        self._rows.clear()
        try:
            yield
        finally:
            self.names = before

    def route(
        self, names: Sequence[str], adapters: Sequence[str], scalings: Sequence[float], device: torch.device
    ) -> tuple[Tensor, Tensor]:
        """Return a sparse gate [B, 1] and its expert ids [B, 1], -1 for a sample whose adapter is not in `adapters`.

        They are shared by all equal layers, because each copy to the device would synchronise.
        """
        key = (tuple(names), tuple(adapters), tuple(scalings), device)
        if key not in self._routes:
            place = {name: index for index, name in enumerate(adapters)}
            ids = [place.get(name, -1) for name in names]
            weights = [scalings[index] if index >= 0 else 0.0 for index in ids]
            gate = torch.tensor(weights, dtype=torch.float32).to(device).unsqueeze(1)
            self._routes[key] = gate, torch.tensor(ids).to(device).unsqueeze(1)
        return self._routes[key]

    def rows(self, names: Sequence[str], adapter: str, device: torch.device) -> Tensor:
        """Return the samples of one adapter, shared by all layers."""
        key = (tuple(names), adapter, device)
        if key not in self._rows:
            self._rows[key] = torch.tensor([i for i, name in enumerate(names) if name == adapter]).to(device)
        return self._rows[key]


class ForgetsNoNames:
    """A LoRA layer of PEFT that raises if a checkpoint lost the names of a mixed batch."""

    operators = "adapter_names in training"
    kernel_backend: str
    mixed_batch: MixedBatch
    disable_adapters: bool

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        self._expect_names(kwargs.get("adapter_names"))
        return super().forward(x, *args, **kwargs)  # type: ignore[misc]

    def _expect_names(self, names: Sequence[str] | None) -> None:
        if torch.compiler.is_compiling() or self.disable_adapters:
            return
        in_backward = torch._C._current_graph_task_id() != -1
        if in_backward and names is None and self.mixed_batch.was_mixed:
            raise RuntimeError(
                "adapter_names: a layer of a batch that mixes adapters is computed again in backward without its "
                "names; checkpoint with model.gradient_checkpointing_enable(), whose layers keep them"
            )
        if not in_backward:
            self.mixed_batch.was_mixed = names is not None


class LoraLinearOnKernels(ForgetsNoNames):
    """PEFT's `lora.Linear` computed by `mixture_of_lora_linear`, or by PEFT where that would differ."""

    operators = "mixture_of_lora_linear"
    # PEFT's
    base_layer: Any
    lora_A: Any
    lora_B: Any
    lora_dropout: Any
    lora_bias: dict[str, bool]
    lora_variant: dict[str, Any]
    scaling: dict[str, float]
    active_adapters: list[str]
    merged: bool
    _cast_input_dtype: Callable[[Tensor, torch.dtype], Tensor]

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        names = kwargs.get("adapter_names")
        self._expect_names(names)
        others = any(value is not None for name, value in kwargs.items() if name != "adapter_names")
        wanted = self.active_adapters if names is None else set(names)
        adapters = [name for name in self.lora_A if name in wanted]
        if args or others or not self._fuses(x, adapters, names):
            return super(ForgetsNoNames, self).forward(x, *args, **kwargs)  # type: ignore[misc]
        self._check_forward_args(x, adapter_names=names)  # type: ignore[attr-defined]
        dropped = self._dropped(x, adapters, names)
        if torch.is_autocast_enabled(x.device.type):
            x = x.to(torch.get_autocast_dtype(x.device.type))  # as in the base layer, whose result has this dtype, too
        scalings = [self.scaling[name] for name in adapters]
        ids = None
        if names is None:
            gate = torch.stack([torch.full((), s, dtype=torch.float32, device=x.device) for s in scalings])
        else:
            gate, ids = self.mixed_batch.route(names, adapters, scalings, x.device)
        out = mixture_of_lora_linear(
            x,
            self.base_layer.weight,
            self.base_layer.bias,
            _stack([self.lora_A[name].weight for name in adapters], rank_dim=0),
            _stack([self.lora_B[name].weight for name in adapters], rank_dim=1),
            gate,
            expert_ids=ids,
            update_input=None if dropped is None else dropped.to(x.dtype),
            backend=self.kernel_backend,
        )
        if not any(self.lora_bias[name] for name in adapters):
            return out
        return out + self._update_of_bias(adapters, gate, ids, x.dim()).to(out.dtype)

    def _fuses(self, x: Tensor, adapters: list[str], names: Sequence[str] | None) -> bool:
        """Return whether the kernels compute the same as PEFT."""
        if not adapters or self.disable_adapters or self.merged or not on_kernels(self.kernel_backend, x.device):
            return False
        linears = [self.base_layer, *(part[name] for part in (self.lora_A, self.lora_B) for name in adapters)]
        # PEFT computes the update in the adapter's dtype; only autocast makes it the base layer's.
        one_dtype = torch.is_autocast_enabled(x.device.type) or all(
            linear.weight.dtype == x.dtype for linear in linears
        )
        # Several active adapters with dropout have different inputs.
        one_input = len(adapters) == 1 or names is not None or not self._drops(adapters)
        return (
            one_dtype
            and one_input
            and all(is_plain_linear(linear) for linear in linears)
            and not any(name in self.lora_variant for name in adapters)
        )

    def _drops(self, adapters: list[str]) -> bool:
        dropouts = [self.lora_dropout[name] for name in adapters]
        return any(dropout.training and getattr(dropout, "p", 0) > 0 for dropout in dropouts)  # or nn.Identity

    def _dropped(self, x: Tensor, adapters: list[str], names: Sequence[str] | None) -> Tensor | None:
        """Return the updates' input if it is not x; a mixed batch drops per adapter."""
        if not self._drops(adapters):
            return None
        if names is None:
            return self.lora_dropout[adapters[0]](self._cast_input_dtype(x, self.lora_A[adapters[0]].weight.dtype))
        dropped = x.clone()
        for name in adapters:
            rows = self.mixed_batch.rows(names, name, x.device)
            dropped.index_copy_(0, rows, self.lora_dropout[name](x[rows]))
        return dropped

    def _update_of_bias(self, adapters: list[str], gate: Tensor, ids: Tensor | None, dims: int) -> Tensor:
        """Return sum_e g_e b_e with the biases of the B: [Dout], or [B, 1, ..., Dout] in a mixed batch."""
        none = self.lora_B[adapters[0]].weight.new_zeros(self.base_layer.weight.shape[0])
        biases = torch.stack([self.lora_B[name].bias if self.lora_bias[name] else none for name in adapters])
        if ids is None:
            return gate.to(biases.dtype) @ biases
        rows = biases[ids[:, 0].clamp(min=0)] * gate.to(biases.dtype)  # gates of "no adapter" are zero
        return rows.view(len(rows), *[1] * (dims - 2), -1)


class MixesInTraining:
    """PEFT's `LoraModel` with mixed batches in training."""

    operators = "adapter_names in training"
    mixed_batch: MixedBatch
    training: bool

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        names = kwargs.get("adapter_names")
        whole: Any = super()
        hooks: AbstractContextManager[None] = whole._enable_peft_forward_hooks(*args, **kwargs)
        training, self.training = self.training, names is None and self.training  # PEFT refuses if it is True
        try:
            hooks.__enter__()
        finally:
            self.training = training
        try:
            with self.mixed_batch.passing(names):
                yield
        finally:
            hooks.__exit__(None, None, None)  # without the error, with which PEFT would not remove its hooks


class KeepsNames:
    """A layer that gradient checkpointing recomputes with the adapters' names of the first pass."""

    operators = "adapter_names in training"
    mixed_batch: MixedBatch

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        whole: Any = super(KeepsNames, self)  # noqa: UP008 (PyTorch 2.11 cannot trace it without arguments)
        if self.mixed_batch.names is not None:
            kwargs["adapter_names"] = self.mixed_batch.names  # a checkpoint saves the arguments
        return whole.__call__(*args, **kwargs)

    def forward(self, *args: Any, adapter_names: Sequence[str] | None = None, **kwargs: Any) -> Any:
        whole: Any = super(KeepsNames, self)  # noqa: UP008
        if adapter_names is None or self.mixed_batch.names is not None:
            return whole.forward(*args, **kwargs)
        with self.mixed_batch.passing(adapter_names), _naming(self, adapter_names):
            return whole.forward(*args, **kwargs)


@contextmanager
def _naming(module: Any, names: Sequence[str]) -> Iterator[None]:
    """Install PEFT's hooks that pass the names to its layers, as in the forward pass."""

    def add_names(layer: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        return args, {**kwargs, "adapter_names": names}

    layers: list[Any] = [layer for layer in module.modules() if isinstance(layer, LoraLayer | AuxiliaryTrainingWrapper)]
    with ExitStack() as stack:
        for layer in layers:
            stack.callback(layer.register_forward_pre_hook(add_names, with_kwargs=True).remove)
        yield


def _stack(weights: list[Tensor], rank_dim: int) -> Tensor:
    """Stack weights as [E, ...], padding smaller ranks with zeros, which add nothing."""
    rank = max(weight.shape[rank_dim] for weight in weights)
    if len(weights) == 1:
        return weights[0].unsqueeze(0)
    return torch.stack(
        [F.pad(w, (0, 0, 0, rank - len(w)) if rank_dim == 0 else (0, rank - w.shape[1])) for w in weights]
    )


def rewire_lora(rewirer: Rewirer) -> None:
    """Rewire the LoRA layers, and in every PEFT model the modules that mixed batches need."""
    modules: list[Any] = list(rewirer.names)
    mixed_batch: dict[Any, MixedBatch] = {}
    for tuner in (module for module in modules if isinstance(module, LoraModel)):
        mixed_batch |= dict.fromkeys(tuner.modules(), MixedBatch())
    layers: list[Any] = [module for module in modules if isinstance(module, LoraLayer)]
    for layer in layers:
        layer.mixed_batch = mixed_batch.get(layer) or MixedBatch()  # transformers has adapters without a PEFT model
        objection = _objection(layer)
        if objection is None:
            rewirer.rewire(layer, LoraLinearOnKernels)
        elif not has_own_forward(layer):
            rewirer.rewire(layer, ForgetsNoNames)
        for reason in _partly_left(layer) if objection is None else (objection,):
            rewirer.leave(layer, reason)
    for module, batch in mixed_batch.items():
        kind = _kind_for_mixing(module)
        if kind is not None:
            module.mixed_batch = batch
            rewirer.rewire(module, kind)


def _kind_for_mixing(module: nn.Module) -> type | None:
    if isinstance(module, LoraModel):
        return MixesInTraining
    checkpoints = isinstance(module, GradientCheckpointingLayer) and not has_own_forward(module)
    if checkpoints and any(isinstance(layer, LoraLayer | AuxiliaryTrainingWrapper) for layer in module.modules()):
        return KeepsNames
    return None


def _objection(layer: Any) -> str | None:
    base = layer.base_layer
    if type(layer) is not LoraLinear:
        return f"no operator for {type(layer).__module__.rpartition('.')[2]}.{type(layer).__name__}"
    if not is_plain_linear(base):
        return f"the base layer is {type(base).__name__}, with hooks or no plain nn.Linear"
    if layer.fan_in_fan_out:
        return "fan_in_fan_out: the base weight lies transposed"
    if has_own_forward(layer):
        return "the instance has a forward of its own"
    if all(name in layer.lora_variant for name in layer.lora_A):
        return "every adapter is " + _variants(layer)
    return None


def _partly_left(layer: Any) -> Iterator[str]:
    """Yield the computations of a rewired layer that PEFT still does."""
    if layer.lora_variant:
        yield "PEFT computes the adapters that are " + _variants(layer)
    dropped = {name: dropout.p for name, dropout in layer.lora_dropout.items() if getattr(dropout, "p", 0)}
    if dropped and len(layer.lora_A) > 1:
        shares = ", ".join(f"{name!r} {p}" for name, p in dropped.items())
        yield f"lora_dropout ({shares}): PEFT computes several at once in training, as each reads another input"
    weights = {part[name].weight.dtype for part in (layer.lora_A, layer.lora_B) for name in part}
    if weights != {layer.base_layer.weight.dtype}:
        yield "adapters of another dtype than the base layer: outside autocast PEFT computes the update in theirs"


def _variants(layer: Any) -> str:
    return ", ".join(
        f"{name!r} {type(variant).__name__.removesuffix('LinearVariant')}"
        for name, variant in layer.lora_variant.items()
    )
