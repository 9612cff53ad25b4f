"""The files of a saved `LionProcessor`, checked before transformers reads them."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer, BlipImageProcessorPil, PreTrainedTokenizerBase

from lion_fast.io.checkpoints import CheckpointError, naming
from lion_fast.io.reading import shown
from lion_fast.io.untrusted import expect_data_only, read_json

QFORMER_TOKENIZER = "qformer_tokenizer"
# Without any of these files, a tokenizer silently gets an empty vocabulary.
_VOCABULARY_FILES = ("tokenizer.json", "spiece.model", "tokenizer.model", "vocab.json", "vocab.txt")

_CLASSES = {
    "processor_class": ("LionProcessor",),
    # Other image processors would give other pixels than the model was trained with.
    "image_processor_type": ("BlipImageProcessor", "BlipImageProcessorFast", "BlipImageProcessorPil"),
    "feature_extractor_type": ("BlipFeatureExtractor",),
    "video_processor_type": (),
}
_MAX_SIDE = 4096  # pixels
_MAX_TOKENS = 1 << 20


def _is_whole(low: int, high: int) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, int) and not isinstance(value, bool) and low <= value <= high


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e6


def _is_flag(value: Any) -> bool:
    return isinstance(value, bool)


def _is_side(value: Any) -> bool:
    sides = value.values() if isinstance(value, dict) and value.keys() == {"height", "width"} else [None]
    return all(map(_is_whole(1, _MAX_SIDE), sides))


def _is_per_channel(positive: bool) -> Callable[[Any], bool]:
    def accepts(value: Any) -> bool:
        values = value if isinstance(value, list) else [value] * 3
        return len(values) == 3 and all(_is_number(item) and (item > 0 or not positive) for item in values)

    return accepts


_PROCESSOR: dict[str, tuple[Callable[[Any], bool], str]] = {
    "is_encoder_decoder": (_is_flag, "true or false"),
    "max_txt_len": (_is_whole(1, _MAX_TOKENS), f"a whole number in 1..{_MAX_TOKENS}"),
    "max_target_len": (_is_whole(1, _MAX_TOKENS), f"a whole number in 1..{_MAX_TOKENS}"),
    "soft_prompt_token": (lambda value: value is None or (isinstance(value, str) and value != ""), "text or null"),
    "image_processor": (lambda value: isinstance(value, dict), "a JSON object"),
}
_IMAGE_PROCESSOR: dict[str, tuple[Callable[[Any], bool], str]] = {
    **dict.fromkeys(
        ("do_convert_rgb", "do_normalize", "do_rescale", "do_resize", "do_center_crop", "do_pad"),
        (_is_flag, "true or false"),
    ),
    **dict.fromkeys(
        ("size", "crop_size", "pad_size"), (_is_side, f"height and width, whole numbers in 1..{_MAX_SIDE}")
    ),
    "data_format": (lambda value: value == "channels_first", "'channels_first'"),
    "image_mean": (_is_per_channel(False), "three numbers"),
    "image_std": (_is_per_channel(True), "three positive numbers"),
    "rescale_factor": (_is_number, "a number"),
    "resample": (_is_whole(0, 5), "one of Pillow's filters, 0..5"),
}


def expect_processor_files(folder: Path) -> None:
    """Refuse a directory that does not hold the data of a `LionProcessor`.

    Raises:
        CheckpointError: a file is missing, asks for code, or has a setting of the wrong type or range; the message
            names the file and its setting.
    """
    processor, image_processor = folder / "processor_config.json", folder / "preprocessor_config.json"
    if not processor.exists():
        raise CheckpointError(f"{folder}: not a directory with LION's processor (no {processor.name})")
    expect_data_only(folder, classes=_CLASSES)
    tokenizer = folder / QFORMER_TOKENIZER
    if not tokenizer.is_dir():
        raise CheckpointError(f"{tokenizer}: expected the directory of the Q-Former's tokenizer, found none")
    expect_data_only(tokenizer, classes=_CLASSES)
    settings = read_json(processor)
    _expect_settings(processor, "", settings, _PROCESSOR)
    if "image_processor" in settings:
        _expect_settings(processor, "image_processor.", settings["image_processor"], _IMAGE_PROCESSOR)
    elif image_processor.is_file():  # older versions of transformers wrote it
        _expect_settings(image_processor, "", read_json(image_processor), _IMAGE_PROCESSOR)
    else:
        raise CheckpointError(f"{processor}: expected a key 'image_processor', got {shown(sorted(settings))}")


def expect_replacements(given: Mapping[str, Any]) -> None:
    """Check the arguments of `from_pretrained` that replace settings of a saved processor.

    Raises:
        ValueError: a setting has the wrong type or range.
    """
    for name, (accepts, expected) in {**_IMAGE_PROCESSOR, **_PROCESSOR}.items():
        if name in given and name != "image_processor" and not accepts(given[name]):
            raise ValueError(f"{name}: expected {expected}, got {shown(given[name])}")


def _expect_settings(
    file: Path, prefix: str, settings: dict[str, Any], known: dict[str, tuple[Callable[[Any], bool], str]]
) -> None:
    for key, value in settings.items():
        if known is _IMAGE_PROCESSOR and callable(getattr(BlipImageProcessorPil, key, None)):
            raise CheckpointError(
                f"{file}: {prefix}{key}: expected no setting of this name, which is the class's own, got {shown(value)}"
            )
    for key, (accepts, expected) in known.items():
        # A setting that is null has its default value.
        if key in settings and not (accepts(settings[key]) or (settings[key] is None and prefix)):
            raise CheckpointError(f"{file}: {prefix}{key}: expected {expected}, got {shown(settings[key])}")


def load_tokenizer(directory: Path) -> PreTrainedTokenizerBase:
    """Load a tokenizer from the local files of `directory`, which run no code.

    Raises:
        CheckpointError: there is no vocabulary, a file asks for code, or one is damaged; the message names it.
    """
    expect_data_only(directory)
    if not any((directory / name).is_file() for name in _VOCABULARY_FILES):
        raise CheckpointError(f"{directory}: expected a tokenizer's {', '.join(_VOCABULARY_FILES)}, found none of them")
    with naming(directory, "a readable tokenizer"):
        return AutoTokenizer.from_pretrained(directory, trust_remote_code=False, local_files_only=True)
