"""LION's operators, usable on their own: they need torch and, for the Triton backend, triton."""

from lion_kernels.backend import BACKENDS, resolve_backend
from lion_kernels.mixture_of_adapters import mixture_of_adapters
from lion_kernels.mixture_of_lora_linear import mixture_of_lora_linear

__all__ = ["BACKENDS", "mixture_of_adapters", "mixture_of_lora_linear", "resolve_backend"]
