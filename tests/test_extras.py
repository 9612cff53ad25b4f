"""The library without the packages of its extras.

It is tested in a process that finds none of them, because CI has them installed.
"""

import json
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[1]
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
# Modules built on a package of an extra, which they import at once; their importers ensure that it is installed.
NEEDING_EXTRAS = {
    "lion_fast.demo.guards": "starlette",
    "lion_fast.demo.page": "gradio",
    "lion_fast.demo.server": "gradio",
    "lion_fast.drop_in.lora": "peft",
}
IMPORT_NAMES = {"flash-attn": "flash_attn"}

COMMANDS = {
    "train": ("accelerate", "train", "--stage 1 model.frozen_from=X data.train.image_level=['scenes:0:4']"),
    "demo": ("gradio", "demo", "--model ."),
    "quickstart": ("matplotlib", "quickstart", "--output {out}"),
    "python -m benchmarks.claims": ("matplotlib", "quickstart", "--output {out}"),
    "caption": ("pyarrow", "parquet", "docs/images --model . --out {out}.parquet"),
    "locate": ("ray", "ray", "docs/images --model . --out {out}.jsonl --ray-workers 1"),
    "python -m benchmarks.harness": ("matplotlib", "quickstart", "report --page {out}.md"),
}

CODE = """
import contextlib, importlib, io, json, pkgutil, sys
from importlib.machinery import PathFinder

blocked, commands = map(json.loads, sys.argv[1:])

class Finder(PathFinder):
    @classmethod
    def find_spec(cls, fullname, path=None, target=None):
        return None if fullname.split(".")[0] in blocked else super().find_spec(fullname, path, target)

sys.meta_path[sys.meta_path.index(PathFinder)] = Finder
import lion_fast, lion_kernels, lion_reference

names, failed, said = [], {}, {}
for package in (lion_fast, lion_kernels, lion_reference):
    names += [info.name for info in pkgutil.walk_packages(package.__path__, package.__name__ + ".")]
for name in names:
    if not name.endswith(".__main__"):
        try:
            importlib.import_module(name)
        except ModuleNotFoundError as error:
            failed[name] = error.name.split(".")[0]
for command, arguments in commands.items():
    with contextlib.redirect_stderr(io.StringIO()) as stderr:
        module = command.removeprefix("python -m ")
        main = importlib.import_module(f"{module}.__main__").main if module != command else lion_fast.cli.main
        status = main(arguments if module != command else [command, *arguments])
    said[command] = [status, stderr.getvalue()]
print(json.dumps([len(names), failed, said]))
"""


def optional_packages() -> set[str]:
    """Return the import names of all packages that the extras install and the core does not."""
    names: set[str] = {"pydantic", "tensorboard", "peft"}  # the first, of no extra, must not return unnoticed
    for extra, requirements in PYPROJECT["optional-dependencies"].items():
        if extra not in ("test", "dev", "docs"):
            names |= {re.split(r"[\[<>=; ]", requirement)[0] for requirement in requirements}
    required = {re.split(r"[\[<>=; ]", requirement)[0] for requirement in PYPROJECT["dependencies"]}
    return {IMPORT_NAMES.get(name, name) for name in names - required - {"lion-fast"}}


@pytest.fixture(scope="module")
def without_extras(tmp_path_factory: pytest.TempPathFactory) -> tuple[int, dict[str, str], dict[str, Any]]:
    """Return the number of modules, the failed imports with the missing package, and the results of commands."""
    out = tmp_path_factory.mktemp("nothing") / "out"
    commands = {name: arguments.format(out=out).split() for name, (_, _, arguments) in COMMANDS.items()}
    path = os.pathsep.join([str(ROOT), str(ROOT / "kernels"), str(ROOT / "reference")])
    done = subprocess.run(
        [sys.executable, "-c", CODE, json.dumps(sorted(optional_packages())), json.dumps(commands)],
        env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
    assert not list(out.parent.iterdir()), "nothing is begun that cannot be ended"
    return json.loads(done.stdout.splitlines()[-1])


def test_all_extras_are_hidden() -> None:
    packages = optional_packages()
    assert {"accelerate", "matplotlib", "flash_attn", "pyarrow", "ray", "gradio", "bitsandbytes"} <= packages
    assert not packages & {"torch", "triton", "transformers", "einops", "safetensors", "pillow"}


def test_no_module_imports_an_extra_at_once(without_extras: tuple[int, dict[str, str], dict[str, Any]]) -> None:
    modules, failed, _ = without_extras
    assert modules > 120
    assert failed == NEEDING_EXTRAS


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_name_the_extra(command: str, without_extras: tuple[int, dict[str, str], dict[str, Any]]) -> None:
    package, extra, _ = COMMANDS[command]
    status, stderr = without_extras[2][command]
    program = command if command.startswith("python -m ") else f"lion-fast {command}"
    assert stderr == f"{program}: no package {package}; install it with: pip install 'lion-fast[{extra}]'\n"
    assert status == 2
