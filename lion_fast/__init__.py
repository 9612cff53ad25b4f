"""LION as a library: load the published checkpoints, caption images, answer questions, locate objects, train.

Importing this package imports neither torch nor transformers: a name brings its module when it is first used. LION's
classes register with transformers' Auto classes as soon as both packages are imported, in either order.
"""

from typing import TYPE_CHECKING

from lion_fast import _lazy, _moved

if TYPE_CHECKING:
    from lion_fast.configuration_lion import LionAggregatorConfig, LionConfig, LionVisionConfig
    from lion_fast.drop_in import apply_lion_kernels
    from lion_fast.inference.pipeline import LionAnswer, LionPipeline
    from lion_fast.model.image_features import ImageFeatures
    from lion_fast.modeling_lion import LionForCausalLM
    from lion_fast.processing_lion import LionProcessor
    from lion_fast.tagging.configuration_ram import RamConfig
    from lion_fast.tagging.modeling_ram import RamTagger
    from lion_fast.tagging.zero_shot import ZeroShotTagger

__all__ = [
    "ImageFeatures",
    "LionAggregatorConfig",
    "LionAnswer",
    "LionConfig",
    "LionForCausalLM",
    "LionPipeline",
    "LionProcessor",
    "LionVisionConfig",
    "RamConfig",
    "RamTagger",
    "ZeroShotTagger",
    "apply_lion_kernels",
]

__getattr__, __dir__ = _lazy.exports(
    __name__,
    {
        "configuration_lion": ("LionAggregatorConfig", "LionConfig", "LionVisionConfig"),
        "drop_in": ("apply_lion_kernels",),
        "inference.pipeline": ("LionAnswer", "LionPipeline"),
        "model.image_features": ("ImageFeatures",),
        "modeling_lion": ("LionForCausalLM",),
        "processing_lion": ("LionProcessor",),
        "tagging.configuration_ram": ("RamConfig",),
        "tagging.modeling_ram": ("RamTagger",),
        "tagging.zero_shot": ("ZeroShotTagger",),
    },
)

_moved.install()
_lazy.register_with_transformers("modeling_lion", "processing_lion", "tagging.modeling_ram")
