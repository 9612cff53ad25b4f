"""Taggers: their use by the processor, and the zero-shot tagger."""

import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    CLIPConfig,
    CLIPImageProcessorPil,
    CLIPModel,
    CLIPProcessor,
    PreTrainedTokenizerFast,
    SiglipConfig,
    SiglipImageProcessorPil,
    SiglipModel,
    SiglipProcessor,
)

from lion_fast import LionProcessor, ZeroShotTagger
from tests.lion_fast.tiny import make_tagger
from tests.rounding import between

PAGE = (Path(__file__).resolve().parents[3] / "docs" / "generation.md").read_text(encoding="utf-8")
TAGS = ["dog", "cart", "man", "tree", "street"]
WORDS = ["<pad>", "<end>", "<unknown>", "a", "photo", "of", ".", *TAGS]


def image(seed: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (20, 30, 3), dtype=np.uint8))


@pytest.fixture(scope="module")
def processor(converted: Path) -> LionProcessor:
    return LionProcessor.from_pretrained(converted)


def test_a_tagger_is_called_with_each_distinct_image_once(processor: LionProcessor, tmp_path: Path) -> None:
    image(1).save(tmp_path / "one.png")
    calls: list[int] = []

    def tagger(images: list[Image.Image]) -> list[str | list[str] | None]:
        calls.append(len(images))
        answers = {image(0).tobytes(): "dog, cart", image(1).tobytes(): ["man"], image(2).tobytes(): None}
        return [answers[one.tobytes()] for one in images]

    images = [image(0), tmp_path / "one.png", image(0), image(2), str(tmp_path / "one.png")]
    questions = [f"What is number {n}?" for n in range(5)]
    batch = processor(images, questions, tags=tagger)
    assert calls == [3]
    expected = processor(images, questions, tags=["dog, cart", "man", "dog, cart", None, "man"])
    assert torch.equal(batch.input_ids, expected.input_ids)
    assert torch.equal(processor(image(1), "Why?", tags=tagger).input_ids, processor(image(1), "Why?", "man").input_ids)


@pytest.mark.parametrize("answer", [["dog", "cat"], [], "d"])
def test_a_tagger_must_return_one_entry_per_image(processor: LionProcessor, answer: Sequence[str]) -> None:
    with pytest.raises(ValueError, match="tags: expected one entry from the tagger for each of 1 images, got"):
        processor(image(0), "Why?", tags=lambda _: answer)


def test_a_tagger_needs_images(processor: LionProcessor) -> None:
    with pytest.raises(ValueError, match="tags: expected no tagger without images, got one"):
        processor(None, "Why?", tags=lambda images: ["dog"] * len(images))


def test_the_processor_accepts_a_ram_tagger(processor: LionProcessor) -> None:
    tagger = make_tagger(TAGS, [0.5] * 5)
    images = [image(0), image(1)]
    tagger.tag_thresholds = between(tagger.logits(tagger.preprocess(images)).sigmoid()).tolist()
    tags = tagger(images)
    assert tags[0] != tags[1]
    batch = processor([*images, images[0]], ["Why?"] * 3, tags=tagger)
    expected = processor([*images, images[0]], ["Why?"] * 3, tags=[*tags, tags[0]])
    assert torch.equal(batch.input_ids, expected.input_ids)


def words() -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.WordLevel({word: index for index, word in enumerate(WORDS)}, unk_token="<unknown>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(single="$A <end>", special_tokens=[("<end>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<end>", unk_token="<unknown>", model_max_length=10
    )


def classifier(kind: str) -> tuple[CLIPModel | SiglipModel, CLIPProcessor | SiglipProcessor]:
    text = {
        "vocab_size": len(WORDS), "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2,
        "num_attention_heads": 2, "max_position_embeddings": 10,
        "eos_token_id": 1, "bos_token_id": 2, "pad_token_id": 0,
    }  # fmt: skip
    vision = {
        "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2,
        "image_size": 16, "patch_size": 8,
    }  # fmt: skip
    torch.manual_seed(0)
    if kind == "clip":
        model = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=8))
        size = {"size": {"shortest_edge": 16}, "crop_size": {"height": 16, "width": 16}}
        made = model, CLIPProcessor(CLIPImageProcessorPil(**size), words())
    else:
        model = SiglipModel(SiglipConfig(text_config=text, vision_config=vision))
        made = model, SiglipProcessor(SiglipImageProcessorPil(size={"height": 16, "width": 16}), words())
    with torch.no_grad():
        for parameter in model.parameters():  # so that images and tags differ
            parameter.add_(torch.randn_like(parameter) * 0.3)
    return made


@pytest.mark.parametrize("kind", ["clip", "siglip"])
def test_probabilities_equal_the_classifiers(kind: str) -> None:
    model, made = classifier(kind)
    model.eval()
    images = [image(seed) for seed in range(3)]
    texts = [f"a photo of a {tag}." for tag in TAGS]
    padding = "max_length" if kind == "siglip" else True
    with torch.no_grad():
        logits = model(**made(text=texts, images=images, padding=padding, return_tensors="pt")).logits_per_image
    expected = logits.softmax(-1) if kind == "clip" else logits.sigmoid()
    assert expected.std(0).min() > 1e-3  # it distinguishes the images
    tagger = ZeroShotTagger(model, made, TAGS)
    torch.testing.assert_close(tagger.probabilities(images), expected, rtol=1e-4, atol=1e-6)
    for threshold, max_tags in ((0.0, 2), (between(expected.flatten()).item(), 5)):
        tagger = ZeroShotTagger(model, made, TAGS, threshold=threshold, max_tags=max_tags)
        for tags, row in zip(tagger(images, batch_size=2), expected, strict=True):
            best = row.argsort(descending=True)[:max_tags].tolist()
            assert tags == ", ".join(tag for index, tag in enumerate(TAGS) if index in best and row[index] > threshold)


def test_tags_are_embedded_once_and_a_loaded_tagger_agrees(tmp_path: Path) -> None:
    model, made = classifier("clip")
    model.save_pretrained(tmp_path)
    made.save_pretrained(tmp_path)
    tagger = ZeroShotTagger.from_pretrained(tmp_path, TAGS, threshold=0.2, max_tags=3)
    texts: list[int] = []
    tagger.model.text_model.register_forward_hook(lambda _, __, out: texts.append(len(out.pooler_output)))
    images = [image(0), image(1), image(2)]
    first = tagger(images, batch_size=2)
    assert first == tagger(images, batch_size=1) == [tagger(one)[0] for one in images]
    assert texts.count(len(TAGS)) == 1
    assert set(texts) == {1, len(TAGS)}
    assert first == ZeroShotTagger(model, made, TAGS, threshold=0.2, max_tags=3)(images)


def test_the_docs_example_runs(processor: LionProcessor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for part in classifier("clip"):
        part.save_pretrained(tmp_path / "openai" / "clip-vit-base-patch32")
    monkeypatch.chdir(tmp_path)
    (code,) = (block for block in re.findall(r"```py\n(.*?)```", PAGE, flags=re.DOTALL) if "ZeroShotTagger" in block)
    names = {"processor": processor, "images": [image(0), image(1)], "questions": ["Why?"] * 3}
    exec(compile(code, "docs/generation.md", "exec"), names)
    assert names["batch"].input_ids.shape[0] == 2


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"tags": []}, "tags: expected a list of at least one tag"),
        ({"tags": "dog"}, "tags: expected a list"),
        ({"max_tags": 0}, "max_tags: expected 1 or more, got 0"),
        ({"template": "a photo"}, "template: expected {} for the tag"),
        ({"model": torch.nn.Linear(2, 2)}, "model: expected a model with a logit_scale, as CLIP has, got Linear"),
    ],
)
def test_invalid_settings_are_named(settings: dict, message: str) -> None:
    model, made = classifier("clip")
    with pytest.raises(ValueError, match=message):
        ZeroShotTagger(**{"model": model, "processor": made, "tags": TAGS, **settings})
