"""LION's operators as a library of their own; it needs torch and, for the Triton backend, triton."""

from lion_kernels.assemble_inputs import assemble_inputs
from lion_kernels.core.backend import BACKENDS, HAS_TRITON, interpreting, resolve_backend, values_on_host
from lion_kernels.gated_gelu import gated_gelu
from lion_kernels.mixture_of_adapters import mixture_of_adapters
from lion_kernels.mixture_of_lora_linear import mixture_of_lora_linear
from lion_kernels.multi_scale_attention import multi_scale_attention
from lion_kernels.relative_bias_attention import relative_bias_attention
from lion_kernels.residual_layer_norm import residual_layer_norm
from lion_kernels.rms_norm import rms_norm

__all__ = [
    "BACKENDS",
    "HAS_TRITON",
    "assemble_inputs",
    "gated_gelu",
    "interpreting",
    "mixture_of_adapters",
    "mixture_of_lora_linear",
    "multi_scale_attention",
    "relative_bias_attention",
    "residual_layer_norm",
    "resolve_backend",
    "rms_norm",
    "values_on_host",
]
