"""Optional packages: a test that needs a missing package is skipped and names it."""

from importlib.util import find_spec
from typing import Any

import pytest


def _reason(package: str, extra: str) -> str:
    return f"no package {package.split('.')[0]}: pip install 'lion-fast[{extra}]'"


def needs(package: str, extra: str) -> Any:
    """Return the module; if it is missing, skip the test, or at the top of a file all of its tests."""
    return pytest.importorskip(package, reason=_reason(package, extra))


def needing(package: str, extra: str) -> pytest.MarkDecorator:
    """Return a mark that skips a test or a parameter if the package is missing."""
    return pytest.mark.skipif(find_spec(package.split(".")[0]) is None, reason=_reason(package, extra))
