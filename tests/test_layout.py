"""The repository's shape: what installs, what may import what, and which names must never appear."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = {
    "lion_fast": ROOT / "lion_fast",
    "lion_kernels": ROOT / "kernels" / "lion_kernels",
    "lion_reference": ROOT / "reference" / "lion_reference",
}
CHECK = PACKAGES["lion_fast"] / "check"
# The layers: the kernels and the reference know nothing of the model or of each other, and nothing but the check, which
# is there to compare them, needs the reference.
ALLOWED = {
    "lion_fast": {"lion_kernels"},
    "lion_kernels": set(),
    "lion_reference": set(),
}
THIRD_PARTY = {"lion_kernels": {"torch", "triton"}, "lion_reference": {"torch", "einops"}}


def imported(package: str) -> set[str]:
    """Top-level names that a package's files but the check's import, at any depth of their code."""
    names = set()
    for file in PACKAGES[package].rglob("*.py"):
        if file.is_relative_to(CHECK):
            continue
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                names |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
                names.add(node.module.split(".")[0])
    return names


@pytest.mark.parametrize("folder", ["kernels", "reference"])
def test_no_package_shadows_another_s_name(folder: str) -> None:
    """transformers imports a package named `kernels`; a folder of that name must not be one."""
    assert not (ROOT / folder / "__init__.py").exists()


@pytest.mark.parametrize("package", PACKAGES)
def test_layers(package: str) -> None:
    ours = imported(package) & set(PACKAGES)
    assert ours - {package} <= ALLOWED[package]


@pytest.mark.parametrize("package", THIRD_PARTY)
def test_what_the_small_packages_need(package: str) -> None:
    import sys

    others = imported(package) - set(PACKAGES) - set(sys.stdlib_module_names)
    assert others <= THIRD_PARTY[package]


def test_operators_have_twins() -> None:
    """An operator has the same file name in the kernels, the reference and both test folders."""
    kernels = {file.name for file in PACKAGES["lion_kernels"].glob("mixture_of_*.py")}
    assert kernels
    for name in kernels:
        assert (PACKAGES["lion_reference"] / name).is_file()
        assert (ROOT / "tests" / "kernels" / f"test_{name}").is_file()
        assert (ROOT / "tests" / "reference" / f"test_{name}").is_file()
