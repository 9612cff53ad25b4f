"""How commands import what takes seconds."""

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def importing() -> Iterator[None]:
    """Pause the garbage collector, which would search the many objects that imports make, and that stay, repeatedly.

    It takes about a sixth of the time of importing PyTorch and transformers.
    """
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()
