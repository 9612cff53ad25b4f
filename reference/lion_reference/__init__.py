"""LION (CVPR 2024, arXiv 2311.11860) and its operators in plain PyTorch: the reference for everything else."""

from .assemble_inputs import assemble_inputs
from .configuration import AggregatorConfig, LIONConfig, QFormerConfig, T5Config, ViTConfig
from .gated_gelu import gated_gelu
from .generation import generate
from .lion import LION, LIONOutput
from .mixture_of_adapters import MixtureOfAdapters, mixture_of_adapters
from .mixture_of_lora_linear import mixture_of_lora_linear
from .multi_scale_attention import multi_scale_attention
from .relative_bias_attention import relative_bias_attention
from .residual_layer_norm import residual_layer_norm
from .rms_norm import rms_norm

__all__ = [
    "LION",
    "AggregatorConfig",
    "LIONConfig",
    "LIONOutput",
    "MixtureOfAdapters",
    "QFormerConfig",
    "T5Config",
    "ViTConfig",
    "assemble_inputs",
    "gated_gelu",
    "generate",
    "mixture_of_adapters",
    "mixture_of_lora_linear",
    "multi_scale_attention",
    "relative_bias_attention",
    "residual_layer_norm",
    "rms_norm",
]
