"""In-place replacement of the classes of an instance's modules, and its reversal.

A rewired module gets a new class derived from its previous one: it is still an instance of it, has its name, and calls
it for what the kernels do not compute. Parameters, buffers, submodules and their names stay, so an optimizer keeps its
state and checkpoints fit. The previous state is stored on the module itself, so that a copy of a rewired model can be
restored, too.
"""

import inspect
import re
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from torch import nn

from lion_fast.model.kernel_modules import become, class_from, importable, swapped_class

_BEFORE = "_before_kernels"  # attribute that holds the previous state


@dataclass
class Before:
    """The previous state of a module: its class, the attributes that changed, the names of those that were added.

    `previous` and `given`, its new class, are stored as `importable` classes, so that pickle finds them.
    """

    previous: tuple[type, ...]
    given: tuple[type, ...]
    changed: dict[str, Any]
    added: set[str]


@contextmanager
def remembering(model: nn.Module) -> Iterator[None]:
    """Record the changes to each module of `model` within the context, for `restore`; an exception undoes them."""
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
            has[_BEFORE] = Before(importable(cls), importable(type(module)), changed, added)


def restore(model: nn.Module) -> None:
    """Restore the state of the modules of `model` recorded by `remembering`; others are unchanged.

    Raises:
        RuntimeError: the class of a module has changed again since.
    """
    noted = [(name, module) for name, module in model.named_modules() if _BEFORE in module.__dict__]
    for name, module in noted:
        given = module.__dict__[_BEFORE].given
        if importable(type(module)) != given:
            raise RuntimeError(
                f"{name}: expected the class {given[-1].__name__} that apply_lion_kernels gave it, got "
                f"{type(module).__name__}; undo what changed it since, as FSDP does, and then this"
            )
    for _, module in noted:
        before = module.__dict__.pop(_BEFORE)
        module.__class__ = class_from(*before.previous)
        for name in before.added:
            module.__dict__.pop(name, None)
        module.__dict__.update(before.changed)


class RewiredModule(NamedTuple):
    """A module that now runs on lion_kernels, and its operators."""

    name: str
    class_name: str
    operators: str


class LeftModule(NamedTuple):
    """A module that computes as before, at least in the way that `reason` states."""

    name: str
    class_name: str
    reason: str


@dataclass
class Rewiring:
    """The changes of `apply_lion_kernels` to a model. Print it to list them; `undo` reverts them.

    Attributes:
        model: the instance itself.
        backend: "auto", "triton" or "torch".
        rewired, left: modules, with their names in the model.
    """

    model: nn.Module
    backend: str
    rewired: list[RewiredModule] = field(default_factory=list)
    left: list[LeftModule] = field(default_factory=list)

    def undo(self) -> None:
        """Restore every rewired module; the model computes the same bits as before. A second call has no effect.

        Raises:
            RuntimeError: the class of a module has changed again since.
        """
        restore(self.model)

    def __str__(self) -> str:
        counts = f"{len(self.rewired)} modules rewired, {len(self.left)} left as they are or in part"
        lines = [f"apply_lion_kernels, backend {self.backend!r}: {counts}"]
        for title, modules in (("rewired", self.rewired), ("left", self.left)):
            # One line per kind of module, not per layer.
            places = Counter((why, class_name, _pattern(name)) for name, class_name, why in modules)
            if places:
                lines.append(f"{title}:")
            lines += [
                f"  {count:4} {class_name:20} {pattern}\n       {why}"
                for (why, class_name, pattern), count in places.items()
            ]
        return "\n".join(lines)

    __repr__ = __str__


def _pattern(name: str) -> str:
    return re.sub(r"(^|\.)\d+(?=\.|$)", r"\1*", name) or "the model"


class Rewirer:
    """Rewires modules of a model and records them."""

    def __init__(self, model: nn.Module, backend: str):
        self.names = {module: name for name, module in model.named_modules()}
        self.result = Rewiring(model, backend)

    def rewire(self, module: Any, kind: Any) -> None:
        """Give `module` the forward of `kind`, one of the classes with `operators` and `kernel_backend`."""
        become(swapped_class(kind, type(module)), module, self.result.backend)
        self.list_rewired(module, kind.operators)

    def list_rewired(self, module: nn.Module, operators: str) -> None:
        self.result.rewired.append(RewiredModule(self.names[module], type(module).__name__, operators))

    def leave(self, module: nn.Module, reason: str) -> None:
        self.result.left.append(LeftModule(self.names[module], type(module).__name__, reason))


def is_plain_linear(module: Any) -> bool:
    """Return whether calling `module` only applies its parameters, without hooks."""
    return (
        type(module) is nn.Linear
        and not has_own_forward(module)
        and not module._forward_hooks
        and not module._forward_pre_hooks
    )


def has_own_forward(module: nn.Module) -> bool:
    """Return whether the instance, not its class, has the forward, so that another class would have no effect."""
    return "forward" in module.__dict__


def forward_takes(module: nn.Module, expected: list[str]) -> bool:
    """Return whether the forward of the module's class starts with these parameters, after self."""
    return _parameters(type(module))[: len(expected)] == expected


def calls_like(module: nn.Module, kind: Any) -> bool:
    """Return whether the forward of the module's class starts with the parameters of that of `kind`."""
    return forward_takes(module, _parameters(kind))


def _parameters(cls: Any) -> list[str]:
    return list(inspect.signature(cls.forward).parameters)[1:]
