"""What the processor's arguments may be: texts, tags, tasks, and the settings that transformers' processors take."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, is_dataclass
from typing import Any

from lion_fast.io.reading import shown
from lion_fast.model.validation import is_integer
from lion_fast.tasks import TASKS

Tags = str | Sequence[str] | None
"""Tags of one image: one string in LION's format (`"dog, cart, man"`), one string per tag, or None."""

_PADDING = {True: True, "longest": True, "max_length": "max_length", False: False, "do_not_pad": False, None: False}
_TRUNCATION = {True: True, "longest_first": True, "only_first": True, False: False, "do_not_truncate": False}
_TEXT = ("padding", "truncation", "max_length", "pad_to_multiple_of", "padding_side", "add_special_tokens")
_SIZES = ("size", "crop_size", "pad_size")
MAX_SIDE = 4096  # pixels; far above every published model's
_OTHER_MODALITIES = ("videos", "audio", "videos_kwargs", "audio_kwargs")


@dataclass(frozen=True)
class Settings:
    """The settings of one call.

    Args:
        padding: True (to the longest row), "max_length" or False.
        truncation: whether prompts are truncated; None for the processor's rule.
        max_length: number of tokens for truncation and for padding="max_length"; None for the processor's.
        tokenizer: further arguments of the tokenizers.
        images: arguments of the image processor.
        return_tensors: "pt", "np" or None.
    """

    padding: bool | str
    truncation: bool | None
    max_length: int | None
    tokenizer: dict[str, Any]
    images: dict[str, Any]
    return_tensors: str | None


def sorted_settings(given: Mapping[str, Any], image_names: Sequence[str], return_tensors: Any) -> Settings:
    """Sort the settings of a call, which are given as such or in `text_kwargs`, `images_kwargs` and `common_kwargs`.

    Args:
        given: keyword arguments of the call.
        image_names: names of the image processor's settings.
        return_tensors: value of this argument, which a group may replace.

    Raises:
        TypeError: an argument is unknown, or a group is not a dict.
        ValueError: an argument is given twice, or has a value that it does not take.
    """
    known = {"text_kwargs": frozenset(_TEXT), "images_kwargs": frozenset(image_names) - {"return_tensors"}}
    found: dict[str, dict[str, Any]] = {group: {} for group in known}
    for group in ("common_kwargs", *known):
        for name, value in _group(group, given.get(group)).items():
            owners = [owner for owner in known if name in known[owner] and group in (owner, "common_kwargs")]
            if name == "return_tensors":
                return_tensors = value
            elif not owners:
                raise TypeError(f"{group}[{name!r}]: unexpected argument")
            elif name in given:
                raise ValueError(f"{name}: expected it once, got it as an argument and in {group}")
            for owner in owners:
                found[owner][name] = value
    for name, value in given.items():
        owners = [owner for owner in known if name in known[owner]]
        if name in _OTHER_MODALITIES:
            if not (value is None or (isinstance(value, Mapping) and not value)):
                raise ValueError(f"{name}: expected none, because LION reads images and text, got {shown(value)}")
        elif name not in ("common_kwargs", *known) and not owners:
            expected = ", ".join(sorted({*known["text_kwargs"], *known["images_kwargs"], *known, "common_kwargs"}))
            raise TypeError(f"{name}: unexpected argument; expected some of {expected}")
        for owner in owners:
            found[owner][name] = value
    return_tensors = getattr(return_tensors, "value", return_tensors)  # of a TensorType
    if return_tensors is not None and str(return_tensors) not in ("pt", "np"):
        raise ValueError(f"return_tensors: expected 'pt', 'np' or None, got {shown(return_tensors)}")
    expect_image_settings(found["images_kwargs"])
    text = found["text_kwargs"]
    truncation = text.pop("truncation", None)
    return Settings(
        padding=_one_of("padding", text.pop("padding", True), _PADDING),
        truncation=None if truncation is None else _one_of("truncation", truncation, _TRUNCATION),
        max_length=_count("max_length", text.pop("max_length", None)),
        tokenizer={name: _checked(name, value) for name, value in text.items()},
        images=found["images_kwargs"],
        return_tensors=return_tensors,
    )


def expect_image_settings(settings: Mapping[str, Any]) -> None:
    """Check the settings of the image processor that it would obey at any cost of memory, or ignore.

    Raises:
        ValueError: a side is not a whole number in 1..`MAX_SIDE`, or the channels are not to be first.
    """
    for name in _SIZES:
        sides = [side for side in _sides(settings.get(name)) if isinstance(side, int | float)]
        if not all(is_integer(side, 1, MAX_SIDE) for side in sides):
            raise ValueError(f"{name}: expected sides in 1..{MAX_SIDE} pixels, got {shown(settings[name])}")
    layout = getattr(settings.get("data_format"), "value", settings.get("data_format"))
    if layout not in (None, "channels_first"):
        raise ValueError(f"data_format: expected 'channels_first', as the model takes images, got {shown(layout)}")


def _sides(size: Any) -> list[Any]:
    """Return the numbers in a size, which is a number, several, or a dict or SizeDict of transformers."""
    if is_dataclass(size) and not isinstance(size, type):
        size = asdict(size)
    if isinstance(size, Mapping):
        return list(size.values())
    return list(size) if isinstance(size, list | tuple) else [size]


def _group(name: str, value: Any) -> Mapping[str, Any]:
    if value is None:
        return {}
    if not isinstance(value, Mapping) or not all(isinstance(key, str) for key in value):
        raise TypeError(f"{name}: expected a dict of arguments, got {type(value).__name__}")
    return value


def _one_of(name: str, value: Any, known: Mapping[Any, Any]) -> Any:
    if isinstance(value, bool | str | None) and value in known:
        return known[value]
    raise ValueError(f"{name}: expected one of {', '.join(map(repr, known))}, got {shown(value)}")


def _count(name: str, value: Any) -> int | None:
    if value is None or (isinstance(value, int) and not isinstance(value, bool) and 1 <= value < 1 << 31):
        return value
    raise ValueError(f"{name}: expected a whole number of 1 or more, got {shown(value)}")


def _checked(name: str, value: Any) -> Any:
    if name == "pad_to_multiple_of":
        return _count(name, value)
    expected = {"padding_side": ("left", "right"), "add_special_tokens": (True, False)}[name]
    if not any(value is choice or (isinstance(value, str) and value == choice) for choice in expected):
        raise ValueError(f"{name}: expected {' or '.join(map(repr, expected))}, got {shown(value)}")
    return value


def strings(value: object, name: str, count: int | None = None) -> list[str]:
    """Return `value` as a list of strings, checking their number if `count` is given."""
    if isinstance(value, str):
        value = [value]
    if not isinstance(value, Sequence) or isinstance(value, bytes):
        raise TypeError(f"{name}: expected a string or a list of strings, got {type(value).__name__}")
    for i, string in enumerate(value):
        if not isinstance(string, str):
            raise TypeError(f"{name}[{i}]: expected a string, got {type(string).__name__}")
        if any("\ud800" <= character <= "\udfff" for character in string):
            raise ValueError(
                f"{name}[{i}]: expected text that UTF-8 can hold, got half a surrogate pair in {string!r:.200}"
            )
    if count is not None:
        _check_count(value, name, count)
    return list(value)


def _check_count(values: Sequence, name: str, count: int) -> None:
    if len(values) != count:
        raise ValueError(f"{name}: expected one per image ({count}), got {len(values)}")


def tags_by_sample(tags: Tags | Sequence[Tags], count: int, single: bool) -> list[str]:
    """Return each sample's tags as one string, "" for none. In a `single` call, a flat list belongs to its sample."""
    if tags is None:
        return [""] * count
    if not isinstance(tags, Sequence):
        raise TypeError(
            f"tags: expected None, a string, a list with one entry per image or a tagger, got {type(tags).__name__}"
        )
    of_one_sample = isinstance(tags, str) or (single and all(isinstance(tag, str) for tag in tags))
    entries = [tags] if of_one_sample else tags
    _check_count(entries, "tags", count)
    return ["" if entry is None else _joined_tags(entry, f"tags[{i}]") for i, entry in enumerate(entries)]


def _joined_tags(tags: object, name: str) -> str:
    joined = ", ".join(strings(tags, name))
    return joined if joined.strip() else ""


def task_ids(task: str | Sequence[str], count: int) -> list[int]:
    names = [task] * count if isinstance(task, str) else strings(task, "task", count)
    for name in names:
        if name not in TASKS:
            raise ValueError(f"task: expected {' or '.join(map(repr, TASKS))}, got {shown(name)}")
    return [TASKS.index(name) for name in names]


def expect_equal_lengths(data: Mapping[str, Any], settings: Settings) -> None:
    """Raise ValueError if rows of different lengths are to become a tensor.

    Args:
        data: name -> rows, of which lists are rows of tokens.
        settings: the call's, named in the error.
    """
    for name, rows in data.items():
        lengths = {len(row) for row in rows if isinstance(row, list)}
        if len(lengths) > 1:
            raise ValueError(
                f"padding: expected True, or 'max_length' with truncation=True, for "
                f"return_tensors={settings.return_tensors!r}, got {settings.padding!r} with {name} of {min(lengths)} "
                f"to {max(lengths)} tokens"
            )
