"""LION as a library: load the published checkpoints, caption images, answer questions, locate objects, train."""

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForImageTextToText, AutoProcessor

from lion_fast import _moved
from lion_fast.configuration_lion import LionAggregatorConfig, LionConfig, LionVisionConfig
from lion_fast.drop_in import apply_lion_kernels
from lion_fast.inference.pipeline import LionAnswer, LionPipeline
from lion_fast.model.image_features import ImageFeatures
from lion_fast.modeling_lion import LionForCausalLM
from lion_fast.processing_lion import LionProcessor
from lion_fast.tagging.configuration_ram import RamConfig
from lion_fast.tagging.modeling_ram import RamTagger
from lion_fast.tagging.zero_shot import ZeroShotTagger

_moved.install()

AutoConfig.register("lion", LionConfig)
AutoConfig.register("lion_vision", LionVisionConfig)
AutoConfig.register("lion_aggregator", LionAggregatorConfig)
AutoConfig.register("lion_ram", RamConfig)
AutoModel.register(RamConfig, RamTagger)
AutoModel.register(LionConfig, LionForCausalLM)
AutoModelForCausalLM.register(LionConfig, LionForCausalLM)
AutoModelForImageTextToText.register(LionConfig, LionForCausalLM)
AutoProcessor.register(LionConfig, LionProcessor)

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
