"""Behind the page: answers equal those of `generate`, and the insight shows the model's real attention and gates."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from lion_fast.data.templates import TEMPLATES
from lion_fast.demo.answering import (
    MAX_TAGS,
    MAX_TEXT,
    Answerer,
    automatic_task,
    instruction_for,
    tidy_tags,
)
from lion_fast.demo.figures import for_display, gate_chart, heat_map
from lion_fast.demo.insight import adapter_gates, look_inside
from lion_fast.io.checkpoints import CheckpointError
from lion_fast.model import attention
from lion_fast.model.prompts import CAPTION_INSTRUCTION, LOCATE_INSTRUCTION
from tests.lion_fast.tiny import make_answerer, make_model, make_tagger

PICTURE = Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 60, 3), dtype=np.uint8))
BOX = "[0.100,0.200,0.300,0.400]"


@pytest.mark.parametrize("kind", TEMPLATES)
def test_the_automatic_task_is_correct_for_every_training_instruction(kind: str) -> None:
    task = "image_level" if kind == "caption" else "region_level"
    for template in TEMPLATES[kind]:
        assert automatic_task(template.format(expression="the red sign", box=BOX)) == task, template


@pytest.mark.parametrize(
    "question", ["What color is the star?", "Where was this photo taken?", "Which box is open?", "Is [this] a sign?"]
)
def test_plain_questions_are_image_level(question: str) -> None:
    assert automatic_task(question) == "image_level"


def test_instructions_of_requests() -> None:
    assert instruction_for("caption", "ignored") == CAPTION_INSTRUCTION
    assert instruction_for("answer", " Why {x}? ") == "Why {x}?"
    assert instruction_for("place", "the {dog}") == LOCATE_INSTRUCTION.replace("{expression}", "the {dog}")


@pytest.mark.parametrize(
    ("want", "text", "message"),
    [
        ("answer", " ", "Write a question first"),
        ("place", "", "Write what to find first"),
        ("answer", "x" * (MAX_TEXT + 1), f"{MAX_TEXT + 1} characters; at most {MAX_TEXT}"),
        ("poem", "x", "want: expected one of caption, answer, place, got 'poem'"),
    ],
)
def test_invalid_requests_are_rejected(want: str, text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        instruction_for(want, text)


def test_tags_are_tidied() -> None:
    assert tidy_tags(" dog,, cart\nman , ") == "dog, cart, man"
    assert tidy_tags(" ,\n") == ""
    with pytest.raises(ValueError, match="at most"):
        tidy_tags("x" * (MAX_TAGS + 1))


@pytest.mark.parametrize("text", ["t5", "llama"])
@pytest.mark.parametrize("task", [None, "image_level", "region_level"])
def test_an_answer_equals_that_of_generate(text: str, task: str | None) -> None:
    answerer = make_answerer(text)
    answer = answerer.answer(PICTURE, "place", "the star", "star,red", task)
    assert answer.task == (task or "region_level")
    asked = LOCATE_INSTRUCTION.format(expression="the star")
    batch = answerer.processor(images=PICTURE, text=asked, tags="star, red", task=answer.task, return_tensors="pt")
    ids = answerer.model.generate(**batch)
    assert answer.text == answerer.processor.batch_decode(ids, skip_special_tokens=True)[0].strip()


def test_calls_from_threads_give_the_same_answers() -> None:
    answerer = make_answerer()
    questions = [f"What is {word}?" for word in ("here", "red", "the star", "left")]
    alone = [answerer.answer(PICTURE, "answer", question) for question in questions]
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(lambda question: answerer.answer(PICTURE, "answer", question), questions))
    for a, b in zip(alone, together, strict=True):
        assert a.text == b.text
        assert a.insight.shares == pytest.approx(b.insight.shares)
    assert alone[0].insight.shares != pytest.approx(alone[1].insight.shares)


def test_the_tags_of_the_tagger_are_returned_unchanged() -> None:
    answerer = make_answerer()
    assert answerer.tags_of(PICTURE) == ""
    seen = []
    answerer.tagger = lambda images: seen.extend(images) or ["dog, cart"]  # type: ignore[assignment]
    assert answerer.tags_of(PICTURE) == "dog, cart"
    assert seen == [PICTURE]


def test_a_checkpoint_is_loaded_with_its_tagger(tmp_path: Path) -> None:
    answerer = make_answerer()
    answerer.model.save_pretrained(tmp_path)
    answerer.processor.save_pretrained(tmp_path)
    assert Answerer.from_pretrained(tmp_path, torch.device("cpu")).tagger is None
    make_tagger(["red", "sign", "star"], [0.0, 1.0, 0.0]).save_pretrained(tmp_path / "ram")
    loaded = Answerer.from_pretrained(tmp_path, torch.device("cpu"))
    assert loaded.tags_of(PICTURE) == "red, star"
    assert loaded.answer(PICTURE, "caption").text == answerer.answer(PICTURE, "caption").text
    (tmp_path / "ram" / "model.safetensors").write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"ram/model\.safetensors: not a readable safetensors file"):
        Answerer.from_pretrained(tmp_path, torch.device("cpu"))


def inside(answerer: Answerer):
    """Return the batch, the answer and the insight of one question."""
    model = answerer.model
    batch = dict(answerer.processor(images=PICTURE, text="What is here?", tags="red", task="image_level"))
    batch["vision_features"] = model.get_vision_features(batch.pop("pixel_values")).detach()
    ids = model.generate(**batch)
    return batch, ids, look_inside(model, batch, ids)


def test_shares_and_map_equal_the_cross_attention_of_transformers() -> None:
    answerer = make_answerer()
    batch, ids, insight = inside(answerer)
    for stack in (answerer.model.language_model.encoder, answerer.model.language_model.decoder):
        stack.set_attn_implementation("eager")  # transformers 5.17 does not pass the setting of the whole model on
    answerer.model.config.text_config._attn_implementation = "eager"
    outputs = answerer.model(**batch, decoder_input_ids=ids[:, :-1], output_attentions=True)
    weights = torch.stack(outputs.language_model_outputs.cross_attentions).mean((0, 1, 2, 3)).detach()
    queries, patches = answerer.model.config.num_query_tokens, 5
    parts = weights.split([queries, patches, len(weights) - queries - patches])
    assert list(insight.shares.values()) == pytest.approx([float(part.sum()) for part in parts], rel=1e-5)
    assert sum(insight.shares.values()) == pytest.approx(1)
    expected = (parts[1] / parts[1].sum()).numpy()
    np.testing.assert_allclose(insight.maps[0].patches.ravel(), expected[1:], rtol=1e-5)
    assert insight.maps[0].class_token == pytest.approx(float(expected[0]), rel=1e-5)


def test_maps_equal_the_attention_of_the_aggregator(monkeypatch: pytest.MonkeyPatch) -> None:
    answerer = make_answerer()
    answerer.model.aggregator.set_attn_implementation("eager")
    used = {}
    eager = attention._eager

    def spy(module, *args, **kwargs):
        out, weights = eager(module, *args, **kwargs)
        used[module] = weights.detach().mean((0, 1, 2)).numpy()
        return out, weights

    monkeypatch.setattr(attention, "_eager", spy)
    *_, insight = inside(answerer)
    blocks = answerer.model.aggregator.blocks
    expected = [used[blocks[0].attention.self], *(used[block.crossattention.self] for block in blocks)]
    for shown, weights in zip(insight.maps[-3:], expected, strict=True):
        np.testing.assert_allclose(shown.patches.ravel(), weights[1:], rtol=1e-5)
        assert shown.class_token == pytest.approx(float(weights[0]), rel=1e-5)


@pytest.mark.parametrize(
    ("text", "visual_input", "parts", "readers"),
    [
        ("t5", "ALL", 3, ["answer", "Q-Former", "aggregator", "aggregator", "aggregator"]),
        ("t5", "QFORMER", 2, ["Q-Former"]),
        ("t5", "AGGREGATOR", 2, ["answer", "aggregator", "aggregator", "aggregator"]),
        ("qwen3", "ALL", 0, ["Q-Former", "aggregator", "aggregator", "aggregator"]),
    ],
)
def test_every_kind_of_model_has_its_insight(text: str, visual_input: str, parts: int, readers: list[str]) -> None:
    answerer = make_answerer(text, visual_input=visual_input)
    *_, insight = inside(answerer)
    assert len(insight.shares) == parts
    assert [shown.reader.split(",")[0] for shown in insight.maps] == readers
    for shown in insight.maps:
        assert shown.patches.shape == (2, 2)
        assert shown.patches.sum() + shown.class_token == pytest.approx(1, abs=1e-5)
    assert not any(module._forward_hooks for module in answerer.model.modules())


def test_hooks_are_removed_when_the_model_fails() -> None:
    answerer = make_answerer()
    batch, ids, _ = inside(answerer)
    with pytest.raises(ValueError, match="task_ids"):
        look_inside(answerer.model, {**batch, "task_ids": torch.tensor([7])}, ids)
    assert not any(module._forward_hooks for module in answerer.model.modules())


def test_gates_are_routers_times_scales() -> None:
    model = make_model()
    gates = adapter_gates(model)
    assert gates.layers == ("encoder 0", "encoder 1", "decoder 0", "decoder 1")
    assert gates.adapters == ("region adapter", "image adapter")
    for values in (gates.mean, gates.low, gates.high):
        np.testing.assert_array_equal(values, np.broadcast_to(np.eye(2), (4, 2, 2)))
    mixture = model.language_model.decoder.block[0].layer[-1].adapter
    with torch.no_grad():
        mixture.router_ratio2[0] = torch.linspace(0, 1, 32)  # router of the image adapter for region_level
        mixture.adapters[1].scale.fill_(3)
    gates = adapter_gates(model)
    assert [float(v[2, 0, 1]) for v in (gates.low, gates.mean, gates.high)] == pytest.approx([0.3, 1.5, 2.7])
    assert gates.mean[2, 1, 1] == 3
    assert gates.mean[2, 0, 0] == 1


def test_without_a_router_the_gate_is_the_scale() -> None:
    gates = adapter_gates(make_model("llama", num_adapters=1))
    assert gates.layers == ("0", "1")
    assert gates.mean.tolist() == [[[1.0], [1.0]]] * 2


def test_a_heat_map_is_bright_where_the_weights_are() -> None:
    patches = np.array([[0.0, 0.9], [0.1, 0.0]])
    drawn = heat_map(PICTURE, patches).convert("L")
    width, height = drawn.size
    assert width / height == pytest.approx(60 / 40)
    quarters = np.asarray(drawn).reshape(2, height // 2, 2, width // 2).mean((1, 3))
    assert quarters.ravel().argmax() == 1
    assert quarters[1, 0] > quarters[0, 0]


def test_a_chart_names_the_task_and_all_adapters() -> None:
    chart = gate_chart(adapter_gates(make_model()), "region_level")
    for words in ("gate for region_level", "region adapter", "image adapter"):
        assert f"<!-- {words} -->" in chart  # matplotlib's comment before the glyphs


def test_images_are_scaled_for_screens() -> None:
    for size, shown, scale in (((96, 48), (480, 240), 5), ((600, 500), (600, 500), 1), ((5120, 10), (1280, 2), 0.25)):
        image, factor = for_display(Image.new("RGB", size))
        assert (image.size, factor) == (shown, scale)
