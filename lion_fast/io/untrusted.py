"""What a folder of settings, tokenizers or weights may hold: data alone, which is never run.

transformers runs code that a folder's files ask for: a class in `auto_map`, a `custom_generate`, a kernel of the Hub as
`attn_implementation`. Some keys make it open other files, or other repositories. Every loading of this library looks
through the folder here first, so such a folder is refused by file and key before transformers sees it. Where
transformers reads files itself, it gets `trust_remote_code=False` besides, so that it asks nobody.
"""

import json
import os
import stat
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub import snapshot_download
from huggingface_hub.utils import HFValidationError
from transformers import CONFIG_MAPPING, PreTrainedTokenizerBase
from transformers.models.auto.tokenization_auto import tokenizer_class_from_name

from lion_fast.io.checkpoints import CheckpointError, naming
from lion_fast.io.reading import brief, shown

MODEL_FILES = ("config.json", "generation_config.json", "model*.safetensors", "model*.safetensors.index.json")
PROCESSOR_FILES = ("*.json", "*.jinja", "*.txt", "*.model")
TAGGER_FILES = (*MODEL_FILES, "tag_list.txt", "tag_thresholds.txt")

# Files whose keys transformers interprets; in the others (vocabularies), keys are tokens.
_SETTINGS_FILES = (
    "config.json",
    "generation_config.json",
    "processor_config.json",
    "preprocessor_config.json",
    "image_processor_config.json",
    "video_preprocessor_config.json",
    "feature_extractor_config.json",
    "tokenizer_config.json",
    "chat_template.json",
    "audio_tokenizer_config.json",
    "quantization_config.json",
    "quantize_config.json",
)
_READ_WHOLE = (".json", ".jinja", ".txt", ".model")  # into memory, so their size is limited
_WEIGHTS = (".safetensors", ".bin")
_MAX_SETTINGS_BYTES = 16 << 20  # the largest published tokenizer_config.json has under 2 MB
_MAX_VOCABULARY_BYTES = 128 << 20  # the largest published tokenizer.json has under 40 MB

_CODE = ("auto_map", "trust_remote_code", "code_revision")
# Each makes transformers read another file or repository than the one that was asked for.
_ELSEWHERE = (
    "audio_tokenizer",
    "configuration_files",
    "extra_config_files",
    "extra_files",
    "fast_tokenizer_files",
    "kernel_config",
    "transformers_weights",
    "use_kernels",
)
_IMPLEMENTATIONS = ("eager", "sdpa", "lion_kernels")  # others may be downloaded from the Hub
_CLASSES = ("image_processor_type", "feature_extractor_type", "video_processor_type", "processor_class")
# Quantizers that run on an installed package alone; others download kernels.
_QUANTIZERS = ("bitsandbytes", "bitsandbytes_4bit", "bitsandbytes_8bit", "hqq", "quanto", "torchao")

_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)  # models compute in no other
_OWN_TYPES = ("lion", "lion_ram")  # transformers knows them once their classes are imported

_HUB_OPTIONS = ("cache_dir", "force_download", "local_files_only", "revision", "token")


def local_folder(
    name_or_path: str | os.PathLike, files: Collection[str], options: dict[str, Any], *, download: bool = True
) -> Path:
    """Return the local folder that `from_pretrained` should read, after downloading `files` of a name on the Hub.

    Args:
        name_or_path: a directory, or a name on the Hub.
        files: patterns of the files to download.
        options: arguments of `from_pretrained`; those that say where files come from are removed.
        download: whether a name that is no directory may be downloaded.

    Raises:
        NotADirectoryError: `name_or_path` is no directory, and is no name on the Hub or may not be downloaded.
        OSError: the download failed.
    """
    subfolder = str(options.pop("subfolder", "") or "")
    hub = {name: options.pop(name) for name in _HUB_OPTIONS if name in options}
    for name in ("proxies", "trust_remote_code"):  # no folder that asks for code is loaded, whatever is passed
        options.pop(name, None)
    if not isinstance(name_or_path, str | os.PathLike):
        got = type(name_or_path).__name__
        raise TypeError(f"pretrained_model_name_or_path: expected a directory or a name on the Hub, got {got}")
    folder = Path(name_or_path)
    if not folder.is_dir():
        if folder.exists() or not download or str(name_or_path).startswith((".", "/", "~")):
            hint = "" if download else "; to download a name on the Hub, pass download=True"
            raise NotADirectoryError(f"{name_or_path}: no such directory{hint}")
        patterns = [f"{subfolder}/{pattern}" if subfolder else pattern for pattern in files]
        try:
            folder = Path(snapshot_download(str(name_or_path), allow_patterns=patterns, **hub))
        except HFValidationError as error:
            raise NotADirectoryError(f"{name_or_path}: no such directory, and no name on the Hub") from error
        except Exception as error:  # hub's errors are of many types, and of many lines
            raise OSError(
                f"{name_or_path}: no such directory, and not downloaded from the Hub ({brief(error)})"
            ) from error
    folder = folder / subfolder
    if not folder.is_dir():
        raise NotADirectoryError(f"{folder}: no such directory")
    return folder


def expect_data_only(
    folder: Path, *, model_type: str | None = None, classes: Mapping[str, Collection[str]] | None = None
) -> None:
    """Refuse a folder whose files ask for code, or for files elsewhere, or that cannot be read.

    Args:
        folder: directory that will be loaded.
        model_type: the model type that `config.json` must have; any that transformers knows if None.
        classes: the values that keys such as `image_processor_type` may have; any class of transformers otherwise.

    Raises:
        CheckpointError: a file is refused; the message names file and key.
    """
    _expect_regular_files(folder)
    if (folder / "adapter_config.json").exists():
        raise CheckpointError(
            f"{folder / 'adapter_config.json'}: expected a model, got an adapter; load its model, then the adapter "
            "with peft.PeftModel.from_pretrained"
        )
    for name in _SETTINGS_FILES:
        file = folder / name
        if not file.is_file():
            continue
        settings = read_settings(file, classes)
        if name == "config.json":
            _expect_model_type(file, settings, model_type)


def read_settings(file: Path, classes: Mapping[str, Collection[str]] | None = None) -> dict[str, Any]:
    """Return the settings in a JSON file, after refusing those that ask for code or for files elsewhere.

    Raises:
        CheckpointError: as for `read_json`; also if a setting is refused.
    """
    settings = read_json(file)
    for key, value in items(settings):
        expected = expected_instead(key, value, classes)
        if expected is not None:
            raise CheckpointError(f"{file}: {key}: expected {expected}, got {shown(value)}")
    return settings


def read_json(file: Path) -> dict[str, Any]:
    """Return the object in a JSON file of settings.

    Raises:
        CheckpointError: the file is no regular file, is larger than 16 MiB, or is not a JSON object in UTF-8.
    """
    _expect_regular(file)
    size = file.stat().st_size
    if size > _MAX_SETTINGS_BYTES:
        raise CheckpointError(f"{file}: expected at most {_MAX_SETTINGS_BYTES} bytes of settings, got {size}")
    with naming(file, "a readable JSON file"):
        settings = json.loads(file.read_text(encoding="utf-8"))
    if not isinstance(settings, dict):
        raise CheckpointError(f"{file}: expected a JSON object, got {type(settings).__name__}")
    return settings


def expect_text_file(file: Path) -> None:
    """Refuse a file that cannot be read into memory: no regular file, or one of more than 128 MiB.

    Raises:
        CheckpointError: the file is refused or missing.
    """
    _expect_regular(file)
    if (size := file.stat().st_size) > _MAX_VOCABULARY_BYTES:
        raise CheckpointError(f"{file}: expected at most {_MAX_VOCABULARY_BYTES} bytes, got {size}")


def _expect_regular_files(folder: Path) -> None:
    for file in _listed(folder):
        if file.name.endswith(_READ_WHOLE):
            expect_text_file(file)
        elif file.name.endswith(_WEIGHTS):
            _expect_regular(file)


def _listed(folder: Path) -> Iterator[Path]:
    yield from sorted(folder.iterdir())
    templates = folder / "additional_chat_templates"
    if templates.is_dir():
        yield from sorted(templates.iterdir())


def _expect_regular(file: Path) -> None:
    """Refuse what is no file: opening a FIFO never returns."""
    try:
        mode = file.stat().st_mode
    except OSError as error:
        raise CheckpointError(f"{file}: expected a file, got {error.strerror or error}") from error
    if not stat.S_ISREG(mode):
        got = "a directory" if stat.S_ISDIR(mode) else "a pipe, socket or device"
        raise CheckpointError(f"{file}: expected a file, got {got}")


def expected_instead(path: str, value: Any, classes: Mapping[str, Collection[str]] | None = None) -> str | None:
    """Return what a setting should be if it asks for code or for files elsewhere, and None for data.

    Args:
        path: the setting's key, after the keys above it: `image_processor.auto_map`.
        value: value from a JSON file.
        classes: as for `expect_data_only`.
    """
    key = path.rsplit(".", 1)[-1]
    if value is None:
        return None
    if key in _CODE or key.startswith("custom_"):
        return "none, because no code of a checkpoint is run"
    if key in _ELSEWHERE:
        return "none, because nothing outside a checkpoint is read"
    # Published tokenizers record where `special_tokens_map_file` was; it is not opened.
    if key.endswith("_file") and key != "special_tokens_map_file":
        return None if _is_plain_name(value) else "the name of a file of this checkpoint"
    if key.strip("_").startswith(("attn_implementation", "experts_implementation")):
        values = value.values() if isinstance(value, dict) else [value]
        named = all(item is None or item in _IMPLEMENTATIONS for item in values if not isinstance(item, dict | list))
        return None if named else f"one of {', '.join(_IMPLEMENTATIONS)}"
    if key in ("dtype", "torch_dtype"):
        return None if _is_dtype(value) else "the name of a floating-point dtype"
    if key == "quantization_config":
        return None if isinstance(value, dict) else "a JSON object"
    if key == "quant_method":
        return None if value in _QUANTIZERS else f"one of {', '.join(_QUANTIZERS)}"
    if key == "tokenizer_class":
        return None if _is_tokenizer(value) else "the name of a tokenizer of transformers"
    if key in _CLASSES:
        if classes is not None and key in classes:
            return None if value in classes[key] else f"one of {', '.join(classes[key])}"
        return None if _is_processor(value) else "the name of a class of transformers"
    return None


def items(settings: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Yield each key, after the keys above it, and its value, at every level."""
    left: list[tuple[str, Any]] = [("", settings)]
    while left:
        prefix, value = left.pop()
        if isinstance(value, Mapping):
            below = [(f"{prefix}.{key}" if prefix else str(key), item) for key, item in value.items()]
            yield from below
            left += below
        elif isinstance(value, list):
            left += [(f"{prefix}[{index}]", item) for index, item in enumerate(value)]


def _is_plain_name(value: Any) -> bool:
    return isinstance(value, str) and value not in ("", ".", "..") and os.path.basename(value) == value


def _is_dtype(value: Any) -> bool:
    if isinstance(value, dict):  # one per part
        return all(item is None or _is_dtype(item) for item in value.values())
    dtype = getattr(torch, value.removeprefix("torch."), None) if isinstance(value, str) else value
    return value == "auto" or dtype in _DTYPES


def _is_tokenizer(name: Any) -> bool:
    if not isinstance(name, str):
        return False
    found = tokenizer_class_from_name(name) or tokenizer_class_from_name(name.removesuffix("Fast"))
    return isinstance(found, type) and issubclass(found, PreTrainedTokenizerBase)


def _is_processor(name: Any) -> bool:
    if not isinstance(name, str) or not name.endswith(("Processor", "Fast", "Pil", "FeatureExtractor")):
        return False
    return name == "LionProcessor" or name in dir(transformers)


def _expect_model_type(file: Path, settings: dict[str, Any], expected: str | None) -> None:
    found = settings.get("model_type")
    if expected is not None and found != expected:
        raise CheckpointError(f"{file}: model_type: expected {expected!r}, got {shown(found)}")
    if found is not None and not (isinstance(found, str) and (found in _OWN_TYPES or found in CONFIG_MAPPING)):
        raise CheckpointError(f"{file}: model_type: expected a model type of transformers, got {shown(found)}")
