"""The mutations in `tests/kernels/mutations.py` match the current kernels."""

import shutil
from pathlib import Path

import pytest

from tests.kernels.mutations import MUTATIONS, PACKAGE, Mutation, apply


@pytest.mark.parametrize("mutation", MUTATIONS, ids=[mutation.name for mutation in MUTATIONS])
def test_what_a_mutation_replaces_stands_there_once(mutation: Mutation, tmp_path: Path) -> None:
    (tmp_path / mutation.file).parent.mkdir(exist_ok=True)
    shutil.copy(PACKAGE / mutation.file, tmp_path / mutation.file)
    apply(mutation, tmp_path)
    changed = (tmp_path / mutation.file).read_text(encoding="utf-8")
    assert changed != (PACKAGE / mutation.file).read_text(encoding="utf-8")
    compile(changed, mutation.file, "exec")


def test_a_pattern_that_is_gone_is_said(tmp_path: Path) -> None:
    (tmp_path / "rms_norm.py").write_text("x = 1\nx = 1\n", encoding="utf-8")
    for old, times in (("y = 1", 0), ("x = 1", 2)):
        with pytest.raises(ValueError, match=f"m: expected once in rms_norm.py, found {times} times: {old}"):
            apply(Mutation("m", "rms_norm.py", old, "z", ""), tmp_path)
