"""Arguments and results of converters."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

from lion_fast.data.converters.entries import Entry
from lion_fast.data.records import Record

Parts = tuple[Iterable[Entry], Callable[[Entry], Iterator[Record]]]
"""The entries of a file and a function from an entry to its records, so that an invalid entry can be skipped."""


@dataclass(frozen=True)
class Options:
    """Options of a conversion; see `Conversion`."""

    source: str
    image_template: str = ""
    splits: frozenset[str] = frozenset()
    kinds: tuple[str, ...] = ()
    seed: int = 0

    def takes(self, split: str) -> bool:
        return not self.splits or split in self.splits

    def image_name(self, **fields: str | int) -> str:
        """Return the name of an image's file.

        Raises:
            ValueError: the template does not match these fields.
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
        description: name of the dataset.
        files: usual names of the files, in the order of the arguments.
        parts: function that reads the files.
        image_template: template of the image's file name, for a format that gives only the number of an image.
        has_splits: whether a file holds several splits.
        has_regions: whether the format gives `rec` and `reg` samples.
        is_text: whether the file consists of lines of text instead of JSON.
    """

    description: str
    files: tuple[str, ...]
    parts: Callable[..., Parts]
    image_template: str = ""
    has_splits: bool = False
    has_regions: bool = False
    is_text: bool = False
