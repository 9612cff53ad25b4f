"""Packages that not every installation has: the tests that need one are skipped where it is missing, and say so."""

from importlib.util import find_spec
from typing import Any

import pytest


def _reason(package: str, extra: str) -> str:
    return f"no package {package.split('.')[0]}: pip install 'lion-fast[{extra}]'"


def needs(package: str, extra: str) -> Any:
    """The module; where it is missing the test is skipped, or at the top of a file all of its tests."""
    return pytest.importorskip(package, reason=_reason(package, extra))


def needing(package: str, extra: str) -> pytest.MarkDecorator:
    """The same as a mark of a test or of a parameter."""
    return pytest.mark.skipif(find_spec(package.split(".")[0]) is None, reason=_reason(package, extra))
