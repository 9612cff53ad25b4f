"""Tags from a zero-shot image classifier of transformers (CLIP, SigLIP and the like), in RAM's place.

Tags are embedded once. A picture's probabilities are the classifier's own: of each tag by itself for SigLIP, which was
trained so, and over all tags together for CLIP. How good the tags are depends on the classifier and the list.
"""

import os
from collections.abc import Sequence
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from transformers import AutoModelForZeroShotImageClassification, AutoProcessor

from lion_fast.io.images import ImageLike, load_batches

_TEXTS_AT_ONCE = 256


class ZeroShotTagger:
    """Tags pictures from a list of tags; calling it gives one string per picture, as `RamTagger` does.

    Example:
        >>> tagger = ZeroShotTagger.from_pretrained("google/siglip-base-patch16-224", tags=["dog", "cart", "man"])
        >>> tagger(["street.jpg"])
        ["dog, man"]

    Args:
        model: a classifier with `image_embeds`, `text_embeds` and a logit scale, as `CLIPModel` and `SiglipModel`.
        processor: the classifier's.
        tags: what a picture may show.
        threshold: probability, 0 to 1, above which a tag is given.
        max_tags: of those above it, how many at most; the most probable ones.
        template: the sentence about a tag that the classifier reads.

    Raises:
        ValueError: a model of another kind, no tags, `max_tags` below 1, or a template without `{}`.
    """

    def __init__(
        self,
        model: Any,
        processor: Any,
        tags: Sequence[str],
        threshold: float = 0.1,
        max_tags: int = 10,
        template: str = "a photo of a {}.",
    ):
        if not hasattr(model, "logit_scale"):
            raise ValueError(f"model: expected one with a logit_scale, as CLIP and SigLIP, got {type(model).__name__}")
        if isinstance(tags, str) or len(tags) == 0:
            raise ValueError(f"tags: expected a list of one tag or more, got {tags!r}")
        if max_tags < 1:
            raise ValueError(f"max_tags: expected 1 or more, got {max_tags}")
        if template.format("") == template:
            raise ValueError(f"template: expected {{}} in the place of the tag, got {template!r}")
        self.model = model.eval()
        self.processor = processor
        self.tags = list(tags)
        self.threshold = threshold
        self.max_tags = max_tags
        self._sentences = [template.format(tag) for tag in self.tags]
        self._text_embeds: Tensor | None = None

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | os.PathLike,
        tags: Sequence[str],
        *,
        threshold: float = 0.1,
        max_tags: int = 10,
        template: str = "a photo of a {}.",
        **model_settings: Any,
    ) -> "ZeroShotTagger":
        """With transformers' classifier and processor at that path.

        Args:
            tags, threshold, max_tags, template: see the class.
            model_settings: handed to the classifier's `from_pretrained` (`dtype`, `device_map`, ...).
        """
        model = AutoModelForZeroShotImageClassification.from_pretrained(pretrained_model_name_or_path, **model_settings)
        processor = AutoProcessor.from_pretrained(pretrained_model_name_or_path)
        return cls(model, processor, tags, threshold=threshold, max_tags=max_tags, template=template)

    def __call__(self, images: ImageLike | Sequence[ImageLike], batch_size: int = 8) -> list[str]:
        """Tags of each picture, in the list's order and joined by ", ".

        Args:
            images: one picture or a sequence of them: paths, PIL images, or what else `load_image` takes.
            batch_size: pictures that go through the classifier together.

        Raises:
            FileNotFoundError, ValueError, TypeError: as `load_image`; ValueError also for a `batch_size` below 1.
        """
        strings = []
        for pictures in load_batches(images, batch_size):
            best = self.probabilities(pictures).topk(min(self.max_tags, len(self.tags)))
            for values, places in zip(best.values.tolist(), best.indices.tolist(), strict=True):
                shown = [place for value, place in zip(values, places, strict=True) if value > self.threshold]
                strings.append(", ".join(self.tags[place] for place in sorted(shown)))
        return strings

    @torch.no_grad()
    def probabilities(self, pictures: list[Image.Image]) -> Tensor:
        """Of every tag for each of B pictures: float32 [B, number of tags] on the CPU."""
        if self._text_embeds is None:
            blank = Image.new("RGB", (64, 64))
            starts = range(0, len(self.tags), _TEXTS_AT_ONCE)
            texts = [self._sentences[start : start + _TEXTS_AT_ONCE] for start in starts]
            self._text_embeds = torch.cat([self._run(some, [blank]).text_embeds for some in texts])
        # The models' forward wants a text with the pictures, and normalises the embeddings of both.
        image_embeds = self._run(self._sentences[:1], pictures).image_embeds
        logits = image_embeds @ self._text_embeds.to(image_embeds.device).T * self.model.logit_scale.exp()
        bias = getattr(self.model, "logit_bias", None)
        return (logits.softmax(-1) if bias is None else (logits + bias).sigmoid()).float().cpu()

    def _run(self, texts: list[str], pictures: list[Image.Image]) -> Any:
        # SigLIP has seen no other padding.
        padding = "max_length" if self.model.config.model_type.startswith("siglip") else True
        batch = self.processor(text=texts, images=pictures, padding=padding, truncation=True, return_tensors="pt")
        return self.model(**batch.to(self.model.device, self.model.dtype))
