"""`LionPipeline`: answers equal those of the processor and `generate` for every form of images and questions."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from PIL import Image

from lion_fast import LionAnswer, LionForCausalLM, LionPipeline, LionProcessor
from lion_fast.demo.answering import Answerer
from lion_fast.io.boxes import parse_boxes
from lion_fast.io.checkpoints import CheckpointError
from lion_fast.model.prompts import CAPTION_INSTRUCTION
from tests.lion_fast.tiny import make_answerer

IMAGES = [
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (40, 60 + seed, 3), dtype=np.uint8))
    for seed in range(5)
]
QUESTIONS = ["What is here?", "Where is the star?", "What is red?", "Is it large?", "What does the sign say?"]
TASKS = ["image_level", "region_level", "image_level", "region_level", "image_level"]
TAGS = [None, "star, red", ["red", "sign"], "", "sign"]


@pytest.fixture(scope="module")
def answerer() -> Answerer:
    return make_answerer()


@pytest.fixture
def pipe(answerer: Answerer) -> LionPipeline:
    return LionPipeline(answerer.model, answerer.processor)


def generated(pipe: LionPipeline, images: Any, text: Any, task: Any, tags: Any = None, **generation: Any) -> list[str]:
    """Generate the answers without the pipeline, in one batch."""
    batch = pipe.processor(images=images, text=text, task=task, tags=tags, return_tensors="pt")
    ids = pipe.model.generate(**batch, **generation)
    return [text.strip() for text in pipe.processor.batch_decode(ids, skip_special_tokens=True)]


def test_a_single_image_gives_a_single_answer(pipe: LionPipeline) -> None:
    answer = pipe(IMAGES[0], QUESTIONS[1], "region_level", ["star", "red"], num_beams=2, max_new_tokens=5)
    assert isinstance(answer, LionAnswer)
    expected = generated(pipe, IMAGES[0], QUESTIONS[1], "region_level", "star, red", num_beams=2, max_new_tokens=5)
    assert [answer.text] == expected
    assert answer.text


def test_a_list_is_answered_in_order(pipe: LionPipeline) -> None:
    expected = generated(pipe, IMAGES, QUESTIONS, TASKS, TAGS)
    assert len(set(expected)) > 1
    for batch_size in (1, 2, 5, 8):
        answers = pipe(IMAGES, QUESTIONS, TASKS, TAGS, batch_size=batch_size)
        assert isinstance(answers, list)
        assert [answer.text for answer in answers] == expected
    assert pipe([]) == []


def test_without_text_images_are_captioned(pipe: LionPipeline) -> None:
    captions = generated(pipe, IMAGES[:2], [CAPTION_INSTRUCTION] * 2, "image_level")
    assert [answer.text for answer in pipe(IMAGES[:2])] == captions
    assert pipe(IMAGES[0]).text == captions[0]


def test_one_string_holds_for_all_images(pipe: LionPipeline) -> None:
    answers = pipe(IMAGES[:3], "What is red?", "region_level", "red, sign")
    expected = generated(pipe, IMAGES[:3], ["What is red?"] * 3, "region_level", ["red, sign"] * 3)
    assert [answer.text for answer in answers] == expected


def test_an_iterator_is_read_batch_by_batch(pipe: LionPipeline) -> None:
    read = []

    def images() -> Iterator[Image.Image]:
        for number in range(5):
            read.append(number)
            yield IMAGES[number]

    answers = pipe(images(), iter(QUESTIONS), iter(TASKS), batch_size=2)
    assert not isinstance(answers, list)
    assert read == []
    first = next(iter(answers))
    assert read == [0, 1]
    expected = generated(pipe, IMAGES, QUESTIONS, TASKS)
    assert [first.text, *(answer.text for answer in answers)] == expected


def test_images_can_be_anything_that_load_image_reads(pipe: LionPipeline, tmp_path: Path) -> None:
    path = tmp_path / "image.png"
    IMAGES[0].save(path)
    pixels = np.asarray(IMAGES[0])
    forms = [path, str(path), path.read_bytes(), pixels, torch.from_numpy(pixels.copy()).movedim(-1, 0)]
    answers = [pipe(form) for form in forms]
    assert answers == [pipe(IMAGES[0])] * len(forms)
    assert pipe(forms) == answers


def test_boxes_are_in_pixels_of_each_image(pipe: LionPipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    """The model answers every question with a box."""
    texts = ["[0.100,0.200,0.500,1.000]", "a star"]
    ids = pipe.processor.tokenizer(texts, padding=True, return_tensors="pt").input_ids
    monkeypatch.setattr(LionForCausalLM, "generate", lambda self, **inputs: ids)
    wide, tall = Image.new("RGB", (200, 50)), Image.new("RGB", (10, 30))
    located, described = pipe([wide, tall], "Where?", "region_level")
    assert located == LionAnswer(texts[0], parse_boxes(texts[0], (200, 50)))
    np.testing.assert_allclose(located.boxes, [[20, 10, 100, 50]])
    assert described == LionAnswer("a star", [])


def test_a_tagger_is_called_once_per_batch(pipe: LionPipeline) -> None:
    seen = []

    def tagger(images: list[Image.Image]) -> list[str]:
        seen.append(len(images))
        return ["red, sign"] * len(images)

    answers = pipe(IMAGES[:3], "What is red?", tags=tagger, batch_size=2)
    assert seen == [2, 1]
    assert answers == pipe(IMAGES[:3], "What is red?", tags="red, sign")
    assert pipe(IMAGES[0], "What is red?", tags=tagger) == answers[0]


def test_a_directory_is_loaded_with_the_arguments(answerer: Answerer, pipe: LionPipeline, tmp_path: Path) -> None:
    answerer.model.save_pretrained(tmp_path)
    answerer.processor.save_pretrained(tmp_path)
    loaded = LionPipeline(tmp_path, device="cpu")
    assert loaded.model.dtype == torch.float32
    assert not loaded.model.training
    assert loaded(IMAGES, QUESTIONS, TASKS) == pipe(IMAGES, QUESTIONS, TASKS)
    other = LionPipeline(str(tmp_path), device=torch.device("cpu"), dtype=torch.bfloat16, kernel_backend="torch")
    assert other.model.dtype == torch.bfloat16
    assert other.model.config.kernel_backend == "torch"
    assert other(IMAGES[0]).text is not None
    (tmp_path / "model.safetensors").write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"model\.safetensors: not a readable safetensors file"):
        LionPipeline(tmp_path)


def test_a_loaded_model_is_set_to_evaluation_mode(answerer: Answerer) -> None:
    answerer.model.train()
    assert not LionPipeline(answerer.model, answerer.processor).model.training


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"model": "absent"}, "model: expected a checkpoint's directory, got absent"),
        ({"model": ".", "kernel_backend": "cuda"}, "kernel_backend: expected one of auto, triton, torch, got 'cuda'"),
        ({"model": ".", "processor": object()}, "processor: expected None with a directory"),
        ({}, "processor: expected the LionProcessor of the loaded model, got None"),
        ({"device": "cpu"}, "device: expected None for a loaded model, got 'cpu'"),
        ({"dtype": torch.float32}, "dtype: expected None"),
        ({"kernel_backend": "torch"}, "kernel_backend: expected None"),
    ],
)
def test_invalid_models_are_rejected(answerer: Answerer, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LionPipeline(**{"model": answerer.model, **arguments})


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"images": "absent.png"}, FileNotFoundError, r"images \(absent.png\): expected an image file"),
        ({"images": [*IMAGES, "absent.png"]}, FileNotFoundError, r"images\[5\] \(absent.png\): expected an image"),
        ({"images": 5}, TypeError, "images: expected a PIL image, a path"),
        ({"text": QUESTIONS[:2]}, ValueError, r"text: expected one per image \(5\), got 2"),
        ({"text": 3}, TypeError, "text: expected a string or one per image, got int"),
        ({"text": iter(QUESTIONS[:2])}, ValueError, "text: expected one per image, got 2 for more images"),
        ({"text": iter([*QUESTIONS, "?"])}, ValueError, r"text: expected one per image \(5\), got more"),
        ({"task": "box_level"}, ValueError, "task: expected 'region_level' or 'image_level', got 'box_level'"),
        ({"task": TASKS[:4]}, ValueError, r"task: expected one per image \(5\), got 4"),
        ({"tags": ["red", "sign"]}, ValueError, r"tags: expected one per image \(5\), got 2"),
        ({"text": " "}, ValueError, r"text\[0\]: expected a question or an instruction, got ' '"),
        ({"batch_size": 0}, ValueError, "batch_size: expected 1 or more, got 0"),
        ({"num_beams": 2, "num_return_sequences": 2}, ValueError, "num_return_sequences: expected 1, got 10 answers"),
        ({"return_dict_in_generate": True}, ValueError, "return_dict_in_generate: expected False"),
    ],
)
def test_errors_name_the_argument(
    pipe: LionPipeline, arguments: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        pipe(**{"images": IMAGES, **arguments})


def test_an_error_in_a_later_batch_names_its_first_image(pipe: LionPipeline) -> None:
    with pytest.raises(ValueError, match=r"text\[1\]: expected a question") as caught:
        pipe(IMAGES, [*QUESTIONS[:3], " ", "?"], batch_size=2)
    assert caught.value.__notes__ == ["in the batch that starts with images[2]"]


def test_a_directory_needs_a_lion_processor(answerer: Answerer, tmp_path: Path) -> None:
    answerer.model.save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match="not a directory with LION's processor"):
        LionPipeline(tmp_path)
    answerer.processor.save_pretrained(tmp_path)
    assert isinstance(LionPipeline(tmp_path).processor, LionProcessor)


def test_transformers_pipeline_gives_the_same_answers(pipe: LionPipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    """Inputs are single, in lists and from a generator in batches, with task and tags and the checkpoint's settings."""
    monkeypatch.setattr(pipe.model.generation_config, "num_beams", 3)
    theirs: Any = transformers.pipeline("image-text-to-text", model=pipe.model, processor=pipe.processor)

    def texts(records: list[Any]) -> list[str]:
        assert all(record["input_text"] in QUESTIONS for record in records)
        return [record["generated_text"].strip() for record in records]

    for task in ("image_level", "region_level"):
        expected = [answer.text for answer in pipe(IMAGES, QUESTIONS, task, "red, star", num_beams=1)]
        given = {"task": task, "tags": ["red, star"] * 5, "return_full_text": False}
        assert texts(theirs(IMAGES, text=QUESTIONS, generate_kwargs={"num_beams": 1}, **given)) == expected
    samples = ({"images": image, "text": text} for image, text in zip(IMAGES, QUESTIONS, strict=True))
    records = list(theirs(samples, batch_size=2, return_full_text=False))
    assert [texts(record)[0] for record in records] == [answer.text for answer in pipe(IMAGES, QUESTIONS)]
    (record,) = theirs(IMAGES[0], text=QUESTIONS[0])
    assert record["generated_text"].removeprefix(QUESTIONS[0]).strip() == pipe(IMAGES[0], QUESTIONS[0]).text
    chats = [
        [{"role": "user", "content": [{"type": "image", "image": image}, {"type": "text", "text": text}]}]
        for image, text in zip(IMAGES, QUESTIONS, strict=True)
    ]
    assert [
        record["generated_text"].strip()
        for (record,) in theirs(text=chats, task="region_level", batch_size=2, return_full_text=False)
    ] == [answer.text for answer in pipe(IMAGES, QUESTIONS, "region_level")]
    (record,) = theirs(text=chats[0])
    answered = {"role": "assistant", "content": pipe(IMAGES[0], QUESTIONS[0]).text}
    assert record["generated_text"] == [*chats[0], answered]
    with pytest.raises(ValueError, match="pixel_values: expected either pixel_values"):
        theirs(text=[{"role": "user", "content": [{"type": "text", "text": "What?"}]}])
