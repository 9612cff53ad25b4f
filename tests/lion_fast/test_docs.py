"""The README and the site are correct: commands and code run, link targets exist, and the site builds.

`docs/data.md` has tests of its own, which also make the files that its commands read.
"""

import ast
import contextlib
import importlib
import io
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch.distributed as dist
from torch.distributed.run import get_args_parser

from lion_fast.cli import main
from lion_fast.data import FORMATS, JsonlDataset, parse_record
from tests.operators import OPERATORS

ROOT = Path(__file__).resolve().parents[2]
PAGES = {str(path.relative_to(ROOT)): path.read_text(encoding="utf-8") for path in (ROOT / "docs").rglob("*.md")}
PAGES["README.md"] = (ROOT / "README.md").read_text(encoding="utf-8")

# Errors of commands that read the user's files, which do not exist here; only their arguments are tested.
WANTING = {
    "convert": "--vit: expected a file, got a directory or nothing at eva_vit_g.pth",
    "tag ": "model: expected a directory, got lion-xl/ram",
    "caption tags.jsonl": "input: expected a file, a directory, or a pattern that matches files, got tags.jsonl",
    "train --stage 1 model": "captions.jsonl",
    "train --stage 2 model": "boxes.jsonl",
    "train --stage 3": "captions.jsonl",
}


@pytest.fixture
def _after_quickstart(quickstart_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Change to a working directory like a clone's root, with the results of the quickstart.

    Commands that write into their clone write into the copy, because other tests read the pages meanwhile.
    """
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "quickstart").symlink_to(quickstart_dir)
    (tmp_path / "benchmarks").mkdir()
    (tmp_path / "benchmarks" / "results").symlink_to(ROOT / "benchmarks" / "results")
    shutil.copytree(ROOT / "docs", tmp_path / "docs")
    for name in ("README.md", "CHANGELOG.md"):
        shutil.copy(ROOT / name, tmp_path)
    monkeypatch.setattr("benchmarks.harness.__main__.ROOT", tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("lion_fast.cli.demo._wait", lambda: None)  # end the command once the page is served


# An optional file name, the language, and the content of a block of code.
BLOCK = re.compile(r"(?:^`([\w.]+)`\n)?^```(\w*)\n(.*?)^```$", flags=re.MULTILINE | re.DOTALL)


def blocks(page: str, language: str) -> list[str]:
    return [content for _, kind, content in BLOCK.findall(PAGES[page]) if kind == language]


def commands(page: str) -> list[str]:
    fenced = [*blocks(page, ""), *blocks(page, "sh")]
    lines = [line.split("#")[0].strip() for block in fenced for line in block.splitlines()]
    lines = [line.replace("python -m lion_fast", "lion-fast") for line in lines]
    return [line for line in lines if line.startswith(("lion-fast ", "torchrun ", "python -m benchmarks."))]


def run_command(line: str, monkeypatch: pytest.MonkeyPatch) -> tuple[list[str], int]:
    """Run a command and return the arguments of `lion-fast` and its exit status; torchrun starts a single process."""
    name, *arguments = shlex.split(line)
    if name == "lion-fast":
        return arguments, main(arguments)
    if name == "python":
        return arguments[2:], importlib.import_module(f"{arguments[1]}.__main__").main(arguments[2:])
    launch = get_args_parser().parse_args(arguments)
    if launch.no_python:
        assert launch.training_script == "lion-fast"
        return launch.training_script_args, main(launch.training_script_args)
    assert launch.module
    module = importlib.import_module(launch.training_script)
    monkeypatch.setattr(sys, "argv", [launch.training_script, *launch.training_script_args])
    start = partial(dist.init_process_group, store=dist.HashStore(), rank=0, world_size=1)
    monkeypatch.setattr(dist, "init_process_group", start)
    with pytest.raises((OSError, ValueError)) as caught:
        module.main()
    print(caught.value, file=sys.stderr)
    return ["train", *launch.training_script_args], 2


ELSEWHERE = {"docs/data.md"}
WITH_CODE = sorted(page for page in PAGES.keys() - ELSEWHERE if blocks(page, "python"))
WITH_COMMANDS = sorted(page for page in PAGES.keys() - ELSEWHERE if commands(page))


@pytest.mark.usefixtures("_after_quickstart")
@pytest.mark.parametrize("page", WITH_CODE)
def test_the_code_runs(page: str) -> None:
    """The code blocks of a page, run in order, print its `text` blocks."""
    names: dict = {}
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        for code in blocks(page, "python"):
            exec(compile(code, page, "exec"), names)
    assert printed.getvalue() == "".join(blocks(page, "text"))


@pytest.mark.usefixtures("_after_quickstart")
@pytest.mark.parametrize("page", WITH_COMMANDS)
def test_the_commands_run(page: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    names = dict.fromkeys(re.findall(r"--config (\S+)", PAGES[page]))
    for name, content in zip(names, blocks(page, "yaml"), strict=False):
        Path(name).write_text(content, encoding="utf-8")
    for line in commands(page):
        try:
            arguments, status = run_command(line, monkeypatch)
        except SystemExit as stop:  # --help
            arguments, status = shlex.split(line)[1:], stop.code
        captured = capsys.readouterr()
        wanting = [message for start, message in WANTING.items() if " ".join(arguments).startswith(start)]
        if wanting and "--print-recipe" not in arguments:
            assert status == 2, line
            assert wanting[0] in captured.err, captured.err
        elif arguments[0] == "locate":  # the model of a smoke run gives arbitrary answers
            assert status == 0 or "holds no box" in captured.err
        else:
            assert status == 0, captured.err


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page, "py")])
def test_imports_of_code_with_downloads_exist(page: str) -> None:
    """The code itself is tested with small models in test_tagging.py and test_quantization.py."""
    for code in blocks(page, "py"):
        imports = [node for node in ast.parse(code).body if isinstance(node, ast.ImportFrom)]
        assert imports
        exec(compile(ast.Module(imports, []), page, "exec"), {})


@pytest.mark.parametrize("page", sorted(PAGES))
def test_make_targets_exist(page: str) -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for target in re.findall(r"^make (\w+)", PAGES[page], flags=re.MULTILINE):
        assert re.search(rf"^{target}:", makefile, flags=re.MULTILINE), target


def test_link_targets_of_the_readme_exist() -> None:
    for target in re.findall(r"\]\((?!http)([^)#]+)\)", PAGES["README.md"]):
        assert (ROOT / target).exists(), target


@pytest.mark.parametrize("operator", OPERATORS)
def test_every_operator_has_a_page(operator: str) -> None:
    page = PAGES[f"docs/operators/{operator}.md"]
    assert f"{operator}(" in "".join(blocks(f"docs/operators/{operator}.md", "python"))
    assert f"](../images/bench_{operator}.png)" in page
    assert (ROOT / "docs" / "images" / f"bench_{operator}.png").is_file()
    for path in re.findall(r"`((?:kernels|reference|benchmarks)/[^`]+)`", page):
        assert (ROOT / path).exists(), path
    assert f"]({operator}.md)" in PAGES["docs/operators/index.md"]


def test_the_site_builds_without_a_warning(tmp_path: Path) -> None:
    environment = os.environ | {"NO_MKDOCS_2_WARNING": "1"}  # an advertisement
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path)]
    built = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert built.returncode == 0, built.stderr
    assert "WARNING" not in built.stderr
    pages = list(tmp_path.rglob("*.html"))
    assert len(pages) >= len(PAGES)  # without the README, with the page for "not found"
    for page in pages:  # pages must load nothing from the network
        loaded = re.findall(r'<(?:script|img|link rel="stylesheet")[^>]*(?:src|href)="(http[^"]+)"', page.read_text())
        assert not loaded, f"{page} loads {loaded}"


INTRODUCTION, CONVERSIONS = PAGES["docs/data.md"].split("What follows are the files of each format")
SECTIONS = CONVERSIONS.split("\n### ")[1:]


def test_json_lines_are_valid_records() -> None:
    lines = BLOCK.findall(INTRODUCTION)[0][2].splitlines()
    assert [parse_record(line, "docs").task for line in lines] == ["image_level", "region_level"]


def test_commands_and_code_about_data_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    _, (_, _, lines), (_, language, code) = BLOCK.findall(INTRODUCTION)
    for line in lines.splitlines():
        assert main(shlex.split(line)[1:]) == 0
    assert language == "python"
    names: dict = {}
    exec(compile(code, "docs/data.md", "exec"), names)
    assert len(names["batch"]) == 4
    assert {sample["task"] for sample in names["batch"]} <= {"image_level", "region_level"}


def test_every_format_has_an_example() -> None:
    assert sorted(re.findall(r"^lion-fast data convert (\S+)", CONVERSIONS, flags=re.MULTILINE)) == sorted(FORMATS)


@pytest.mark.parametrize("section", SECTIONS, ids=[section.splitlines()[0] for section in SECTIONS])
def test_conversions_give_the_record_shown(section: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    *files, (_, _, command), (_, _, result) = BLOCK.findall(section)
    for name, _, content in files:
        Path(name).write_text(content, encoding="utf-8")
    assert main(shlex.split(command)[1:]) == 0
    written = Path("out.jsonl").read_text(encoding="utf-8")
    assert [json.loads(line) for line in written.splitlines()] == [json.loads(line) for line in result.splitlines()]
    assert len(JsonlDataset("out.jsonl")) == len(result.splitlines())
