"""The settings of a bulk job: everything that its rows depend on, recorded next to its output."""

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from lion_fast.io.digests import digest_of
from lion_fast.io.reading import brief, read_content, shown
from lion_fast.model.prompts import CAPTION_INSTRUCTION, LOCATE_INSTRUCTION

PATTERN = frozenset("*?[")
"""Characters that make an input a pattern."""


@dataclass(frozen=True)
class Command:
    """A command that runs on every image.

    Args:
        fields: fields of its rows, between `image` and `error`.
        task: task of the adapters' router; None for a model other than LION.
        instruction: instruction for LION; `{}` stands for the text of each image.
        asks: name of the field with that text; None for a command without text.
    """

    fields: tuple[str, ...]
    task: str | None = None
    instruction: str = ""
    asks: str | None = None


COMMANDS = {
    "caption": Command(("caption",), "image_level", CAPTION_INSTRUCTION),
    "ask": Command(("question", "answer"), "image_level", "{}", asks="question"),
    "locate": Command(
        ("expression", "answer", "boxes"), "region_level", LOCATE_INSTRUCTION.format(expression="{}"), asks="expression"
    ),
    "tag": Command(("tags",)),
}


@dataclass(frozen=True)
class BulkJob:
    """A command for many images, with its input and output.

    Args:
        command: `caption`, `ask`, `locate` or `tag`.
        input: image, directory of images, `.jsonl`, `.parquet` or `.tar` file (WebDataset's shards), directory of
            `.tar` files, or pattern such as `photos/**/*.jpg` that matches files of one of these kinds.
        out: file that ends in `.jsonl`, or directory that ends in `.parquet`.
        model: directory of LION's checkpoint, or of a `RamTagger` for `tag`.
        text: question (`ask`) or expression (`locate`) for all images; None to read it from the input.
        tags: tags of all images, `"dog, cart, man"`; None to read them from the input, if it has any.
        columns: names of fields of the input that differ from `id`, `image`, `question`, `expression` and `tags`;
            an empty one for `id` numbers the rows of a table although it has that field.
        image_root: directory that image paths in a table are relative to; the directory of the table if None.
        num_beams, max_new_tokens: arguments of `generate`; the checkpoint's if None.

    Raises:
        ValueError: unknown command or column, `out` with another suffix, or text that the command does not take.
    """

    command: str
    input: str
    out: str
    model: str
    text: str | None = None
    tags: str | None = None
    columns: Mapping[str, str] = field(default_factory=dict)
    image_root: str | None = None
    num_beams: int | None = None
    max_new_tokens: int | None = None

    def __post_init__(self) -> None:
        if self.command not in COMMANDS:
            raise ValueError(f"command: expected {', '.join(COMMANDS)}, got {self.command!r}")
        asks = self.definition.asks
        if self.text is not None and (asks is None or not self.text.strip()):
            expected = f"none for {self.command}" if asks is None else "words"
            raise ValueError(f"{asks or 'text'}: expected {expected}, got {self.text!r}")
        if self.command == "tag" and self.tags is not None:
            raise ValueError(f"tags: expected none for tag, which generates them, got {self.tags!r}")
        for role, value in ((asks, self.text), ("tags", self.tags)):
            if value is not None and role in self.columns:
                raise ValueError(f"columns: expected none for {role}, because all images have the same, got one")
        roles = {"id", "image"} | ({asks} if asks else set()) | (set() if self.command == "tag" else {"tags"})
        for role, name in self.columns.items():
            if role not in roles:
                expected = ", ".join(sorted(roles))
                raise ValueError(f"columns: expected names for {expected}, got one for {role!r}")
            if not name and role != "id":
                raise ValueError(f"columns: expected a name for {role!r}, got an empty one")
        if Path(self.out).suffix not in (".jsonl", ".parquet"):
            raise ValueError(f"out: expected a name that ends in .jsonl or .parquet, got {self.out}")

    def expect_input(self) -> None:
        """Raise FileNotFoundError if the input is no pattern, and nothing is there."""
        if not PATTERN & set(self.input) and not os.path.lexists(self.input):
            raise no_input(self.input)

    def expect_model(self) -> None:
        """Raise ValueError unless the model is a directory."""
        if not Path(self.model).is_dir():
            raise ValueError(f"model: expected a directory, got {self.model}")

    @property
    def definition(self) -> Command:
        return COMMANDS[self.command]

    def row(self, id: str | int, **values: Any) -> dict[str, Any]:
        """Return a row of the output with every field of the command; fields without a value are None."""
        given = {"id": id, **values}
        return {name: given.get(name) for name in ("id", "image", *self.definition.fields, "error")}


_DIGESTS, _PLACES = "digests", "places"
# The settings, the vocabularies and the tags of a model, in its directory and in that of the Q-Former's tokenizer.
# Other files may lie there, such as a job's output.
_OF_THE_MODEL = (
    "config.json",
    "generation_config.json",
    "processor_config.json",
    "preprocessor_config.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "tokenizer.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "spiece.model",
    "tokenizer.model",
    "tag_list.txt",
    "tag_thresholds.txt",
)
_DIRECTORIES = (".", "qformer_tokenizer")


def record_of(job: BulkJob) -> Path:
    """Return the path of the file next to the output that records a job's settings, such as `rows.jsonl.job.json`."""
    return Path(job.out + ".job.json")


def settings_of(
    job: BulkJob, files: list[list], dtype: str, own_ids: bool, tables: Sequence[Path] = ()
) -> dict[str, Any]:
    """Return the settings that are recorded, in JSON's types.

    Args:
        files: input files whose change would change the ids, [name, bytes] each.
        dtype: dtype of the model.
        own_ids: whether ids are read from a field of the input.
        tables: files of an input that is not images.
    """
    settings = {**asdict(job), "dtype": dtype, "weights": _weights(Path(job.model)), "files": files}
    del settings["out"]
    if own_ids:
        settings["own_ids"] = True
    settings[_DIGESTS] = _digests(Path(job.model), tables)
    settings[_PLACES] = _places(job)
    return json.loads(json.dumps(settings))


def recorded_settings(path: Path) -> dict[str, Any] | None:
    """Read recorded settings; None if the file is missing or empty.

    Raises:
        ValueError: the file does not hold the settings of a job.
    """
    try:
        content = read_content(path)
    except FileNotFoundError:
        return None
    if not content:
        return None
    try:
        before = json.loads(content)
        if not isinstance(before, dict) or not {"command", "input", "model"} <= before.keys():
            raise ValueError("expected an object with command, input and model")
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not the settings of a job ({brief(error)})") from error
    return before


def expect_same_settings(job: BulkJob, settings: dict[str, Any]) -> None:
    """Compare a job's settings with those recorded next to its output.

    Raises:
        ValueError: the output was started with other settings, or not by a job.
    """
    path = record_of(job)
    before = recorded_settings(path)
    if before is None:
        raise ValueError(
            f"out: expected an unused name, got {job.out}, which has rows but no {path.name} (see --overwrite)"
        )
    changes = [
        f"{name} was {_brief(before.get(name))}, is {_brief(settings.get(name))}"
        for name in sorted((before.keys() | settings.keys()) - {_DIGESTS, _PLACES})
        if before.get(name) != settings.get(name)
    ]
    changes += _changes_of_files(before, settings)
    if changes:
        raise ValueError(
            f"out: {job.out} was started with other settings; resume with those, or use another output: "
            + "; ".join(changes)
        )


def _changes_of_files(before: Mapping[str, Any], settings: Mapping[str, Any]) -> list[str]:
    """Return what differs in the content and in the place of the files; earlier versions recorded neither."""
    changes = []
    if isinstance(recorded := before.get(_DIGESTS), dict):
        digests = settings[_DIGESTS]
        different = (
            name for name in sorted(recorded.keys() | digests.keys()) if recorded.get(name) != digests.get(name)
        )
        changes += [f"{name} has changed" for name in different]
    if isinstance(recorded := before.get(_PLACES), dict):
        for name, place in settings[_PLACES].items():
            # A project that was moved as a whole has the same relative places.
            if isinstance(old := recorded.get(name), list) and not set(map(str, old)) & set(place):
                changes.append(f"{name} was {_brief(old[:1])[1:-1]}, is {_brief(place[0])}")
    return changes


def no_input(input: str) -> FileNotFoundError:
    """Return the error of an input that is not there."""
    return FileNotFoundError(
        f"input: expected a file, a directory, or a pattern that matches files, got {shown(input)[1:-1]}"
    )


def _digests(model: Path, tables: Sequence[Path]) -> dict[str, str]:
    """Return the digests of tables and shards, and of the settings beside the model's weights."""
    found = {f"input {table}": digest_of(table) for table in tables}
    files = [file for part in _DIRECTORIES for name in _OF_THE_MODEL if (file := model / part / name).is_file()]
    return found | {f"model/{file.relative_to(model)}": digest_of(file) for file in files}


def _places(job: BulkJob) -> dict[str, list[str]]:
    """Return the absolute paths of the input and its images, and their paths from the output."""
    folder = os.path.dirname(os.path.abspath(job.out))
    given = {"input": job.input, "image_root": job.image_root}
    absolute = {name: os.path.abspath(path) for name, path in given.items() if path is not None}
    return {name: [path, os.path.relpath(path, folder)] for name, path in absolute.items()}


def _weights(directory: Path) -> list[list]:
    """Return names, sizes and times of the weight files, which identify the weights without reading them."""
    stats = [(file.name, file.stat()) for file in sorted(directory.glob("*.safetensors"))]
    return [[name, stat.st_size, stat.st_mtime_ns] for name, stat in stats]


def _brief(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 120 else text[:117] + "..."
