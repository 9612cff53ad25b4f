"""Loading of our models from untrusted checkpoints: looked through, compared with their weights, and then complete."""

import copy
import os
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import GenerationConfig, PreTrainedConfig

from lion_fast.io.checkpoints import CheckpointError, naming, scan
from lion_fast.io.reading import brief, shown
from lion_fast.io.untrusted import expect_data_only, read_json
from lion_fast.model.fitting import Size, Weights, expect_fitting

# Settings of a model that decide which weights it has. A caller who replaces one asks for another model, whose further
# weights are new.
_CHOICES = ("visual_input", "num_adapters", "soft_prompt_token_id")


def load_pretrained(
    load: Callable[..., Any],
    config_class: Any,
    sizes: Callable[[Any, Weights], Iterator[Size]],
    folder: Path,
    options: dict[str, Any],
    *args: Any,
    **added: Any,
) -> Any:
    """Call transformers' `from_pretrained` for a folder that has been found to hold data that fits.

    Args:
        load: `from_pretrained` of `PreTrainedModel`, bound to the model's class.
        config_class: class of the model's configuration.
        sizes: yields the sizes of a configuration that weights show.
        folder: directory with `config.json` and weights.
        options: the caller's arguments of `from_pretrained`, and as `name_or_path` what the caller asked for.
        args, added: further arguments of the model's constructor.

    Raises:
        CheckpointError: the folder asks for code, a file cannot be read, the configuration does not fit the weights, or
            tensors are missing or have other shapes; the message names the file.
    """
    if options.get("gguf_file") is not None:
        raise ValueError(f"gguf_file: expected none, as LION has no GGUF format, got {options['gguf_file']!r}")
    expect_data_only(folder, model_type=config_class.model_type)
    saved = config_class.from_pretrained(folder)
    config = _wanted(saved, options)
    replaced = {name for name in _CHOICES if getattr(config, name, None) != getattr(saved, name, None)}
    tensors = scan(folder, variant=options.get("variant"))
    _expect_no_distributed_shards(folder)
    lenient = bool(options.pop("ignore_mismatched_sizes", False))
    if not lenient:
        expect_fitting(config, tensors, folder, sizes, replaced)
    with_info = options.pop("output_loading_info", False)
    name = str(options.pop("name_or_path", folder))
    _expect_generation_settings(folder / "generation_config.json")
    with _naming_unless_of_this_machine(folder, options):
        model, info = load(
            folder,
            *args,
            ignore_mismatched_sizes=True,
            output_loading_info=True,
            local_files_only=True,
            **added,
            **options,
        )
    absent = sorted(str(key[0]) for key in info["mismatched_keys"])
    if not replaced:
        absent += sorted(info["missing_keys"])
    if absent and not lenient:
        raise CheckpointError(f"{folder}: {len(absent)} tensors are missing or of another shape, such as {absent[0]}")
    model.name_or_path = model.config.name_or_path = name  # of the Hub, if it was downloaded
    return (model, info) if with_info else model


def _wanted(saved: Any, options: Mapping[str, Any]) -> Any:
    """Return the configuration that transformers will use, with the settings among the caller's arguments.

    Raises:
        TypeError: `config` is neither a configuration of this class nor where one is.
        ValueError: a setting among the arguments has a value that the model does not take.
    """
    given = options.get("config")
    if given is not None and not isinstance(given, type(saved)):
        if not isinstance(given, str | os.PathLike):
            raise TypeError(f"config: expected a {type(saved).__name__} or the path of one, got {shown(given)}")
        given = type(saved).from_pretrained(given)
    config = copy.deepcopy(saved if given is None else given)
    for name, value in options.items():
        if name in vars(config):
            part = getattr(config, name)
            if isinstance(part, PreTrainedConfig) and isinstance(value, dict):
                value = type(part)(**{**part.to_dict(), **value})  # as transformers does
            setattr(config, name, value)
    config.expect_valid()
    return config


def _expect_generation_settings(file: Path) -> None:
    if not file.is_file():
        return
    settings = read_json(file)
    for key, value in settings.items():
        if callable(getattr(GenerationConfig, key, None)):
            raise CheckpointError(
                f"{file}: {key}: expected no setting of this name, which is the configuration class's own, "
                f"got {shown(value)}"
            )
    with naming(file, "a configuration of generation that can be used"):
        GenerationConfig.from_dict(settings)


def _expect_no_distributed_shards(folder: Path) -> None:
    for file in folder.iterdir():
        if re.fullmatch(r"shard-\d{5}-model-\d{5}-of-\d{5}\.safetensors", file.name):
            raise CheckpointError(f"{file}: expected model.safetensors or its shards, got a distributed checkpoint's")


@contextmanager
def _naming_unless_of_this_machine(folder: Path, options: Mapping[str, Any]) -> Iterator[None]:
    """Name folder and arguments for any error but those of memory and of packages that are not installed."""
    try:
        yield
    except (ImportError, MemoryError, torch.OutOfMemoryError, CheckpointError):
        raise
    except Exception as error:
        unknown = re.search(r"unexpected keyword argument '(\w+)'", str(error))
        if isinstance(error, TypeError) and unknown is not None and unknown[1] in options:
            raise TypeError(f"{unknown[1]}: unexpected argument of from_pretrained") from error
        given = ", ".join(f"{name}={shown(value)}" for name, value in options.items() if value is not None)
        means = f" with {given}" if given else ""
        raise CheckpointError(f"{folder}: not a checkpoint that can be loaded{means} ({brief(error)})") from error
