"""Triton's interpreter, in a fraction of its time."""

from collections.abc import Callable
from typing import Any


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
