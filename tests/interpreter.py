"""Triton's interpreter, in a fraction of its time."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import import_module
from typing import Any

import pytest
import torch


def patch_the_language_once() -> None:
    """Let a kernel's helpers find `triton.language` as the kernel has patched it.

    The interpreter goes through all names of the language, to put its own functions in their place, whenever a function
    is called that is jitted: half of its time where kernels are made of helpers. What the kernel's own call has put
    there is still there in its helpers.
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
        return interpreter._LangPatchScope()  # nothing to take back

    interpreter._patch_lang = patch_once


@contextmanager
def large_tiles() -> Iterator[None]:
    """Attention's tiles as they are for 16-bit values, whatever the dtype.

    The interpreter takes as long for a tile of 16 rows, which suits fp32 on a GPU, as for one of 128.
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
