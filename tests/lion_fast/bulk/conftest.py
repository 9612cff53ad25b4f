"""A checkpoint of a few thousand parameters, pictures to ask it about, and processes that can be killed."""

import json
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import BlipImageProcessorPil

from lion_fast import LionConfig, LionForCausalLM, LionProcessor
from lion_fast.inference.bulk import BulkJob
from lion_fast.quickstart.vocabulary import build_qformer_tokenizer, build_text_tokenizer, scene_texts
from lion_fast.scenes import SceneGenerator
from tests.lion_fast.bulk.inputs import CORRUPT, COUNT
from tests.lion_fast.processes import starting

PROCESS = Path(__file__).with_name("bulk_process.py")


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random model around T5 whose answers depend on what it sees and reads."""
    path = tmp_path_factory.mktemp("bulk") / "checkpoint"
    texts = scene_texts(num_scenes=20)
    processor = LionProcessor(
        BlipImageProcessorPil(size={"height": 28, "width": 28}),
        build_text_tokenizer(texts),
        build_qformer_tokenizer(texts),
    )
    small = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
    no_dropout = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    torch.manual_seed(0)
    config = LionConfig(
        vision_config={**small, "image_size": 28, "patch_size": 14, "initializer_range": 0.5},
        qformer_config={
            **small,
            **no_dropout,
            "vocab_size": len(processor.qformer_tokenizer),
            "initializer_range": 0.5,
        },
        aggregator_config={
            "hidden_size": 16,
            "num_attention_heads": 2,
            "intermediate_size": 24,
            "feature_layers": [1, 1, 0],
            "projection_size": 24,
            "initializer_range": 0.5,
            **no_dropout,
        },
        text_config={
            "model_type": "t5",
            "d_model": 32,
            "d_kv": 8,
            "d_ff": 48,
            "num_layers": 2,
            "num_heads": 4,
            "vocab_size": len(processor.tokenizer),
            "feed_forward_proj": "gated-gelu",
            "dense_act_fn": "gelu",
            "tie_word_embeddings": False,
            "decoder_start_token_id": 0,
            "initializer_factor": 1.5,
        },
        num_query_tokens=4,
        adapter_rank=8,
        soft_prompt_token_id=processor.soft_prompt_token_id,
        initializer_range=0.5,
    )
    model = LionForCausalLM(config)
    model.generation_config.update(num_beams=1, repetition_penalty=1.0, max_new_tokens=6)
    model.save_pretrained(path)
    processor.save_pretrained(path)
    return path


@pytest.fixture(scope="session")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `pictures`, 120 of them, two of which are none, and `table.jsonl` with a question about each."""
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
def make_job(checkpoint: Path, pictures: Path, tmp_path: Path) -> Callable[..., BulkJob]:
    """Jobs over all of `pictures`, writing to the test's own folder."""

    def make(command: str = "caption", out: str = "rows.jsonl", **overrides: Any) -> BulkJob:
        table = command in ("ask", "locate")
        given = {"input": str(pictures / ("table.jsonl" if table else "pictures")), "model": str(checkpoint)}
        return BulkJob(command, out=str(tmp_path / out), **{**given, **overrides})

    return make


@pytest.fixture(scope="session")
def start() -> Iterator[Callable[..., Any]]:
    """Start a `bulk_process`."""
    with starting(PROCESS, ["lion_fast.inference.bulk"]) as begin:
        yield lambda job, **arguments: begin(job=asdict(job), **arguments)
