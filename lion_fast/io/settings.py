"""Types and ranges of a configuration's settings, by name: the names mean the same in every part of the models."""

import math
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from transformers import AutoConfig, PreTrainedConfig
from transformers.activations import ACT2FN
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from lion_fast.io.checkpoints import CheckpointError, naming
from lion_fast.io.reading import shown
from lion_fast.io.untrusted import expect_data_only, expected_instead, items, local_folder, read_settings


class Range(NamedTuple):
    """Whole numbers, or finite numbers, from `low` to `high`."""

    low: float
    high: float
    whole: bool = True

    def accepts(self, value: Any) -> bool:
        return self.expected(value) is None

    def expected(self, value: Any) -> str | None:
        """Return what is expected instead of `value`, or None if it is in the range."""
        if isinstance(value, bool) or not isinstance(value, int if self.whole else int | float):
            return "a whole number" if self.whole else "a number"
        if not self.whole and not math.isfinite(value):
            return "a finite number"
        if value < self.low:
            return f"{self.low} or more"
        return f"at most {self.high}" if value > self.high else None


# Far above every published model, and low enough that building a model ends: a larger number is a mistake.
_LAYERS = Range(1, 1024)
_SIZE = Range(1, 2**20)
_ROWS = Range(1, 2**31 - 1)
_PIXELS = Range(1, 2**12)
_SHARE = Range(0, 1, whole=False)
_POSITIVE = Range(0, 1e9, whole=False)
_ID = Range(-1, 2**31 - 1)

RANGES: dict[str, Range] = {
    **dict.fromkeys(("num_hidden_layers", "num_layers", "num_decoder_layers"), _LAYERS),
    **dict.fromkeys(("image_size", "patch_size", "window_size"), _PIXELS),
    **dict.fromkeys(("vocab_size", "max_position_embeddings", "relative_attention_max_distance"), _ROWS),
    "num_query_tokens": Range(0, 2**20),  # none without a Q-Former
    "chunk_size_feed_forward": Range(0, 2**20),
    **dict.fromkeys(
        (
            "hidden_size",
            "intermediate_size",
            "num_attention_heads",
            "num_key_value_heads",
            "head_dim",
            "num_channels",
            "projection_size",
            "encoder_hidden_size",
            "cross_attention_frequency",
            "d_model",
            "d_kv",
            "d_ff",
            "num_heads",
            "relative_attention_num_buckets",
            "adapter_rank",
            "num_adapters",
            "num_tags",
            "label_size",
            "embed_dim",
            "num_labels",
        ),
        _SIZE,
    ),
    **dict.fromkeys(
        (
            "hidden_dropout_prob",
            "attention_probs_dropout_prob",
            "attention_dropout",
            "dropout_rate",
            "classifier_dropout",
            "drop_path_rate",
            "partial_rotary_factor",
        ),
        _SHARE,
    ),
    **dict.fromkeys(
        (
            "layer_norm_eps",
            "layer_norm_epsilon",
            "rms_norm_eps",
            "initializer_range",
            "initializer_factor",
            "rope_theta",
            "mlp_ratio",
            "factor",
        ),
        _POSITIVE,
    ),
}
_FLAGS = (
    "attention_bias",
    "mlp_bias",
    "is_decoder",
    "is_encoder_decoder",
    "is_gated_act",
    "qkv_bias",
    "tie_word_embeddings",
    "use_absolute_embeddings",
    "use_cache",
    "use_sliding_window",
    "scale_decoder_outputs",
    "output_attentions",
    "output_hidden_states",
    "return_dict",
)
_ACTIVATIONS = ("hidden_act", "dense_act_fn")
_IDS = ("pad_token_id", "bos_token_id", "eos_token_id", "decoder_start_token_id", "soft_prompt_token_id")
_TEXTS = ("feed_forward_proj", "soft_prompt_token", "model_type")
_OF_CLASSES = ("attribute_map", "extra_files", "sub_configs", "sub_configs_defaults")
_NESTED = ("rope_parameters", "rope_scaling")
_UNSUPPORTED = ("per_layer_config", "fusion_config")  # with which transformers makes or replaces layers
_MAX_LIST = 4096
# Settings that hold a list of numbers.
_LISTS: dict[str, Range] = {
    "feature_layers": Range(0, _LAYERS.high),
    "depths": _LAYERS,
    "num_heads": _SIZE,
    "out_indices": Range(-_LAYERS.high, _LAYERS.high),
}
_MAY_BE_NONE = ("num_adapters", "classifier_dropout", "num_key_value_heads", "head_dim", "num_decoder_layers", *_IDS)


def expect_settings(
    prefix: str, settings: Mapping[str, Any] | PreTrainedConfig, owner: type[PreTrainedConfig] = PreTrainedConfig
) -> None:
    """Check the settings of one part of a configuration whose type or range is known, before anything uses them.

    Args:
        prefix: of the keys in errors, such as `"text_config."`.
        settings: from a file, by their names, or a configuration.
        owner: class of the configuration, whose methods and constants a file cannot set.

    Raises:
        ValueError: a setting has the wrong type, is out of its range or hides a method.
    """
    from_file = isinstance(settings, Mapping)
    given = settings if from_file else vars(settings)
    for key, value in given.items():
        expected = _expected(key, value)
        if from_file and (key in _OF_CLASSES or _is_fixed(getattr(owner, str(key), None))):
            expected = "no setting of this name, which is the configuration class's own"
        if expected is not None:
            raise ValueError(f"{prefix}{key}: expected {expected}, got {shown(value)}")
        if key in _NESTED and isinstance(value, Mapping):
            expect_settings(f"{prefix}{key}.", value)


def _is_fixed(attribute: Any) -> bool:
    """Return whether a class's attribute is a method, or a property that cannot be set."""
    return callable(attribute) or (isinstance(attribute, property) and attribute.fset is None)


def _expected(key: str, value: Any) -> str | None:
    """Return what a setting should be instead of `value`, or None if it is right or not known here."""
    if key in _UNSUPPORTED and value is not None:
        return "none, because LION's layers do not support it"
    if value is None:
        required = (key in RANGES or key in _LISTS) and key not in _MAY_BE_NONE
        return "a number" if required else None
    if key in _LISTS and not (key in RANGES and isinstance(value, int | float | str)):
        listed = isinstance(value, list | tuple) and 0 < len(value) <= _MAX_LIST
        accepted = listed and all(map(_LISTS[key].accepts, value))
        return None if accepted else f"a list of whole numbers in {_LISTS[key].low}..{_LISTS[key].high}"
    if key in RANGES:
        return RANGES[key].expected(value)
    if key in _IDS:
        ids = value if key == "eos_token_id" and isinstance(value, list) else [value]
        return None if all(map(_ID.accepts, ids)) else "a token's id"
    if key in _FLAGS:
        return None if isinstance(value, bool) else "true or false"
    if key == "rope_type":
        known = ("default", *ROPE_INIT_FUNCTIONS)
        return None if value in known else f"one of {', '.join(known)}"
    if key == "id2label":
        labels = value.keys() if isinstance(value, Mapping) else [None]
        return None if all(str(label).isdecimal() for label in labels) else "an object with whole numbers as keys"
    if key in _TEXTS:
        return None if isinstance(value, str) else "text"
    if key in _ACTIVATIONS:
        return None if isinstance(value, str) and value in ACT2FN else "the name of an activation of transformers"
    return None


class CheckedSettings:
    """Loading of a configuration whose file is looked through first; the first base of a configuration class.

    `trust_remote_code` has no effect: a configuration that asks for code is refused.
    """

    def expect_valid(self: Any) -> None:
        """Check the types and ranges of all settings, also of those that were changed later.

        Raises:
            ValueError: a setting is out of its range, or has the wrong type.
        """
        expect_settings("", self)
        for name, part_class in self.sub_configs.items():
            part = getattr(self, name)
            expected = PreTrainedConfig if part_class is AutoConfig else part_class
            if not isinstance(part, expected):
                raise ValueError(f"{name}: expected a {expected.__name__}, got {shown(part)}")
            expect_settings(f"{name}.", part)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike, **kwargs: Any) -> Any:
        """Load as `PreTrainedConfig` does.

        Raises:
            CheckpointError: the file is not the configuration of such a model, or asks for code; the message names the
                file and its setting.
            OSError: there is no such directory, nor such a name on the Hub.
        """
        given = Path(pretrained_model_name_or_path)
        file = given if given.is_file() else None
        folder = local_folder(given.parent if file else pretrained_model_name_or_path, ("config.json",), kwargs)
        config_class: Any = cls
        part = config_class.base_config_key != ""  # may be read from the configuration of the whole model
        expect_data_only(folder, model_type=None if part else config_class.model_type)
        path = file or folder / "config.json"
        if not path.is_file():
            raise CheckpointError(f"{path}: no such file")
        read_settings(path)
        base: Any = super()
        with naming_settings(path):
            loaded = base.from_pretrained(file or folder, local_files_only=True, **kwargs)
        config = loaded[0] if isinstance(loaded, tuple) else loaded
        config._name_or_path = str(pretrained_model_name_or_path)
        return loaded

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """Create a configuration as `PreTrainedConfig` does.

        Raises:
            ValueError: a setting asks for code or for files elsewhere, or has the wrong type or range.
        """
        for key, value in items(config_dict):
            expected = expected_instead(key, value)
            if expected is not None:
                source = f"{kwargs['name_or_path']}: " if "name_or_path" in kwargs else ""
                raise ValueError(f"{source}{key}: expected {expected}, got {shown(value)}")
        base: Any = super()
        return base.from_dict(config_dict, **kwargs)


@contextmanager
def naming_settings(path: Path) -> Iterator[None]:
    """Put a file's name before an error about its settings, or say that it is no configuration."""
    with naming(path, "a configuration that can be loaded"):
        try:
            yield
        except ValueError as error:
            if isinstance(error, CheckpointError) or len(str(error)) > 400 or "\n" in str(error):
                raise
            raise CheckpointError(f"{path}: {error}") from error
