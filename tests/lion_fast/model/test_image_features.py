"""An image that is encoded once gives the same answers as an image that is encoded for each question."""

import pytest
import torch

from lion_fast import ImageFeatures
from tests.lion_fast.gradients import gradients_of
from tests.lion_fast.tiny import make_batch, make_model


@pytest.mark.parametrize("family", ["t5", "qwen3"])
@pytest.mark.parametrize("visual_input", ["ALL", "QFORMER", "AGGREGATOR"])
def test_encoded_images_are_bit_equal_to_pixels(visual_input: str, family: str) -> None:
    model, batch = make_model(family, visual_input=visual_input), make_batch(labels=True)
    rest = {name: value for name, value in batch.items() if name != "pixel_values"}
    expected = model(**batch)
    features = model.encode_images(batch["pixel_values"])
    assert len(features) == 3
    out = model(**rest, image_features=features)
    assert torch.equal(out.visual_prefix, expected.visual_prefix)
    assert torch.equal(out.logits, expected.logits)
    del rest["labels"], batch["labels"]
    for beams in (1, 5):
        search = {"num_beams": beams, "max_new_tokens": 4}
        tokens = model.generate(**batch, **search)
        assert torch.equal(model.generate(**rest, image_features=features, **search), tokens)
    features = model.encode_images(vision_features=model.get_vision_features(batch["pixel_values"]))
    assert torch.equal(model.get_visual_prefix(features, rest["qformer_input_ids"]), expected.visual_prefix)


def test_several_questions_about_an_image() -> None:
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


def test_gradients_reach_the_aggregator_through_encoded_images() -> None:
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


def test_exactly_one_image_input_is_accepted() -> None:
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
