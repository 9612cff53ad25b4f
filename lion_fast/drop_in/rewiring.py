"""Modules of one instance given other classes, in place, and given back their own.

A module that is rewired gets a class of its own, made from the class that it had: it is still an instance of that, has
its name, and calls it for what the kernels do not compute. Parameters, buffers, submodules and their names stay, so an
optimizer keeps its state and a checkpoint fits. What a module had before is noted on the module itself, so a copy of a
rewired model can be restored, too.
"""

import inspect
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from typing import Any, ClassVar, NamedTuple

from torch import nn

_BEFORE = "_before_kernels"  # where a rewired module keeps what it had


class Swapped:
    """Base of the classes that `swapped_class` makes, for pickle and copy to make them again."""

    swapped: ClassVar[tuple[type, type]]

    def __reduce_ex__(self, protocol: Any) -> Any:
        _, _, *state = super().__reduce_ex__(protocol)
        return _new, self.swapped, *state


@cache
def swapped_class(kind: type, original: type) -> type:
    """`original` with the methods of `kind` before its own, under its own name."""
    names = ("__module__", "__qualname__", "__doc__")
    namespace = {name: getattr(original, name) for name in names} | {"swapped": (kind, original)}
    return type(original.__name__, (Swapped, kind, original), namespace)


def _findable(cls: type) -> tuple[type, ...]:
    """A class that a module may import, or of what `swapped_class` made it."""
    return cls.__dict__.get("swapped", (cls,))


def _new(kind: type, original: type) -> Any:
    made: Any = swapped_class(kind, original)
    return made.__new__(made)


@dataclass
class Before:
    """What a module had: its class, the attributes that changed, the names of those that were added.

    `given` is the class that it got, as pickle finds it.
    """

    cls: type
    given: tuple[type, ...]
    changed: dict[str, Any]
    added: set[str]


@contextmanager
def remembering(model: nn.Module) -> Iterator[None]:
    """Notes on each module of `model` what is changed within, for `restore`; an exception undoes it at once."""
    before = [(module, type(module), dict(module.__dict__)) for module in model.modules()]
    try:
        yield
    except BaseException:
        for module, cls, attributes in before:
            module.__class__ = cls
            module.__dict__.clear()
            module.__dict__.update(attributes)
        raise
    for module, cls, had in before:
        has = module.__dict__
        changed = {name: value for name, value in had.items() if name not in has or has[name] is not value}
        added = has.keys() - had.keys()
        if changed or added or type(module) is not cls:
            has[_BEFORE] = Before(cls, _findable(type(module)), changed, added)


def restore(model: nn.Module) -> None:
    """Give the modules of `model` what `remembering` noted; nothing happens to those without a note.

    Raises:
        RuntimeError: a module was given yet another class since.
    """
    noted = [(name, module) for name, module in model.named_modules() if _BEFORE in module.__dict__]
    for name, module in noted:
        given = module.__dict__[_BEFORE].given
        if _findable(type(module)) != given:
            raise RuntimeError(
                f"{name}: expected the class {given[-1].__name__} that apply_lion_kernels gave it, got "
                f"{type(module).__name__}; undo what changed it since, as FSDP does, and then this"
            )
    for _, module in noted:
        before = module.__dict__.pop(_BEFORE)
        module.__class__ = before.cls
        for name in before.added:
            module.__dict__.pop(name, None)
        module.__dict__.update(before.changed)


class RewiredModule(NamedTuple):
    """A module that runs on lion_kernels now, and the operators that it calls."""

    name: str
    class_name: str
    operators: str


class LeftModule(NamedTuple):
    """A module that computes as before, at least where `reason` says."""

    name: str
    class_name: str
    reason: str


@dataclass
class Rewiring:
    """What `apply_lion_kernels` did to a model. Printed, it tells; `undo` takes it back.

    Attributes:
        model: the instance itself.
        backend: "auto", "triton" or "torch".
        rewired, left: modules by their names in the model.
    """

    model: nn.Module
    backend: str
    rewired: list[RewiredModule] = field(default_factory=list)
    left: list[LeftModule] = field(default_factory=list)

    def undo(self) -> None:
        """Restore every module that was rewired; the model computes the same bits as before. Twice is once.

        Raises:
            RuntimeError: a module was given yet another class since.
        """
        restore(self.model)

    def __repr__(self) -> str:
        return str(self)

    def __str__(self) -> str:
        counts = f"{len(self.rewired)} modules rewired, {len(self.left)} left as they are or in part"
        lines = [f"apply_lion_kernels, backend {self.backend!r}: {counts}"]
        for title, modules in (("rewired", self.rewired), ("left", self.left)):
            # As many lines as there are kinds of places, not as there are layers.
            places = Counter((why, class_name, _pattern(name)) for name, class_name, why in modules)
            if places:
                lines.append(f"{title}:")
            lines += [
                f"  {count:4} {class_name:20} {pattern}\n       {why}"
                for (why, class_name, pattern), count in places.items()
            ]
        return "\n".join(lines)


def _pattern(name: str) -> str:
    return re.sub(r"(^|\.)\d+(?=\.|$)", r"\1*", name) or "the model"


class Rewirer:
    """Rewires modules of a model and keeps the list."""

    def __init__(self, model: nn.Module, backend: str):
        self.names = {module: name for name, module in model.named_modules()}
        self.result = Rewiring(model, backend)

    def rewire(self, module: Any, kind: Any) -> None:
        """Give `module` the forward of `kind`, one of the classes with `operators` and `kernel_backend`."""
        module.__class__ = swapped_class(kind, type(module))
        module.__dict__["kernel_backend"] = self.result.backend
        self.list_rewired(module, kind.operators)

    def list_rewired(self, module: nn.Module, operators: str) -> None:
        self.result.rewired.append(RewiredModule(self.names[module], type(module).__name__, operators))

    def leave(self, module: nn.Module, reason: str) -> None:
        self.result.left.append(LeftModule(self.names[module], type(module).__name__, reason))


def is_plain_linear(module: Any) -> bool:
    """Whether reading the parameters of `module` is the same as calling it: nothing hooks into the call."""
    return (
        type(module) is nn.Linear
        and "forward" not in module.__dict__
        and not module._forward_hooks
        and not module._forward_pre_hooks
    )


def has_own_forward(module: nn.Module) -> bool:
    """Whether the instance, not its class, has the forward, so another class would change nothing."""
    return "forward" in module.__dict__


def forward_takes(module: nn.Module, parameters: Iterable[str]) -> bool:
    """Whether the forward of the module's class has these parameters first, after self."""
    expected = list(parameters)
    return list(inspect.signature(type(module).forward).parameters)[1 : len(expected) + 1] == expected
