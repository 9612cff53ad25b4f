"""What converters are given, and what they give."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

from lion_fast.data.converters.entries import Entry
from lion_fast.data.records import Record

Parts = tuple[Iterable[Entry], Callable[[Entry], Iterator[Record]]]
"""The entries of a file, and what makes records of one: a bad entry can be left out, and the next one still read."""


@dataclass(frozen=True)
class Options:
    """How a format is read; see `convert`."""

    source: str
    image_template: str = ""
    splits: frozenset[str] = frozenset()
    kinds: tuple[str, ...] = ()
    seed: int = 0

    def takes(self, split: str) -> bool:
        return not self.splits or split in self.splits

    def image_name(self, **fields: str | int) -> str:
        """The name of a picture's file.

        Raises:
            ValueError: for a template that these fields do not fit.
        """
        try:
            return self.image_template.format(**fields)
        except (LookupError, ValueError, AttributeError) as error:
            raise ValueError(
                f"image_name: expected a template for {', '.join(fields)}, got {self.image_template!r} ({error})"
            ) from error


@dataclass(frozen=True)
class Format:
    """A format that can be converted.

    Args:
        description: what it is.
        files: what its files are called, in the order in which they are given.
        parts: reads them.
        image_template: where the format gives only the number of a picture, the name of the picture's file.
        has_splits: whether a file holds several splits.
        has_regions: whether it makes `rec` and `reg` samples.
        is_text: whether the file is lines of text, not JSON.
    """

    description: str
    files: tuple[str, ...]
    parts: Callable[..., Parts]
    image_template: str = ""
    has_splits: bool = False
    has_regions: bool = False
    is_text: bool = False
