"""Patches that make Triton's interpreter several times as fast."""

import functools
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


def describe_types_once() -> None:
    """Derive what depends only on a dtype or a shape once, not again for each intermediate result.

    Building the types of tensors takes the interpreter longer than computing their values. With these patches, equal
    shapes of blocks are one object.
    """
    import triton.language as tl
    from triton.runtime import interpreter

    make_block_type, make_tensor, numpy_dtype = tl.block_type.__init__, tl.tensor.__init__, interpreter._get_np_dtype
    numpy_dtype_of_numbers = functools.cache(numpy_dtype)
    block_types: dict[tuple[int, ...], dict[str, Any]] = {}
    sizes_of: dict[int, tuple[int, ...]] = {}  # by the id of a shape in `block_types`
    tensors: dict[int, tuple[Any, Any, Any]] = {}

    def numpy_dtype_once(dtype: Any) -> Any:
        dtype = dtype.element_ty if isinstance(dtype, tl.block_type) else dtype
        return numpy_dtype(dtype) if isinstance(dtype, tl.pointer_type) else numpy_dtype_of_numbers(dtype)

    def make_block_type_once(self: Any, element_ty: Any, shape: Any) -> None:
        sizes = sizes_of.get(id(shape)) or tuple(getattr(size, "value", size) for size in shape)
        if sizes not in block_types:
            make_block_type(self, element_ty, shape)
            block_types[sizes] = {"shape": self.shape, "numel": self.numel}
            sizes_of[id(self.shape)] = sizes
        self.element_ty, self.name = element_ty, f"<{sizes}, {element_ty}>"
        self.__dict__.update(block_types[sizes])

    def make_tensor_once(self: Any, handle: Any, type: Any) -> None:
        shape = type.shape if type.is_block() else None
        if id(shape) not in tensors:
            make_tensor(self, handle, type)
            tensors[id(shape)] = (shape, self.shape, self.numel)  # with the shape, so that its id stays its own
        self.handle, self.type, self.dtype = handle, type, type.scalar
        _, self.shape, self.numel = tensors[id(shape)]

    interpreter._get_np_dtype = numpy_dtype_once
    tl.block_type.__init__ = make_block_type_once
    tl.tensor.__init__ = make_tensor_once


def skip_needless_conversions() -> None:
    """Neither convert nor broadcast operands of one dtype and shape.

    Blocks of equal shapes are recognized by `describe_types_once`; without it, nothing is skipped.
    """
    import triton.language as tl
    from triton.language.semantic import TritonSemantic

    same_dtype, broadcast = tl.dtype.__eq__, TritonSemantic.broadcast_impl_value
    check_types = TritonSemantic.binary_op_type_checking_impl
    kept = (tl.int32, tl.int64, tl.float32, tl.float64)  # dtypes that operations keep if both operands have them

    def is_same_dtype(self: Any, other: Any) -> bool:
        return self is other or same_dtype(self, other)

    def have_same_shape(lhs: Any, rhs: Any) -> bool:
        return lhs.type.is_block() and rhs.type.is_block() and lhs.type.shape is rhs.type.shape

    def broadcast_if_needed(self: Any, lhs: Any, rhs: Any) -> tuple[Any, Any]:
        return (lhs, rhs) if have_same_shape(lhs, rhs) else broadcast(self, lhs, rhs)

    def check_types_if_needed(self: Any, lhs: Any, rhs: Any, *given: Any, **options: Any) -> tuple[Any, Any]:
        are_tensors = isinstance(lhs, tl.tensor) and isinstance(rhs, tl.tensor)
        if are_tensors and lhs.dtype is rhs.dtype and lhs.dtype in kept and have_same_shape(lhs, rhs):
            return lhs, rhs
        return check_types(self, lhs, rhs, *given, **options)

    tl.dtype.__eq__ = is_same_dtype
    TritonSemantic.broadcast_impl_value = broadcast_if_needed
    TritonSemantic.binary_op_type_checking_impl = check_types_if_needed


def skip_the_overflow_check() -> None:
    """Skip the check of integers for overflow, which takes several operations for each of a kernel's.

    The interpreter uses its result only in Triton's debug mode, which is off.
    """
    from triton.language.semantic import TritonSemantic

    TritonSemantic.binary_op_sanitize_overflow_impl = lambda self, lhs, rhs, operation: None


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
