"""What a bulk job is asked to do: all that its rows depend on, as it is recorded beside its output."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from lion_fast.io.atomic import write_json
from lion_fast.model.prompts import CAPTION_INSTRUCTION, LOCATE_INSTRUCTION


@dataclass(frozen=True)
class Command:
    """One of the things that can be asked about every picture.

    Args:
        fields: of its rows, between `image` and `error`.
        task: of the adapters' router; None where another model than LION answers.
        instruction: what LION is asked; `{}` is the place of the text that differs by picture.
        asks: the field that holds that text; None where there is none.
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
    """A question about many pictures, and where the answers go.

    Args:
        command: `caption`, `ask`, `locate` or `tag`.
        input: a picture, a folder of pictures, a `.jsonl`, `.parquet` or `.tar` file (WebDataset's shards), a folder of
            `.tar` files, or a pattern such as `photos/**/*.jpg` that matches files of one of these kinds.
        out: a file that ends in `.jsonl`, or a folder that ends in `.parquet`.
        model: directory of LION's checkpoint; of a `RamTagger` for `tag`.
        text: the question (`ask`) or expression (`locate`) for every picture; None where it is read from the input.
        tags: of every picture, `"dog, cart, man"`; None where they are read from the input if it has any.
        columns: names of fields of the input that differ from `image`, `question`, `expression` and `tags`.
        image_root: what relative paths of pictures in a table start from; the table's own folder if None.
        num_beams, max_new_tokens: the checkpoint's own if None.

    Raises:
        ValueError: for an unknown command or column, an `out` of another kind, or text that the command does not take.
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
            raise ValueError(f"tags: expected none for tag, which finds them, got {self.tags!r}")
        roles = {"image"} | ({asks} if asks else set()) | (set() if self.command == "tag" else {"tags"})
        for role in self.columns:
            if role not in roles:
                raise ValueError(f"columns: expected names for {', '.join(sorted(roles))}, got one for {role!r}")
        if Path(self.out).suffix not in (".jsonl", ".parquet"):
            raise ValueError(f"out: expected a name that ends in .jsonl or .parquet, got {self.out}")

    @property
    def definition(self) -> Command:
        return COMMANDS[self.command]

    def row(self, id: str, **values: Any) -> dict[str, Any]:
        """A row of the output: every field of the command, None where nothing is given for it."""
        given = {"id": id, **values}
        return {name: given.get(name) for name in ("id", "image", *self.definition.fields, "error")}


def record_settings(job: BulkJob, files: list[list], dtype: str, began: bool) -> None:
    """Write the settings beside the output (`captions.jsonl.job.json`), or see that they are those written there.

    Args:
        files: what was read, as far as a change of it would give other ids: [name, bytes] each.
        dtype: that the model computes in.
        began: whether the output holds rows already.

    Raises:
        ValueError: the output was begun with other settings, or by no job.
    """
    path = Path(job.out + ".job.json")
    settings = json.loads(
        json.dumps({**asdict(job), "dtype": dtype, "weights": _weights(Path(job.model)), "files": files})
    )
    del settings["out"]
    if not began:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, settings)
        return
    if not path.is_file():
        raise ValueError(f"out: expected a name that is not taken, got {job.out}, which has rows but no {path.name}")
    try:
        before = dict(json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path}: not the settings of a job ({error})") from error
    changes = [
        f"{name} was {_brief(before.get(name))}, is {_brief(settings.get(name))}"
        for name in sorted(before.keys() | settings.keys())
        if before.get(name) != settings.get(name)
    ]
    if changes:
        raise ValueError(
            f"out: {job.out} was begun with other settings; go on with those, or name another output: "
            + "; ".join(changes)
        )


def _weights(directory: Path) -> list[list]:
    """What tells one training's weights from another's without reading them."""
    stats = [(file.name, file.stat()) for file in sorted(directory.glob("*.safetensors"))]
    return [[name, stat.st_size, stat.st_mtime_ns] for name, stat in stats]


def _brief(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 120 else text[:117] + "..."
