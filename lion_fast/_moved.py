"""Modules that have moved keep their old names until 0.2: importing one warns and gives the module at its new name."""

import importlib
import sys
import warnings
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import spec_from_loader
from types import ModuleType

MOVED = {
    "adapters": "model.adapters",
    "attention": "model.attention",
    "boxes": "io.boxes",
    "bulk": "inference.bulk",
    "checkpoints": "io.checkpoints",
    "configuration_ram": "tagging.configuration_ram",
    "conversion_ram": "conversion.ram",
    "expect": "model.validation",
    "folded_adapters": "model.folded_adapters",
    "generation": "model.generation",
    "image_features": "model.image_features",
    "images": "io.images",
    "loading": "inference.loading",
    "modeling_aggregator": "model.aggregator",
    "modeling_ram": "tagging.modeling_ram",
    "modeling_text": "model.text",
    "modeling_vision": "model.vision",
    "operators": "model.kernel_modules",
    "prompts": "model.prompts",
    "quantization": "model.quantization",
    "stages": "training.stages",
    "zero_shot_tagger": "tagging.zero_shot",
}


class _Finder(MetaPathFinder, Loader):
    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        old = fullname.removeprefix("lion_fast.").split(".", 1)
        if not fullname.startswith("lion_fast.") or old[0] not in MOVED:
            return None
        return spec_from_loader(fullname, self, origin=".".join(["lion_fast", MOVED[old[0]], *old[1:]]))

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        assert spec.origin is not None
        warnings.warn(f"{spec.name} has moved to {spec.origin}; the old name goes in 0.2", FutureWarning, stacklevel=2)
        module = importlib.import_module(spec.origin)
        spec.loader_state = module.__spec__
        return module

    def exec_module(self, module: ModuleType) -> None:
        """It ran when it was imported at its new name, whose specification it keeps."""
        assert module.__spec__ is not None
        module.__spec__ = module.__spec__.loader_state


def install() -> None:
    """Let old names be imported."""
    if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())  # first, or submodules are found in their package and run twice
