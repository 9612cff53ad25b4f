"""`docs/data.md` is correct: its commands and code run, and every conversion gives the record shown."""

import json
import re
import shlex
from pathlib import Path

import pytest

from lion_fast.cli import main
from lion_fast.data import FORMATS, JsonlDataset, parse_record

TEXT = (Path(__file__).resolve().parents[3] / "docs" / "data.md").read_text(encoding="utf-8")
INTRODUCTION, CONVERSIONS = TEXT.split("What follows are the files of each format")
BLOCK = re.compile(r"(?:^`([\w.]+)`\n)?^```(\w*)\n(.*?)^```$", flags=re.MULTILINE | re.DOTALL)
SECTIONS = CONVERSIONS.split("\n### ")[1:]


def run(line: str) -> None:
    assert main(shlex.split(line)[1:]) == 0


def test_json_lines_are_valid_records() -> None:
    lines = BLOCK.findall(INTRODUCTION)[0][2].splitlines()
    assert [parse_record(line, "docs").task for line in lines] == ["image_level", "region_level"]


def test_commands_and_code_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    _, (_, _, commands), (_, language, code) = BLOCK.findall(INTRODUCTION)
    for line in commands.splitlines():
        run(line)
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
    run(command)
    written = Path("out.jsonl").read_text(encoding="utf-8")
    assert [json.loads(line) for line in written.splitlines()] == [json.loads(line) for line in result.splitlines()]
    assert len(JsonlDataset("out.jsonl")) == len(result.splitlines())
