"""The repository's structure: what is installed, which imports are allowed, and which names must never appear."""

import ast
import re
import sys
from graphlib import CycleError, TopologicalSorter
from importlib.util import resolve_name
from pathlib import Path

import pytest

from lion_fast._moved import MOVED

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = {
    "lion_fast": ROOT / "lion_fast",
    "lion_kernels": ROOT / "kernels" / "lion_kernels",
    "lion_reference": ROOT / "reference" / "lion_reference",
}
# The kernels and the reference import neither the model nor each other, and only the check, which compares them,
# imports the reference.
ALLOWED = {
    "lion_fast": {"lion_kernels"},
    "lion_kernels": set(),
    "lion_reference": set(),
}
THIRD_PARTY = {"lion_kernels": {"torch", "triton"}, "lion_reference": {"torch", "einops"}}


# Folders and top-level modules of lion_fast from the bottom up: a module imports only from its own folder and from
# lower layers.
LAYERS = (
    {"extras", "interrupts", "tasks"},
    {"io"},
    {"configuration_lion", "streams"},
    {"model"},
    {"tagging", "data"},
    {"scenes"},
    {"modeling_lion", "processing_lion"},
    {"conversion", "inference"},
    {"training"},
    {"quickstart", "demo", "drop_in", "check"},
    {"cli"},
)
# Modules that use private names of the kernels, to measure, compile or rewire them.
INSIDE_KERNELS = ("lion_fast.check", "lion_fast.drop_in", "lion_fast.cli.kernels")


def imports_of_all() -> dict[str, list[tuple[str, str | None]]]:
    """Return the imports of every module of the packages and the benchmarks, at any depth of the code.

    Returns:
        The module's name -> (module, imported name) pairs, with None for the module itself.
    """
    found = {}
    for package, folder in {**PACKAGES, "benchmarks": ROOT / "benchmarks"}.items():
        for file in folder.rglob("*.py"):
            parts = [package, *file.relative_to(folder).with_suffix("").parts]
            own: list[tuple[str, str | None]] = []
            for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
                if isinstance(node, ast.Import):
                    own += [(alias.name, None) for alias in node.names]
                elif isinstance(node, ast.ImportFrom):
                    module = resolve_name("." * node.level + (node.module or ""), ".".join(parts[:-1]))
                    own += [(module, alias.name) for alias in node.names]
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = own
    return found


IMPORTS = imports_of_all()


def imported_modules(name: str) -> set[str]:
    """Return our modules that a module imports, without its parent packages, which Python runs first."""
    found = set()
    for module, taken in IMPORTS[name]:
        for full in (f"{module}.{taken}", module):
            if full in IMPORTS:
                found.add(full)
                break
    return found


def imported(package: str) -> set[str]:
    """Return the top-level names imported by the modules of a package, except by the check."""
    of_package = [name for name in IMPORTS if within(name, package) and not within(name, "lion_fast.check")]
    return {module.split(".")[0] for name in of_package for module, _ in IMPORTS[name]}


def within(module: str, package: str) -> bool:
    return f"{module}.".startswith(f"{package}.")


@pytest.mark.parametrize("folder", ["kernels", "reference"])
def test_no_package_shadows_another(folder: str) -> None:
    """transformers imports a package named `kernels`, so no folder of that name may be a package."""
    assert not (ROOT / folder / "__init__.py").exists()


@pytest.mark.parametrize("package", PACKAGES)
def test_imports_between_packages(package: str) -> None:
    ours = imported(package) & {*PACKAGES, "benchmarks", "tests"}
    assert ours - {package} <= ALLOWED[package]


KERNELS = PACKAGES["lion_kernels"]
FAMILIES = {"attention", "low_rank"}
OPERATORS = {file.stem for file in KERNELS.glob("*.py")} - {"__init__", "__main__"}
# Allowed imports of each folder or operator of lion_kernels. LoRA whose update has its own input is a mixture of
# adapters.
KERNEL_IMPORTS = {
    "core": set(),
    **{family: {"core"} for family in FAMILIES},
    **{operator: {"core", *FAMILIES} for operator in OPERATORS},
    "mixture_of_lora_linear": {"core", "low_rank", "mixture_of_adapters"},
    "aot": {"core", *FAMILIES, *OPERATORS},
}


@pytest.mark.parametrize("part", sorted(KERNEL_IMPORTS))
def test_layers_of_the_kernels(part: str) -> None:
    """Imports go in one direction: core, the families, the operators, the ahead-of-time report."""
    modules = [name for name in IMPORTS if within(name, f"lion_kernels.{part}")]
    assert modules
    found = {part_of(module) for name in modules for module, _ in IMPORTS[name] if module.startswith("lion_kernels.")}
    assert found - {part} <= KERNEL_IMPORTS[part]


def test_no_module_uses_an_old_name() -> None:
    for name, imports in IMPORTS.items():
        names = {part for module, taken in imports for part in (module, f"{module}.{taken}")}
        assert not [part for part in names for old in MOVED if within(part, f"lion_fast.{old}")], name


def test_no_package_imports_the_benchmarks() -> None:
    for name, imports in IMPORTS.items():
        if not within(name, "benchmarks"):
            assert not [module for module, _ in imports if within(module, "benchmarks")], name


@pytest.mark.parametrize("file", sorted(OPERATORS))
def test_an_operator_is_a_page(file: str) -> None:
    assert len((KERNELS / f"{file}.py").read_text(encoding="utf-8").splitlines()) <= 250


@pytest.mark.parametrize("package", THIRD_PARTY)
def test_third_party_imports_of_the_small_packages(package: str) -> None:
    others = imported(package) - set(PACKAGES) - set(sys.stdlib_module_names)
    assert others <= THIRD_PARTY[package]


@pytest.mark.parametrize("package", [*PACKAGES, "benchmarks"])
def test_there_are_no_import_cycles(package: str) -> None:
    graph = {name: imported_modules(name) - {name} for name in IMPORTS if within(name, package)}
    assert sum(map(len, graph.values())) > 20
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(f"modules import each other: {' <- '.join(error.args[1])}")


def test_modules_import_only_from_lower_layers() -> None:
    layer = {part: number for number, parts in enumerate(LAYERS) for part in parts}
    ours = [name for name in IMPORTS if within(name, "lion_fast") and name.count(".") and part_of(name)[0] != "_"]
    assert {part_of(name) for name in ours} == set(layer), "every part has its layer"
    arrows = [(name, other) for name in ours for other in imported_modules(name) if within(other, "lion_fast")]
    assert len(arrows) > 200
    for name, other in arrows:
        here, there = part_of(name), part_of(other)
        assert here == there or there == "_lazy" or layer.get(there, len(LAYERS)) < layer[here], (
            f"{name} imports {other}, which is not in a lower layer"
        )


def part_of(name: str) -> str:
    return f"{name}.".split(".")[1]


def test_only_public_names_of_the_kernels_are_imported() -> None:
    import lion_kernels

    seen = 0
    for name in IMPORTS:
        if within(name, "lion_fast") and not any(within(name, allowed) for allowed in INSIDE_KERNELS):
            for module, taken in IMPORTS[name]:
                if within(module, "lion_kernels"):
                    seen += 1
                    assert module == "lion_kernels", f"{name} imports {module}"
                    assert taken in lion_kernels.__all__, f"{name} imports {taken}"
    assert seen > 5


def test_named_test_files_exist() -> None:
    """CI, scripts and pages name test files; a moved file would otherwise only be noticed when they run."""
    places = [
        *(ROOT / ".ci").iterdir(),
        *(ROOT / "docs").rglob("*.md"),
        *ROOT.glob("*.md"),
        *ROOT.glob("benchmarks/*.sh"),
    ]
    text = "".join(place.read_text(encoding="utf-8") for place in places if place.is_file())
    named = set(re.findall(r"tests/[\w/]+\.py", text))
    assert named
    assert {name for name in named if not (ROOT / name).is_file()} == set()


def test_operators_have_the_same_file_name_everywhere() -> None:
    """An operator has the same file name in the kernels, the reference and both test folders."""
    for name in (f"{operator}.py" for operator in OPERATORS):
        assert (PACKAGES["lion_reference"] / name).is_file()
        assert (ROOT / "tests" / "kernels" / f"test_{name}").is_file()
        assert (ROOT / "tests" / "reference" / f"test_{name}").is_file()
