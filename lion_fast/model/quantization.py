"""Loading in 8 or 4 bits by transformers' quantizers: which of LION's linear layers they are to leave as they are."""

from typing import Any

from transformers.quantizers.auto import AutoQuantizationConfig

KEPT_MODULES = (
    "qformer",
    "qformer_projection",
    "aggregator",
    "aggregator_projection",
    "language_model.lm_head",
)
"""Modules that stay in the model's dtype: what LION trains, and the head. Adapters are no `nn.Linear`, so none at all.

What is left are the frozen layers of the vision tower and the language model; of T5's, transformers keeps `wo`, too.
"""

# What the configurations call the modules to leave: bitsandbytes, and torchao, quanto, HQQ and the rest.
_SETTINGS = ("llm_int8_skip_modules", "modules_to_not_convert")


def keep_trained_modules(quantization_config: Any) -> Any:
    """The configuration with `KEPT_MODULES` to leave, unless it names modules to leave itself.

    Args:
        quantization_config: one of transformers' or its dict, as `from_pretrained` takes them.
    """
    if isinstance(quantization_config, dict):
        quantization_config = AutoQuantizationConfig.from_dict(quantization_config)
    for setting in _SETTINGS:
        if hasattr(quantization_config, setting) and getattr(quantization_config, setting) is None:
            setattr(quantization_config, setting, list(KEPT_MODULES))
    return quantization_config
