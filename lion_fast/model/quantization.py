"""Loading in 8 or 4 bits with transformers' quantizers: which of LION's linear layers they must not quantize."""

from typing import Any

from transformers.quantizers.auto import AutoQuantizationConfig
from transformers.utils.quantization_config import QuantizationConfigMixin

from lion_fast.io.reading import brief, shown

KEPT_MODULES = (
    "qformer",
    "qformer_projection",
    "aggregator",
    "aggregator_projection",
    "language_model.lm_head",
)
"""Modules that stay in the model's dtype: what LION trains, and the head. Adapters are not `nn.Linear`, so no quantizer
replaces them.

The frozen layers of the vision tower and the language model are quantized, except T5's `wo`, which transformers keeps.
"""

# Name of the setting in bitsandbytes, and in torchao, quanto, HQQ and the others.
_SETTINGS = ("llm_int8_skip_modules", "modules_to_not_convert")


def keep_trained_modules(quantization_config: Any) -> Any:
    """Return the configuration with `KEPT_MODULES` excluded, unless it excludes modules itself.

    Args:
        quantization_config: configuration of transformers or its dict, as for `from_pretrained`.

    Raises:
        ValueError: it is neither.
    """
    if isinstance(quantization_config, dict):
        try:
            quantization_config = AutoQuantizationConfig.from_dict(quantization_config)
        except (ValueError, TypeError) as error:
            raise ValueError(
                "quantization_config: expected the settings of a quantizer of transformers, got "
                f"{shown(quantization_config)} ({brief(error)})"
            ) from error
    if not isinstance(quantization_config, QuantizationConfigMixin):
        raise ValueError(
            "quantization_config: expected a configuration of transformers or its dict, got "
            f"{shown(quantization_config)}"
        )
    for setting in _SETTINGS:
        if hasattr(quantization_config, setting) and getattr(quantization_config, setting) is None:
            setattr(quantization_config, setting, list(KEPT_MODULES))
    return quantization_config
