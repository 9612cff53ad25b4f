"""Counting invalid entries of a converted file, or stopping at the first."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager

from lion_fast.data.records import DataError

logger = logging.getLogger(__name__)

_SHOWN = 10  # invalid entries that are logged individually; further ones are only counted


class Skipping:
    """Counter of invalid entries.

    Args:
        strict: whether an invalid entry raises its error instead.

    Attributes:
        count: number of entries skipped so far.
        first: the error of the first of them; None if there is none.
    """

    def __init__(self, strict: bool):
        self.strict = strict
        self.count = 0
        self.first: str | None = None

    @contextmanager
    def entry(self, place: str) -> Iterator[None]:
        """Skip the rest of the block after an error.

        Args:
            place: file and path of the entry, for errors that do not name them.

        Raises:
            DataError: with `strict`, the entry is invalid.
        """
        try:
            yield
        except ValueError as error:
            message = str(error) if isinstance(error, DataError) else f"{place}: {error}"
            if self.strict:
                raise DataError(message) from error
            self.count += 1
            self.first = self.first or message
            if self.count <= _SHOWN:
                logger.warning("skipped %s", message)
