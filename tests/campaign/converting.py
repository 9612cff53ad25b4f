"""Annotation files of every format that is converted."""

import copy
import json
import random
from pathlib import Path
from typing import Any

from lion_fast.data import FORMATS, Conversion, JsonlDataset, Record, write_jsonl
from tests.campaign.mutating import mutate_bytes, mutate_json
from tests.campaign.running import Trial
from tests.lion_fast.data.test_converters import VALID

TEMPLATES = (
    "{image_id}.jpg",
    "{image_id:012d}.jpg",
    "{image_id:>12}",
    "{image_id:99999999999}",
    "{image_id:99999999999d}",
    "{image_id.__class__.__mro__}",
    "{image_id[0]}",
    "{0}",
    "{}",
    "{",
    "{image_id!r}",
    "{image_id:{suffix}}",
    "{subset}",
    "{image_id:,}",
    "{{image_id}}",
    "a\nb",
    "\0",
    "../{image_id}",
    "{image_id:x}",
    "{image_id:1.99999999f}",
)


def make(rng: random.Random, folder: Path) -> Trial:
    format = rng.choice(list(FORMATS))
    contents: list[Any] = copy.deepcopy(VALID[format])
    changed = rng.random() < 0.9
    times = rng.choice([1, 1, 2, 4]) if changed else 0
    broken = rng.randrange(len(contents))
    paths = []
    texts = []
    for number, content in enumerate(contents):
        if isinstance(content, str):
            data = content.encode()
        else:
            data = mutate_json(content, rng, times if number == broken else 0).encode("utf-8", "surrogatepass")
        if number == broken and changed and (isinstance(content, str) or rng.random() < 0.15):
            data = mutate_bytes(data, rng)
        if not changed:  # changes without a meaning
            data = rng.choice([b"", b"\xef\xbb\xbf"]) + data.replace(b"\n", rng.choice([b"\n", b"\r\n"]))
        paths.append(folder / f"{number}.data")
        paths[-1].write_bytes(data)
        texts.append(data[:200])
    options: dict[str, Any] = {"strict": rng.random() < 0.5, "images": rng.choice(["", "images", "/data", "../x"])}
    named = FORMATS[format].image_template and rng.random() < 0.3
    if named and changed:
        options["image_name"] = rng.choice(TEMPLATES)
    if changed and rng.random() < 0.1:
        options["splits"] = rng.choice([["train"], ["val", "train"], [""], ["\0"]])
    if changed and rng.random() < 0.1:
        options["kinds"] = rng.choice([["rec"], ["reg", "rec", "rec"], ["x"], [""]])

    def call() -> list[Record]:
        conversion = Conversion(format, paths, **options)
        write_jsonl(conversion, folder / "out.jsonl")
        dataset = JsonlDataset(folder / "out.jsonl")
        return [dataset.record(index) for index in range(len(dataset))]

    def check(records: list[Record]) -> None:
        assert len({record.id for record in records}) == len(records), "an id twice"
        if not changed:
            for path, content in zip(paths, contents, strict=True):
                path.write_text(content if isinstance(content, str) else json.dumps(content))
            assert records == list(Conversion(format, paths, **options)), "other records"

    names = [*map(str, paths), "image_name", "splits", "kinds"]
    return Trial(f"{format} {options}: {texts!r}"[:600], call, names, check)
