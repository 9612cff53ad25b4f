"""Imports on first use, so that commands answer without torch, and the registration with transformers."""

import importlib
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from pkgutil import iter_modules
from types import ModuleType
from typing import Any


def exports(
    package: str, names_by_module: Mapping[str, Sequence[str]]
) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """Return `__getattr__` and `__dir__` of a package whose names are imported on first use.

    Submodules, too, are attributes of the package before they are imported.

    Args:
        package: name of the package.
        names_by_module: module, relative to the package -> names that the package exports from it.
    """
    modules = {name: f"{package}.{module}" for module, names in names_by_module.items() for name in names}

    def get(name: str) -> Any:
        if name in modules:
            if package == "lion_fast":
                importlib.import_module("transformers")  # first, so that all classes register
            found = getattr(importlib.import_module(modules[name]), name)
            setattr(sys.modules[package], name, found)
            return found
        if any(module.name == name for module in iter_modules(sys.modules[package].__path__)):
            return importlib.import_module(f"{package}.{name}")
        raise AttributeError(f"module {package!r} has no attribute {name!r}")

    def names() -> list[str]:
        return sorted({*vars(sys.modules[package]), *modules})

    return get, names


def register_with_transformers(*modules: str) -> None:
    """Import these modules of lion_fast, which register their classes with transformers, as soon as it is imported."""
    names = [f"lion_fast.{module}" for module in modules]
    if "transformers" in sys.modules:
        _import_unless_importing(names)
    elif not any(isinstance(finder, _AfterTransformers) for finder in sys.meta_path):
        sys.meta_path.insert(0, _AfterTransformers(names))


def _import_unless_importing(names: Sequence[str]) -> None:
    """Import modules, unless a module of lion_fast is being imported: it imports what it registers itself."""
    frames = (frame for frame, _ in traceback.walk_stack(None) if frame.f_code.co_name == "<module>")
    if not any(frame.f_globals.get("__name__", "").startswith("lion_fast.") for frame in frames):
        for name in names:
            importlib.import_module(name)


class _AfterTransformers(MetaPathFinder, Loader):
    """Finds transformers as Python would, once, and imports modules after it."""

    def __init__(self, names: Sequence[str]):
        self.names = names
        self.loader: Loader | None = None

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != "transformers" or self not in sys.meta_path:
            return None
        sys.meta_path.remove(self)
        spec = PathFinder.find_spec(fullname, path, target)
        if spec is not None and spec.loader is not None:
            self.loader, spec.loader = spec.loader, self
        return spec

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        assert self.loader is not None
        return self.loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        assert self.loader is not None
        assert module.__spec__ is not None
        module.__spec__.loader = module.__loader__ = self.loader
        self.loader.exec_module(module)
        _import_unless_importing(self.names)
