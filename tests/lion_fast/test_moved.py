"""Old module names import the modules at their new names, once and with a warning."""

import importlib
import sys

import pytest

from lion_fast._moved import MOVED
from tests.lion_fast.processes import run_python


@pytest.mark.parametrize("old", MOVED)
def test_an_old_name_is_the_module_at_its_new_one(old: str) -> None:
    sys.modules.pop(f"lion_fast.{old}", None)
    with pytest.warns(FutureWarning, match=f"lion_fast.{old} has moved to lion_fast.{MOVED[old]};"):
        module = importlib.import_module(f"lion_fast.{old}")
    assert module is importlib.import_module(f"lion_fast.{MOVED[old]}")
    assert module.__spec__ is not None
    assert module.__spec__.name == module.__name__ == f"lion_fast.{MOVED[old]}"


def test_a_module_inside_a_moved_package_is_not_loaded_twice() -> None:
    code = "import lion_fast.bulk.job as old, lion_fast.inference.bulk.job as new; assert old is new"
    run_python("-W", "ignore", "-c", code)
