"""What an argument of an operator may be, and the words of the errors for everything else.

A value of another type raises TypeError, an unsupported value ValueError; the message is "NAME: expected X, got Y" in
one line. Shapes are checked by the operators, which know them.
"""

import math
from numbers import Integral, Real
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.masked import MaskedTensor
from torch.nn import Parameter
from torch.nn.parameter import UninitializedTensorMixin  # type: ignore[attr-defined]

FLOATING = (torch.bfloat16, torch.float16, torch.float32, torch.float64)  # "floating" in docstrings and errors
INTEGERS = (torch.int64, torch.int32, torch.uint8, torch.int16, torch.int8)
_PLAIN = (Tensor, Parameter)
_STRIDED = torch.strided
_LARGEST = torch.finfo(torch.float32).max  # the kernels take numbers in fp32
_SYMBOLIC = (torch.SymInt, torch.SymFloat)  # numbers that a compiled graph has for any value
_SHOWN, _SHOWN_IDS = 80, 10  # characters of a string, ids of a tensor


def check_tensors(tensors: dict[str, Any], optional: dict[str, Any] | None = None) -> None:
    """Raise TypeError or ValueError for a value that is no dense tensor.

    Args:
        tensors: by argument.
        optional: likewise; those may be None.
    """
    for name, x in tensors.items():
        if type(x) not in _PLAIN or x.layout is not _STRIDED or x.is_nested:
            _check_unusual(name, x, "a torch.Tensor", tensors)
    if optional is None:
        return
    for name, x in optional.items():
        if x is not None and (type(x) not in _PLAIN or x.layout is not _STRIDED or x.is_nested):
            _check_unusual(name, x, "a torch.Tensor or None", tensors)
    if type(next(iter(tensors.values()))) not in _PLAIN:
        _check_unusual(*next(iter(tensors.items())), "a torch.Tensor", optional)


def _check_unusual(name: str, x: Any, expected: str, others: dict[str, Any]) -> None:
    """Raise an error unless `x` is an instance of a subclass of Tensor that operators support beside `others`."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{name}: expected {expected}, got {shown(x)}")
    if isinstance(x, UninitializedTensorMixin):
        raise ValueError(f"{name}: expected initialized values, got {type(x).__name__}")
    if x.layout is not _STRIDED or x.is_nested or isinstance(x, MaskedTensor):
        layout = "a nested tensor" if x.is_nested else type(x).__name__ if x.layout is _STRIDED else x.layout
        raise ValueError(f"{name}: expected a dense tensor (torch.strided), got {layout}")
    if isinstance(x, FakeTensor) and not x.fake_mode.allow_non_fake_inputs:
        for other, y in others.items():
            if isinstance(y, Tensor) and not isinstance(y, FakeTensor):
                raise TypeError(f"{other}: expected a FakeTensor (as {name}), got {type(y).__name__}")


def check_sequence(name: str, values: Any) -> None:
    """Raise TypeError for a value that is no list or tuple."""
    if not isinstance(values, list | tuple):
        raise TypeError(f"{name}: expected a list or tuple of tensors, got {shown(values)}")


def check_floating(name: str, x: Tensor) -> None:
    """Raise ValueError for a dtype that is not in `FLOATING`, such as an integer's or eight bits."""
    if x.dtype not in FLOATING:
        raise ValueError(f"{name}: expected a floating dtype, got {x.dtype}")


def check_flag(name: str, value: Any) -> None:
    """Raise TypeError for a value that is no bool."""
    if type(value) is not bool:
        raise TypeError(f"{name}: expected True or False, got {shown(value)}")


def check_choice(name: str, value: Any, choices: tuple[str, ...], expected: str) -> None:
    """Raise TypeError for a value that is no string, ValueError for one that is not in `choices`."""
    if type(value) is str and value in choices:
        return
    if not isinstance(value, str):
        raise TypeError(f"{name}: expected {expected}, got {shown(value)}")
    if value not in choices:
        raise ValueError(f"{name}: expected {expected}, got {shown(value)}")


def as_number(name: str, value: Any, expected: str = "a finite number") -> float:
    """Return a finite number as a float.

    Raises:
        TypeError: the value is no number; a bool and a tensor are none.
        ValueError: it is not a number, or infinite in fp32.
    """
    if type(value) is float:
        number = value
    elif isinstance(value, _SYMBOLIC):
        return value  # type: ignore[return-value]
    elif isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{name}: expected {expected}, got {shown(value)}")
    else:
        try:
            number = float(value)
        except OverflowError:
            number = math.inf
    if not -_LARGEST <= number <= _LARGEST:
        raise ValueError(f"{name}: expected {expected}, got {shown(value)}")
    return number


def as_positive(name: str, value: Any) -> float:
    """Return a positive, finite number as a float, with the errors of `as_number`."""
    if type(value) is float and 0.0 < value <= _LARGEST:
        return value
    number = as_number(name, value, "a positive, finite number")
    if not number > 0:
        raise ValueError(f"{name}: expected a positive, finite number, got {shown(value)}")
    return number


def as_int64(name: str, value: Any, expected: str = "an int64") -> int:
    """Return an integer as an int.

    Raises:
        TypeError: the value is no integer; a bool and a tensor are none.
        ValueError: it does not fit 64 bits.
    """
    if type(value) is not int:
        if isinstance(value, torch.SymInt):
            return value  # type: ignore[return-value]
        if isinstance(value, bool) or not isinstance(value, Integral):
            raise TypeError(f"{name}: expected {expected}, got {shown(value)}")
        value = int(value)
    if not -(2**63) <= value < 2**63:
        raise ValueError(f"{name}: expected {expected}, got {shown(value)}")
    return value


def shown(value: Any) -> str:
    """Return a value for an error: a number or a short string itself, anything else by its type."""
    if type(value) is str:
        return repr(value) if len(value) <= _SHOWN else f"{value[:_SHOWN]!r}..."
    if type(value) is int and value.bit_length() > 128:
        return f"an integer of {value.bit_length()} bits"
    return repr(value) if value is None or type(value) in (bool, int, float) else type(value).__name__


def shown_ids(ids: Tensor) -> str:
    """Return the different values of `ids`, in order, for an error."""
    found = ids.unique()
    rest = f" and {len(found) - _SHOWN_IDS} more" if len(found) > _SHOWN_IDS else ""
    return f"{found[:_SHOWN_IDS].tolist()}{rest}"
