"""Tags of the images of a batch from a tagger that is called with each distinct image once."""

import hashlib
from collections.abc import Callable, Sequence
from typing import Any

from PIL import Image

from lion_fast.io.image_checks import MAX_PIXELS
from lion_fast.io.reading import shown


class DistinctTags:
    """Collects images for a tagger, which gets all distinct ones at once, or as many as hold `MAX_PIXELS` together.

    Args:
        tagger: function from a list of images to the tags of each.

    Raises:
        ValueError: from `add` and `of_each`: the tagger does not return one entry per image.
    """

    def __init__(self, tagger: Callable[[list[Image.Image]], Sequence[Any]]):
        self._tagger = tagger
        self._keys: list[bytes] = []
        self._waiting: dict[bytes, Image.Image] = {}
        self._tags: dict[bytes, Any] = {}

    def add(self, image: Image.Image) -> None:
        """Add the next image, in RGB."""
        key = hashlib.blake2b(repr(image.size).encode() + image.tobytes()).digest()
        self._keys.append(key)
        if key in self._tags or key in self._waiting:
            return
        pixels = sum(waiting.width * waiting.height for waiting in (*self._waiting.values(), image))
        if pixels > MAX_PIXELS:
            self._tag_waiting()
        self._waiting[key] = image

    def of_each(self) -> list[Any]:
        """Return the tagger's entry for each image, in the order in which they were added."""
        self._tag_waiting()
        return [self._tags[key] for key in self._keys]

    def _tag_waiting(self) -> None:
        if not self._waiting:
            return
        found = self._tagger(list(self._waiting.values()))
        if isinstance(found, str) or not isinstance(found, Sequence) or len(found) != len(self._waiting):
            raise ValueError(
                f"tags: expected one entry from the tagger for each of {len(self._waiting)} images, got {shown(found)}"
            )
        self._tags |= zip(self._waiting, found, strict=True)
        self._waiting = {}
