"""Keep the old names of moved modules until 0.2: importing one warns and returns the module under its new name."""

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
        warnings.warn(f"{spec.name} has moved to {spec.origin}; 0.2 removes the old name", FutureWarning, stacklevel=2)
        module = importlib.import_module(spec.origin)
        spec.loader_state = module.__spec__
        return module

    def exec_module(self, module: ModuleType) -> None:
        """Restore the module's own spec; its code ran when it was imported under its new name."""
        assert module.__spec__ is not None
        module.__spec__ = module.__spec__.loader_state


def install() -> None:
    """Make the old names importable."""
    if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())  # first: the package's own finder would run submodules twice
