"""A tagger around a zero-shot image classifier of transformers (CLIP, SigLIP and others), as a replacement for RAM.

Tags are embedded once. The probabilities are the classifier's own: independent for each tag with SigLIP, as it was
trained, and a softmax over all tags with CLIP. The quality of the tags depends on the classifier and the list.
"""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from transformers import AutoModelForZeroShotImageClassification, AutoProcessor

from lion_fast.io.checkpoints import naming
from lion_fast.io.images import ImageLike, load_batches
from lion_fast.io.reading import shown
from lion_fast.io.untrusted import expect_data_only
from lion_fast.model.validation import expect_integer, expect_number

_TEXTS_AT_ONCE = 256


class ZeroShotTagger:
    """Tags images from a list of tags; calling it returns one string per image, as `RamTagger` does.

    Example:
        >>> tagger = ZeroShotTagger.from_pretrained("google/siglip-base-patch16-224", tags=["dog", "cart", "man"])
        >>> tagger(["street.jpg"])
        ["dog, man"]

    Args:
        model: a classifier with `image_embeds`, `text_embeds` and a logit scale, such as `CLIPModel` or `SiglipModel`.
        processor: processor of the classifier.
        tags: candidate tags.
        threshold: probability, 0 to 1, above which a tag is returned.
        max_tags: maximum number of tags per image; the most probable are kept.
        template: sentence that the classifier reads, with `{}` for the tag.

    Raises:
        ValueError: `model` has no logit scale, `tags` is empty, `max_tags` is below 1, `threshold` is out of range, or
            `template` has no `{}`.
        TypeError: an argument has the wrong type.
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
            raise ValueError(f"model: expected a model with a logit_scale, as CLIP has, got {type(model).__name__}")
        if isinstance(tags, str) or not isinstance(tags, Sequence) or len(tags) == 0:
            raise ValueError(f"tags: expected a list of at least one tag, got {shown(tags)}")
        for index, tag in enumerate(tags):
            if not isinstance(tag, str):
                raise TypeError(f"tags[{index}]: expected a string, got {shown(tag)}")
        expect_integer("max_tags", max_tags, 1)
        expect_number("threshold", threshold, 0, 1)
        if not isinstance(template, str) or "{}" not in template:
            raise ValueError(f"template: expected {{}} for the tag, got {shown(template)}")
        if not callable(processor):
            raise TypeError(f"processor: expected the classifier's processor, got {shown(processor)}")
        self.model = model.eval()
        self.processor = processor
        self.tags = list(tags)
        self.threshold = threshold
        self.max_tags = max_tags
        self._sentences = [template.replace("{}", tag) for tag in self.tags]
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
        """Load a classifier of transformers and its processor.

        Args:
            pretrained_model_name_or_path: directory or Hub name of the classifier.
            tags, threshold, max_tags, template: see the class.
            model_settings: passed to the classifier's `from_pretrained` (`dtype`, `device_map`, ...).

        Raises:
            CheckpointError: a directory asks for code or cannot be loaded.
            ValueError: `trust_remote_code` is set. Load such a classifier yourself and pass it to `ZeroShotTagger`.
        """
        if model_settings.pop("trust_remote_code", False):
            raise ValueError(
                "trust_remote_code: expected False, got True; load a classifier that needs it yourself, and pass it to "
                "ZeroShotTagger"
            )
        name = str(pretrained_model_name_or_path)
        if Path(name).is_dir():
            expect_data_only(Path(name))
        with naming(name, "a zero-shot classifier that can be loaded"):
            model = AutoModelForZeroShotImageClassification.from_pretrained(
                name, trust_remote_code=False, **model_settings
            )
            processor = AutoProcessor.from_pretrained(name, trust_remote_code=False)
        return cls(model, processor, tags, threshold=threshold, max_tags=max_tags, template=template)

    def __call__(self, images: ImageLike | Sequence[ImageLike], batch_size: int = 8) -> list[str]:
        """Return the tags of each image, in the order of the tag list and joined by ", ".

        Args:
            images: one image or a sequence of images, of any type that `load_image` reads.
            batch_size: number of images in a forward pass.

        Raises:
            FileNotFoundError, ValueError, TypeError: as for `load_image`; ValueError also if `batch_size` is below 1.
        """
        expect_integer("batch_size", batch_size, 1)
        strings = []
        for batch in load_batches(images, batch_size, self._pixels):
            best = self._probabilities(batch).topk(min(self.max_tags, len(self.tags)))
            for values, indices in zip(best.values.tolist(), best.indices.tolist(), strict=True):
                shown = [index for value, index in zip(values, indices, strict=True) if value > self.threshold]
                strings.append(", ".join(self.tags[index] for index in sorted(shown)))
        return strings

    def probabilities(self, pictures: list[Image.Image]) -> Tensor:
        """Compute the probability of every tag for each of B images: float32 [B, number of tags] on the CPU."""
        return self._probabilities([self._pixels(picture) for picture in pictures])

    @torch.no_grad()
    def _probabilities(self, pixels: list[dict[str, Tensor]]) -> Tensor:
        if self._text_embeds is None:
            blank = [self._pixels(Image.new("RGB", (64, 64)))]
            starts = range(0, len(self.tags), _TEXTS_AT_ONCE)
            texts = [self._sentences[start : start + _TEXTS_AT_ONCE] for start in starts]
            self._text_embeds = torch.cat([self._run(some, blank).text_embeds for some in texts])
        # The models' forward needs a text with the images, and normalises the embeddings of both.
        image_embeds = self._run(self._sentences[:1], pixels).image_embeds
        logits = image_embeds @ self._text_embeds.to(image_embeds.device).T * self.model.logit_scale.exp()
        bias = getattr(self.model, "logit_bias", None)
        return (logits.softmax(-1) if bias is None else (logits + bias).sigmoid()).float().cpu()

    def _pixels(self, image: Image.Image) -> Any:
        """Return the model's inputs for one image, which are much smaller than the image may be."""
        process: Any = self.processor
        return dict(process(images=image, return_tensors="pt"))

    def _run(self, texts: list[str], pixels: list[dict[str, Tensor]]) -> Any:
        # SigLIP was trained with no other padding.
        padding = "max_length" if self.model.config.model_type.startswith("siglip") else True
        batch: Any = self.processor(text=texts, padding=padding, truncation=True, return_tensors="pt")
        batch.update({name: torch.cat([one[name] for one in pixels]) for name in pixels[0]})
        return self.model(**batch.to(self.model.device, self.model.dtype))
