"""Fixtures: a checkpoint of a few thousand parameters, images for it, and processes that can be killed."""

import json
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch

from lion_fast import LionForCausalLM
from lion_fast.inference.bulk import BulkJob
from lion_fast.scenes import SceneGenerator
from tests.lion_fast.inference.bulk.inputs import CORRUPT, COUNT
from tests.lion_fast.processes import starting
from tests.lion_fast.tiny import make_config, scene_processor

PROCESS = Path(__file__).with_name("bulk_process.py")


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Directory of a random model with T5 whose answers depend on image and text."""
    path = tmp_path_factory.mktemp("bulk") / "checkpoint"
    processor = scene_processor(20)
    strong = {"initializer_range": 0.5}
    torch.manual_seed(0)
    config = make_config(
        processor=processor,
        vision_config={**strong, "num_hidden_layers": 2},
        qformer_config={**strong, "max_position_embeddings": 512},
        aggregator_config={**strong, "num_attention_heads": 2, "feature_layers": [1, 1, 0], "projection_size": 24},
        text={"initializer_factor": 1.5},
        **strong,
    )
    model = LionForCausalLM(config)
    model.generation_config.update(num_beams=1, repetition_penalty=1.0, max_new_tokens=6)
    model.save_pretrained(path)
    processor.save_pretrained(path)
    return path


@pytest.fixture(scope="session")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Directory with 120 files in `pictures`, two of them corrupt, and `table.jsonl` with a question about each."""
    root = tmp_path_factory.mktemp("pictures")
    (root / "pictures" / "sub").mkdir(parents=True)
    scenes = SceneGenerator(seed=3, image_size=32)
    with (root / "table.jsonl").open("w") as table:
        for number in range(COUNT):
            name = f"pictures/{'sub/' if number % 2 == 0 else ''}{number:05d}.png"
            scene = scenes[number]
            scene.image.save(root / name)
            if name in CORRUPT:
                (root / name).write_bytes(CORRUPT[name])
            question = scene.questions[number % len(scene.questions)].text
            fields = {"image": name, "question": question, "tags": scene.tags[: number % 3]}
            fields["expression"] = scene.expressions[0].text
            table.write(json.dumps(fields) + "\n")
    return root


@pytest.fixture
def make_job(checkpoint: Path, images: Path, tmp_path: Path) -> Callable[..., BulkJob]:
    """Factory of jobs over all images, with output in the test's directory."""

    def make(command: str = "caption", out: str = "rows.jsonl", **overrides: Any) -> BulkJob:
        table = command in ("ask", "locate")
        given = {"input": str(images / ("table.jsonl" if table else "pictures")), "model": str(checkpoint)}
        return BulkJob(command, out=str(tmp_path / out), **{**given, **overrides})

    return make


@pytest.fixture(scope="session")
def start() -> Iterator[Callable[..., Any]]:
    """Start a `bulk_process`."""
    with starting(PROCESS, ["lion_fast.inference.bulk"]) as begin:
        yield lambda job, **arguments: begin(job=asdict(job), **arguments)
