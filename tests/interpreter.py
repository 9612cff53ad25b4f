"""Patches that make Triton's interpreter several times as fast."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import import_module
from typing import Any

import pytest
import torch


def patch_the_language_once() -> None:
    """Patch `triton.language` once per kernel call, not again for each helper.

    Whenever a jitted function is called, the interpreter replaces all functions of the language by its own. This takes
    half of its time if kernels consist of helpers. The replacements for the kernel's call still apply in its helpers.
    """
    import triton.language as tl
    from triton.runtime import interpreter

    patch: Callable[[Any], Any] = interpreter._patch_lang
    languages: dict[int, list[Any]] = {}

    def patch_once(function: Any) -> Any:
        names = function.__globals__
        if id(names) not in languages:
            languages[id(names)] = [
                module for module in (tl, tl.core) if any(value is module for value in names.values())
            ]
        if any(tl.core.is_builtin(module.load) for module in languages[id(names)]):
            return patch(function)
        return interpreter._LangPatchScope()  # nothing to undo

    interpreter._patch_lang = patch_once


@contextmanager
def large_tiles() -> Iterator[None]:
    """Use attention's tiles for 16-bit values with every dtype.

    A tile of 16 rows, which suits fp32 on a GPU, takes the interpreter as long as one of 128.
    """

    def in_16_bits(sizes: Callable[..., dict[str, int]]) -> Callable[..., dict[str, int]]:
        def larger(*arguments: Any, **features: Any) -> dict[str, int]:
            return sizes(*(torch.float16 if isinstance(x, torch.dtype) else x for x in arguments), **features)

        return larger

    with pytest.MonkeyPatch.context() as patch:
        for module, sizes in (("attention.sizes", "default_sizes"), ("attention.bias", "bias_gradient_sizes")):
            kernels = import_module(f"lion_kernels.{module}")
            patch.setattr(kernels, sizes, in_16_bits(getattr(kernels, sizes)))
        yield
