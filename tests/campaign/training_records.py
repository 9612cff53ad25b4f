"""Files of training data, read strictly or not, and packed into shards."""

import json
import random
from functools import cache
from pathlib import Path
from typing import Any

from lion_fast.data import JsonlDataset, ShardDataset, write_shards
from lion_fast.data.records import MAX_LINE_BYTES
from tests.campaign.mutating import mutate_bytes, mutate_json, png
from tests.campaign.running import Trial
from tests.lion_fast.tiny import scene_processor

REGION = {"task": "region_level", "answer": "Answer: [0.250,0.100,0.500,1.000]", "boxes": [[0.25, 0.1, 0.5, 1]]}


@cache
def processor() -> Any:
    return scene_processor(20)


def make(rng: random.Random, folder: Path) -> Trial:
    (folder / "a.png").write_bytes(png((9, 9, 9)))
    plain = {
        "image": "a.png",
        "task": "image_level",
        "question": "What?",
        "answer": "a cat",
        "tags": ["a", "b"],
        "id": "7",
    }
    lines: list[bytes] = []
    for number in range(3):
        record: dict[str, Any] = plain | (REGION if number == 1 else {}) | {"id": str(number)}
        text = mutate_json(record, rng, rng.choice([0, 1, 1, 2, 5])) if number else json.dumps(record)
        lines.append(text.encode("utf-8", "surrogatepass"))
    if rng.random() < 0.05:
        lines.append(
            json.dumps(plain | {"answer": "é" * rng.choice([MAX_LINE_BYTES // 2 - 60, MAX_LINE_BYTES])}).encode()
        )
    content = rng.choice([b"\n", b"\r\n", b"\n\n"]).join(lines)
    if rng.random() < 0.2:
        content = mutate_bytes(content, rng)
    path = folder / "train.jsonl"
    path.write_bytes(content)
    strict = rng.random() < 0.5
    packs = rng.random() < 0.3

    def call() -> list[dict[str, Any]]:
        dataset: Any = JsonlDataset(path, strict=strict)
        if packs:
            write_shards(dataset, folder / "shards")
            dataset = ShardDataset(folder / "shards", strict=strict)
        return [dataset[index] for index in range(len(dataset))]

    def check(samples: list[dict[str, Any]]) -> None:
        for sample in samples:  # whatever the check of a file accepts, the processor takes
            batch = processor()(
                images=[sample["image"]],
                text=[sample["question"]],
                tags=[sample["tags"]],
                task=[sample["task"]],
                text_target=[sample["answer"]],
            )
            assert batch["input_ids"].numel(), sample
        if not strict and content.startswith(lines[0] + b"\n"):
            assert any(sample["id"] == "0" for sample in samples), "a valid record is lost"

    return Trial(f"strict={strict}, packs={packs}: {content[:300]!r}", call, [str(path), str(folder / "shards")], check)
