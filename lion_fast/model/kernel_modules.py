"""The modules of LION with a forward on lion_kernels.

`run_on_kernels` changes the classes of one model's modules in place; parameters keep their names. A class of
`ON_KERNELS` is put in front of the module's own; the other classes below replace it. Such a module has two forwards:
its own on the kernels, and that of its previous class, which runs where `kernel_backend` resolves to PyTorch. A model
on PyTorch therefore computes the same as without these classes.

Each module reads its parameters in its own call, because sharding and offloading load them for that call.
"""

from collections.abc import Callable
from functools import cache
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.activations import GELUActivation
from transformers.models.instructblip.modeling_instructblip import (
    InstructBlipQFormerOutput,
    InstructBlipQFormerSelfOutput,
)
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.models.qwen2.modeling_qwen2 import Qwen2RMSNorm
from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm
from transformers.models.t5.modeling_t5 import T5Attention, T5DenseGatedActDense, T5LayerNorm

from lion_fast.model.aggregator import LionAggregatorOutput
from lion_fast.model.attention import are_last, attends_on_kernels, on_kernels
from lion_kernels import assemble_inputs, gated_gelu, residual_layer_norm, rms_norm


class Swapped:
    """Base of the classes made by `swapped_class`, which lets pickle and copy recreate them."""

    swapped: ClassVar[tuple[type, type]]

    def __reduce_ex__(self, protocol: Any) -> Any:
        _, _, *state = super().__reduce_ex__(protocol)
        kind, original = self.swapped
        return _new, (kind, *importable(original)), *state


@cache
def swapped_class(kind: type, original: type) -> type:
    """Return `original` with the methods of `kind` first, under its own name."""
    names = ("__module__", "__qualname__", "__doc__")
    namespace = {name: getattr(original, name) for name in names} | {"swapped": (kind, original)}
    return type(original.__name__, (Swapped, kind, original), namespace)


def importable(cls: type) -> tuple[type, ...]:
    """Return the importable classes from which `class_from` makes `cls` again: kinds, then the original."""
    if "swapped" not in cls.__dict__:
        return (cls,)
    kind, original = cls.__dict__["swapped"]
    return kind, *importable(original)


def class_from(*classes: type) -> Any:
    """Return the class whose `importable` classes these are."""
    *kinds, made = classes
    for kind in reversed(kinds):
        made = swapped_class(kind, made)
    return made


def _new(*classes: type) -> Any:
    made = class_from(*classes)
    return made.__new__(made)


class OnKernels:
    """A module that runs `kernel_forward` on the kernels and the replaced class's forward elsewhere."""

    operators: ClassVar[str]  # the functions of lion_kernels that it calls
    kernel_backend: str
    kernel_forward: Callable[..., Tensor]
    training: bool

    def is_supported(self, hidden_states: Tensor) -> bool:
        """Return whether the kernel computes the replaced class's formula for this input."""
        return True

    def forward(self, hidden_states: Tensor, *args: Any) -> Tensor:
        if on_kernels(self.kernel_backend, hidden_states.device) and self.is_supported(hidden_states):
            return self.kernel_forward(hidden_states, *args)
        return super().forward(hidden_states, *args)  # type: ignore[misc]


class RMSNormOnKernels(OnKernels):
    operators = "rms_norm"
    weight: nn.Parameter
    variance_epsilon: float

    def kernel_forward(self, hidden_states: Tensor) -> Tensor:
        return rms_norm(hidden_states, self.weight, self.variance_epsilon, backend=self.kernel_backend)


class DecoderRMSNormOnKernels(RMSNormOnKernels):
    def is_supported(self, hidden_states: Tensor) -> bool:
        # These families round to the input's dtype; T5 and the kernel round to the weight's.
        return hidden_states.dtype == self.weight.dtype


class GatedGeluOnKernels(OnKernels):
    """T5's gated feed-forward with the exact GELU, as LION uses it."""

    operators = "gated_gelu"
    wi_0: nn.Module
    wi_1: nn.Module
    dropout: nn.Module
    wo: Any

    def kernel_forward(self, hidden_states: Tensor) -> Tensor:
        gate, up = self.wi_0(hidden_states), self.wi_1(hidden_states)
        hidden_states = self.dropout(gated_gelu(gate, up, backend=self.kernel_backend))
        weight = self.wo.weight  # float32 in a float16 model, where it would overflow
        if isinstance(weight, Tensor) and weight.dtype != torch.int8:
            hidden_states = hidden_states.to(weight.dtype)
        return self.wo(hidden_states)


class ResidualLayerNorm(nn.LayerNorm):
    """LayerNorm(dropout(x) + residual) in one call."""

    kernel_backend: str

    def forward(self, input: Tensor, residual: Tensor | None = None, dropout_p: float = 0.0) -> Tensor:
        if residual is None:
            return super().forward(input)
        backend = self.kernel_backend
        return residual_layer_norm(
            input, residual, self.weight, self.bias, self.eps, dropout_p=dropout_p, backend=backend
        )


class ResidualOutputOnKernels(OnKernels):
    """LayerNorm(dropout(dense(x)) + residual), the end of each sublayer of BERT."""

    operators = "residual_layer_norm"
    dense: nn.Module
    dropout: nn.Dropout
    LayerNorm: nn.Module

    def kernel_forward(self, hidden_states: Tensor, residual: Tensor) -> Tensor:
        dropout_p = self.dropout.p if self.training else 0.0
        return self.LayerNorm(self.dense(hidden_states), residual, dropout_p)


class LionT5Attention(T5Attention):
    """T5's attention, passing the bias table to the kernels instead of the biases of all pairs.

    With a static cache, sdpa computes the decoder's self-attention, because the kernels need queries at the last
    positions.
    """

    operators = "relative_bias_attention, multi_scale_attention"
    kernel_backend: str

    def compute_bias(self, query_length: int, key_length: int, device: Any = None, past_seen_tokens: int = 0) -> Tensor:
        table = self.relative_attention_bias
        on_table = attends_on_kernels(self.config, device or table.weight.device)
        if not on_table or not are_last(past_seen_tokens, query_length, key_length):
            return super().compute_bias(query_length, key_length, device, past_seen_tokens)
        return table(torch.arange(self.relative_attention_num_buckets, device=device))

    def forward(
        self,
        hidden_states: Tensor,
        mask: Tensor | None = None,
        key_value_states: Tensor | None = None,
        position_bias: Tensor | None = None,
        past_key_values: Any = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        if key_value_states is not None and attends_on_kernels(self.config, hidden_states.device):
            position_bias = hidden_states.new_empty(0)  # transformers would make zeros [1, H, L, Lk]
        return super().forward(hidden_states, mask, key_value_states, position_bias, past_key_values, **kwargs)


class PrefixEmbedding(nn.Embedding):
    """The language model's embedding, which also prepends the visual prefix and inserts the soft prompt."""

    operators = "assemble_inputs"
    kernel_backend: str

    @property
    def assembles(self) -> bool:
        """Whether it can be called with a prefix: the operator would also train the padding row."""
        return self.padding_idx is None or not (torch.is_grad_enabled() and self.weight.requires_grad)

    def forward(
        self,
        input: Tensor,
        prefix: Tensor | None = None,
        soft_prompt: Tensor | None = None,
        soft_prompt_id: int | None = None,
    ) -> Tensor:
        if prefix is None or soft_prompt is None or soft_prompt_id is None:
            return super().forward(input)
        prefix, soft_prompt, input = (x.to(self.weight.device) for x in (prefix, soft_prompt, input))
        return assemble_inputs(prefix, input, self.weight, soft_prompt, soft_prompt_id, backend=self.kernel_backend)


ON_KERNELS: dict[type[nn.Module], Any] = {
    T5LayerNorm: RMSNormOnKernels,
    LlamaRMSNorm: DecoderRMSNormOnKernels,
    Qwen2RMSNorm: DecoderRMSNormOnKernels,
    Qwen3RMSNorm: DecoderRMSNormOnKernels,
    T5DenseGatedActDense: GatedGeluOnKernels,
    InstructBlipQFormerSelfOutput: ResidualOutputOnKernels,
    InstructBlipQFormerOutput: ResidualOutputOnKernels,
    LionAggregatorOutput: ResidualOutputOnKernels,
}


def run_on_kernels(model: PreTrainedModel, kernel_backend: str) -> None:
    """Change the modules of `model` in place to run lion_kernels where `kernel_backend` resolves to Triton.

    Unsupported modules are left to transformers: activations other than the exact GELU, and embeddings of a class
    other than `nn.Embedding`.
    """
    for module in model.modules():
        inexact = isinstance(module, T5DenseGatedActDense) and not isinstance(module.act, GELUActivation)
        if type(module) in ON_KERNELS and not inexact:
            become(swapped_class(ON_KERNELS[type(module)], type(module)), module, kernel_backend)
        if type(module) is T5Attention:
            become(LionT5Attention, module, kernel_backend)
        if isinstance(module, ResidualOutputOnKernels):
            become(ResidualLayerNorm, module.LayerNorm, kernel_backend)
    embedding = model.get_input_embeddings()
    if type(embedding) is nn.Embedding:
        become(PrefixEmbedding, embedding, kernel_backend)


def become(kind: Any, module: Any, kernel_backend: str) -> None:
    """Change the class of `module` to `kind`, and set its `kernel_backend`."""
    module.__class__ = kind
    module.kernel_backend = kernel_backend
