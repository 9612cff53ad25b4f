"""An image that is encoded once gives the same answers as an image that is encoded for each question."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from lion_fast import ImageFeatures, LionForCausalLM, LionProcessor
from tests.golden.computing import until_end
from tests.lion_fast.gradients import gradients_of

Make = Callable[..., LionForCausalLM]
MakeBatch = Callable[..., dict[str, Tensor]]
TASKS = ("region_level", "image_level")


@pytest.mark.parametrize("family", ["t5", "qwen3"])
@pytest.mark.parametrize("visual_input", ["ALL", "QFORMER", "AGGREGATOR"])
def test_encoded_images_are_bit_equal_to_pixels(
    make_model: Make, make_batch: MakeBatch, visual_input: str, family: str
) -> None:
    model, batch = make_model(family, visual_input=visual_input), make_batch(labels=True)
    rest = {name: value for name, value in batch.items() if name != "pixel_values"}
    expected = model(**batch)
    features = model.encode_images(batch["pixel_values"])
    assert len(features) == 3
    out = model(**rest, image_features=features)
    assert torch.equal(out.visual_prefix, expected.visual_prefix)
    assert torch.equal(out.logits, expected.logits)
    del rest["labels"], batch["labels"]
    assert torch.equal(
        model.generate(**rest, image_features=features, max_new_tokens=4), model.generate(**batch, max_new_tokens=4)
    )
    vision = model.get_vision_features(batch["pixel_values"])
    assert torch.equal(model.get_visual_prefix(model.encode_images(vision_features=vision), rest["qformer_input_ids"]),
                       expected.visual_prefix)  # fmt: skip


def test_several_questions_about_an_image(make_model: Make, make_batch: MakeBatch) -> None:
    """Vision tower and aggregator run once for two images, however many questions are asked."""
    model, batch = make_model(), make_batch(batch=5, labels=True)
    pixels, rest = batch["pixel_values"][:2], {n: v for n, v in batch.items() if n not in ("pixel_values", "labels")}
    indices = [0, 0, 1, 0, 1]
    expected = model.generate(pixel_values=pixels[indices], **rest, max_new_tokens=5)
    calls = []
    for part in (model.vision_model, model.aggregator):
        part.register_forward_hook(lambda module, *_: calls.append(type(module).__name__))
    features = model.encode_images(pixels)
    assert torch.equal(model.generate(image_features=features[indices], **rest, max_new_tokens=5), expected)
    for question, index in enumerate(indices):
        one = {name: value[question : question + 1] for name, value in rest.items()}
        prefix = model.get_visual_prefix(model.encode_images(pixels[index : index + 1]), one["qformer_input_ids"])
        calls.clear()
        out = model(image_features=features[index], **one, labels=batch["labels"][question : question + 1])
        torch.testing.assert_close(out.visual_prefix, prefix)
        assert calls == []


def test_gradients_reach_the_aggregator_through_encoded_images(make_model: Make, make_batch: MakeBatch) -> None:
    model, batch = make_model(), make_batch(labels=True)
    _, expected = gradients_of(model, {**batch, "pixel_values": batch["pixel_values"][[0, 0, 1]]})
    model.zero_grad()
    pixels = batch.pop("pixel_values")[:2]
    model(image_features=model.encode_images(pixels)[[0, 0, 1]], **batch).loss.backward()
    for name, gradient in expected.items():
        torch.testing.assert_close(model.get_parameter(name).grad, gradient, rtol=1e-4, atol=1e-6, msg=name)


def test_features_are_indexed_repeated_and_moved() -> None:
    features = ImageFeatures(torch.randn(3, 2, 4), torch.randn(3, 2, 5))
    for index, expected in (
        (1, [1]),
        (-1, [2]),
        (slice(1, None), [1, 2]),
        ([0, 0, 2], [0, 0, 2]),
        (torch.tensor([2, 0]), [2, 0]),
        (torch.tensor([True, False, True]), [0, 2]),
    ):
        selected = features[index]
        assert len(selected) == len(expected)
        assert torch.equal(selected.qformer_context, features.qformer_context[expected])
        assert torch.equal(selected.aggregated, features.aggregated[expected])
    assert torch.equal(features.repeat_interleave(2).aggregated, features[[0, 0, 1, 1, 2, 2]].aggregated)
    repeats = torch.tensor([2, 0, 1])
    assert torch.equal(features.repeat_interleave(repeats).aggregated, features[[0, 0, 2]].aggregated)
    assert [len(one) for one in features] == [1, 1, 1]
    with pytest.raises(IndexError):
        features[3]
    moved = features.to("meta", torch.bfloat16)
    assert (moved.aggregated.device.type, moved.qformer_context.dtype) == ("meta", torch.bfloat16)
    without = ImageFeatures(None, features.aggregated)[[0, 1]]
    assert without.qformer_context is None
    assert len(without) == 2


def test_exactly_one_image_input_is_accepted(make_model: Make, make_batch: MakeBatch) -> None:
    model, batch = make_model(), make_batch(labels=True)
    features = model.encode_images(batch["pixel_values"])
    with pytest.raises(ValueError, match=r"pixel_values: expected either .*, got pixel_values and image_features"):
        model(**batch, image_features=features)
    with pytest.raises(ValueError, match=r"pixel_values: expected either .*, got both"):
        model.encode_images(batch["pixel_values"], model.get_vision_features(batch["pixel_values"]))
    with pytest.raises(ValueError, match=r"pixel_values: expected either .*, got neither"):
        model.encode_images()
    with pytest.raises(ValueError, match=r"vision_features: expected \[B, 3, N, 16\], got \[3, 2, 5, 16\]"):
        model.encode_images(vision_features=torch.zeros(3, 2, 5, 16))
    del batch["pixel_values"]
    with pytest.raises(ValueError, match=r"input_ids: expected \[2, L\], got \[3, 7\]"):
        model(**batch, image_features=features[:2])


@pytest.fixture(scope="module")
def model(converted: Path) -> LionForCausalLM:
    return LionForCausalLM.from_pretrained(converted).eval()


def test_golden_tokens_of_images_encoded_once(model: LionForCausalLM, golden, golden_batch: Callable) -> None:
    """Both tasks, with one and five beams, and a batch that mixes both use the same features."""
    batches = {task: golden_batch(task) for task in TASKS}
    features = model.encode_images(batches["image_level"]["pixel_values"])
    for batch in batches.values():
        del batch["pixel_values"], batch["labels"]
    for task, batch in batches.items():
        for beams in (1, 5):
            ids = model.generate(
                **batch, image_features=features, num_beams=beams, repetition_penalty=1.5, max_new_tokens=20
            )
            expected = golden.expected[f"{task}.generate.beams{beams}.rp1.5"]
            assert until_end(ids) == until_end(expected)
    mixed = {name: torch.cat([batch[name] for batch in batches.values()]) for name in batches["image_level"]}
    ids = model.generate(**mixed, image_features=features[[0, 1, 2, 3] * 2], max_new_tokens=20)
    expected = torch.cat([golden.expected[f"{task}.generate.beams5.rp1.5"] for task in TASKS])
    assert until_end(ids) == until_end(expected)


def test_golden_questions_about_one_image(
    model: LionForCausalLM, converted: Path, golden, golden_batch: Callable
) -> None:
    """An image encoded once gives the same tokens for all four questions as four copies of its pixels."""
    batch = golden_batch("image_level")
    pixels = batch.pop("pixel_values")[:1]
    del batch["labels"]
    expected = model.generate(pixel_values=pixels.expand(4, -1, -1, -1), **batch, max_new_tokens=20)
    features = model.encode_images(pixels).repeat_interleave(4)
    questions = LionProcessor.from_pretrained(converted)(
        images=None, text=golden.meta["questions"], tags=golden.meta["tags"], task="image_level"
    )
    assert "pixel_values" not in questions
    assert torch.equal(model.generate(image_features=features, **questions, max_new_tokens=20), expected)
