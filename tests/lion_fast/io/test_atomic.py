"""What is written whole or not at all: files, directories, and directories that keep what is theirs."""

import os
from contextlib import AbstractContextManager
from pathlib import Path

import pytest

from lion_fast.io.atomic import UNFINISHED, remove_directory, whole_directory, whole_file, write_json


def names_in(directory: Path) -> list[str]:
    return sorted(str(path.relative_to(directory)) for path in directory.rglob("*"))


def interrupted(writing: AbstractContextManager[Path], name: str = "") -> None:
    """Write a file, or a file of that name in a directory, up to the middle."""
    with writing as path:
        (path / name).write_text("torn")
        raise KeyboardInterrupt


def test_a_file_is_there_when_it_is_whole(tmp_path: Path) -> None:
    path = tmp_path / "found.json"
    write_json(path, {"a": 1})
    with whole_file(path) as unfinished:
        unfinished.write_text("new")
        assert path.read_text() == '{\n "a": 1\n}\n'
    assert path.read_text() == "new"
    with pytest.raises(KeyboardInterrupt):
        interrupted(whole_file(path))
    assert path.read_text() == "new"
    assert names_in(tmp_path) == ["found.json"]


def test_a_link_stays_a_link(tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    link, file = tmp_path / "link.json", tmp_path / "disk" / "found.json"
    link.symlink_to(file)
    for content in (1, 2):  # the file is new, and then exists
        write_json(link, content)
        assert link.is_symlink()
        assert file.read_text() == f"{content}\n"
    assert names_in(tmp_path) == ["disk", "disk/found.json", "link.json"]


def test_a_pipe_is_written_to(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    write_json(pipe, 1)
    assert os.read(reader, 9) == b"1\n"
    os.close(reader)
    assert pipe.is_fifo()


@pytest.mark.parametrize("mode", ["w", "a"])
def test_an_open_file_is_added_to(tmp_path: Path, mode: str) -> None:
    """As standard output is after `>` and `>>`: what is there already stays."""
    path = tmp_path / "all.json"
    path.write_text("0\n")
    with path.open(mode) as file:
        print("before", file=file, flush=True)
        write_json(Path(f"/dev/fd/{file.fileno()}"), 1)
        with pytest.raises(KeyboardInterrupt):
            interrupted(whole_file(Path(f"/dev/fd/{file.fileno()}")))
        print("after", file=file)
    assert path.read_text() == ("0\n" if mode == "a" else "") + "before\n1\nafter\n"


def test_standard_output_is_not_replaced(capfd: pytest.CaptureFixture[str]) -> None:
    before = os.readlink("/dev/stdout")
    write_json(Path("/dev/stdout"), 1)
    assert capfd.readouterr().out == "1\n"
    assert os.readlink("/dev/stdout") == before


def test_a_directory_is_replaced_when_the_new_one_is_whole(tmp_path: Path) -> None:
    target = tmp_path / "model"
    for content in ("old", "new"):
        with whole_directory(target, finish=lambda directory: (directory / "list").touch()) as aside:
            (aside / content).mkdir()
            (aside / content / "weights").touch()
            assert names_in(target) == (["list", "old", "old/weights"] if content == "new" else [])
    assert names_in(tmp_path) == ["model", "model/list", "model/new", "model/new/weights"]
    with pytest.raises(KeyboardInterrupt):
        interrupted(whole_directory(target), "torn")
    assert names_in(tmp_path) == ["model", "model/list", "model/new", "model/new/weights"]


def test_a_link_to_a_directory_stays_a_link(tmp_path: Path) -> None:
    (tmp_path / "disk" / "old").mkdir(parents=True)
    (tmp_path / "model").symlink_to(tmp_path / "disk")
    with whole_directory(tmp_path / "model") as aside:
        (aside / "weights").touch()
    assert (tmp_path / "model").is_symlink()
    assert names_in(tmp_path) == ["disk", "disk/weights", "model"]


def test_a_directory_named_aside_is_replaced(tmp_path: Path) -> None:
    aside = tmp_path / "model.unfinished"
    aside.mkdir()
    (aside / "left by a kill").touch()
    with whole_directory(tmp_path / "model", aside=aside) as given:
        (given / "weights").touch()
    assert names_in(tmp_path) == ["model", "model/weights"]


def test_no_other_directory_is_touched(tmp_path: Path) -> None:
    """Neither the user's own of a similar name, nor that of another process with the same target."""
    own = tmp_path / f"model{UNFINISHED}"
    own.mkdir()
    (own / "mine").touch()
    with whole_directory(tmp_path / "model") as one, whole_directory(tmp_path / "model") as other:
        assert len({one, other, own}) == 3
        (other / "weights").touch()
    assert (own / "mine").exists()


def test_a_directory_may_keep_its_other_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As the working directory, which cannot be replaced."""
    monkeypatch.chdir(tmp_path)
    Path("mine").touch()
    Path("weights").write_text("old")
    with pytest.raises(KeyboardInterrupt):
        interrupted(whole_directory(Path(), keep_others=True), "weights")
    assert Path("weights").read_text() == "old"
    with whole_directory(Path(), keep_others=True) as aside:
        (aside / "weights").write_text("new")
    assert names_in(tmp_path) == ["mine", "weights"]
    assert Path("weights").read_text() == "new"


def test_a_directory_goes_at_once(tmp_path: Path) -> None:
    (tmp_path / "run" / "part").mkdir(parents=True)
    (tmp_path / "aside" / "run.removed" / "left by a kill").mkdir(parents=True)
    remove_directory(tmp_path / "run", tmp_path / "aside" / "run.removed")
    remove_directory(tmp_path / "absent", tmp_path / "aside" / "absent.removed")
    assert names_in(tmp_path) == ["aside"]
