"""Whose an output is: locks, temporary names, names in errors, and files that are not to be touched."""

import errno
import os
import re
import stat
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from lion_fast.io.atomic import UNFINISHED, whole_directory, whole_file, write_json, write_text
from lion_fast.io.owning import (
    OutputExistsError,
    OutputInUseError,
    expect_empty,
    expect_free,
    expect_other,
    is_stream,
    made_directories,
    naming_path,
    sole_writer,
)

LOCKING = """
import sys, importlib.util
from pathlib import Path
spec = importlib.util.spec_from_file_location("owning", sys.argv[1])
owning = importlib.util.module_from_spec(spec); spec.loader.exec_module(owning)
with owning.sole_writer(Path(sys.argv[2])):
    print(1, flush=True)
    sys.stdin.read()
"""


def names_in(directory: Path) -> list[str]:
    return sorted(str(path.relative_to(directory)) for path in directory.rglob("*"))


def test_a_file_with_content_is_replaced_only_if_told_to(tmp_path: Path) -> None:
    path = tmp_path / "found.json"
    path.write_text("mine")
    with pytest.raises(OutputExistsError, match=r"out: expected the name of a new file, got .*found.json"):
        write_json(path, 1, overwrite=False)
    assert path.read_text() == "mine"
    assert names_in(tmp_path) == ["found.json"]
    path.write_text("")
    write_json(path, 1, overwrite=False)  # an empty file holds nothing
    assert path.read_text() == "1\n"

    def write_late() -> None:
        with whole_file(tmp_path / "late", overwrite=False) as unfinished:
            unfinished.write_text("ours")
            (tmp_path / "late").write_text("mine")

    with pytest.raises(OutputExistsError):
        write_late()
    assert (tmp_path / "late").read_text() == "mine"
    with pytest.raises(IsADirectoryError, match="out: expected a file, got the directory"):
        write_json(tmp_path, 1)
    assert names_in(tmp_path) == ["found.json", "late"]


def test_temporary_names_of_the_users_are_left_alone(tmp_path: Path) -> None:
    mine = [f"found.json{UNFINISHED}", f".found.json{UNFINISHED}", ".found.json-mine.unfinished", ".found.json.lock"]
    for name in mine:
        (tmp_path / name).write_text("mine")
    write_json(tmp_path / "found.json", 1)
    assert names_in(tmp_path) == sorted([*mine, "found.json"])
    assert {(tmp_path / name).read_text() for name in mine} == {"mine"}


@pytest.mark.parametrize("name", ["found.json", "ä" * 120])
def test_what_a_killed_writer_left_is_removed(tmp_path: Path, name: str) -> None:
    target = tmp_path / name
    with whole_file(target) as unfinished:
        unfinished.write_text("1")
        left, lock = unfinished, next(path for path in tmp_path.iterdir() if path.name.endswith(".lock"))
        assert len(os.fsencode(unfinished.name)) <= 255
    left.write_text("torn")
    lock.touch()
    (tmp_path / f".other{left.name[-20:]}").touch()
    write_text(target, "2")
    assert names_in(tmp_path) == sorted([name, f".other{left.name[-20:]}"])


def test_only_one_process_writes(tmp_path: Path) -> None:
    path, script = tmp_path / "found.json", sys.modules[sole_writer.__module__].__file__
    with subprocess.Popen(
        [sys.executable, "-c", LOCKING, script, path], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as other:
        assert other.stdout.readline() == "1\n"
        with pytest.raises(OutputInUseError, match=r"expected a file that no other process is writing, got .*found"):
            write_json(path, 1)
        other.kill()
        other.communicate()
    write_json(path, 2)  # the kernel has released the lock
    assert names_in(tmp_path) == ["found.json"]


def test_only_one_thread_writes(tmp_path: Path) -> None:
    path, errors = tmp_path / "found.json", []

    def write() -> None:
        try:
            write_json(path, 1)
        except OutputInUseError as error:
            errors.append(error)

    with whole_file(path) as unfinished:
        unfinished.write_text("2")
        thread = threading.Thread(target=write)
        thread.start()
        thread.join()
        # The refused one has released nothing.
        code = [sys.executable, "-c", LOCKING, sys.modules[sole_writer.__module__].__file__, str(path)]
        assert "OutputInUseError" in subprocess.run(code, capture_output=True, text=True).stderr
    assert len(errors) == 1
    assert path.read_text() == "2"


def test_a_new_directory_has_one_writer_and_nothing_else_in_it(tmp_path: Path) -> None:
    target = tmp_path / "made" / "shards"
    with whole_directory(target, new=True) as aside:
        (aside / "a").touch()
        with pytest.raises(OutputInUseError, match=r"got .*shards"), whole_directory(target, new=True):
            pass
    assert names_in(tmp_path) == ["made", "made/shards", "made/shards/a"]
    with pytest.raises(OutputExistsError, match="expected a directory that is empty or does not exist yet"):
        expect_empty(target)
    (tmp_path / "empty").mkdir()
    twice = whole_directory(tmp_path / "empty", new=True), whole_directory(tmp_path / "empty", new=True)
    with pytest.raises(OutputInUseError), twice[0], twice[1]:
        pass
    assert not names_in(tmp_path / "empty")
    (tmp_path / "empty" / ".empty-0123abcd.unfinished").mkdir()  # a kill
    (tmp_path / "empty" / ".empty.lock").touch()
    with whole_directory(tmp_path / "empty", new=True) as aside:
        (aside / "a").touch()
    assert names_in(tmp_path / "empty") == ["a"]

    def write_late() -> None:
        with whole_directory(tmp_path / "late", new=True) as aside:
            (aside / "ours").touch()
            (tmp_path / "late").mkdir()
            (tmp_path / "late" / "mine").touch()

    with pytest.raises(OSError, match="late"):
        write_late()
    assert names_in(tmp_path / "late") == ["mine"]


def test_a_failure_leaves_no_directory_that_it_made(tmp_path: Path) -> None:
    def write_beside() -> None:
        with made_directories(tmp_path / "kept" / "gone"):
            (tmp_path / "kept" / "mine").touch()
            raise OSError("full")

    with pytest.raises(OSError, match="full"):
        write_beside()
    assert names_in(tmp_path) == ["kept", "kept/mine"]


def test_the_umask_and_the_permissions_of_a_replaced_file_hold(tmp_path: Path) -> None:
    with whole_directory(tmp_path / "model", new=True) as aside:
        (aside / "sub").mkdir(mode=0o700)
        os.close(os.open(aside / "sub" / "weights", os.O_CREAT, 0o600))
    umask = os.umask(0o027)
    try:
        write_json(tmp_path / "a", 1)
        (tmp_path / "b").touch(0o604)
        (tmp_path / "b").chmod(0o604)
        write_json(tmp_path / "b", 1)
    finally:
        os.umask(umask)
    modes = {name: stat.S_IMODE((tmp_path / name).stat().st_mode) for name in names_in(tmp_path)}
    directory = 0o777 & ~umask
    assert modes == {
        "a": 0o640,
        "b": 0o604,
        "model": directory,
        "model/sub": directory,
        "model/sub/weights": directory & 0o666,
    }


def test_an_input_is_recognised_under_any_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("in.jsonl").touch()
    Path("hard.jsonl").hardlink_to("in.jsonl")
    Path("soft.jsonl").symlink_to("in.jsonl")
    for name in ("in.jsonl", "./in.jsonl", str(tmp_path / "in.jsonl"), "hard.jsonl", "soft.jsonl"):
        with pytest.raises(ValueError, match="out: expected a file other than the input"):
            expect_other(name, [Path("in.jsonl")])
    expect_other("new.jsonl", [Path("in.jsonl")])
    expect_other("new.jsonl", [Path("absent.jsonl")])


def test_streams_are_recognised(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "link").symlink_to("/dev/stdout")
    for path in (tmp_path / "pipe", Path("/dev/null"), Path("/dev/stdout"), Path("/proc/self/fd/1"), tmp_path / "link"):
        assert is_stream(path), path
        expect_free(path)
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    for path in (tmp_path, tmp_path / "absent", tmp_path / "loop"):
        assert not is_stream(path), path


def test_errors_name_the_file(tmp_path: Path) -> None:
    with pytest.raises(OSError, match=r"\[Errno 28\] No space left on device: '/dev/full'"):
        write_json(Path("/dev/full"), 1)
    for error, shown in (
        (OSError(errno.EIO, "broken"), "[Errno 5] broken: 'file.x'"),
        (OSError("several\nlines"), "file.x: several lines"),
        (OSError(errno.EIO, "broken", "b"), "[Errno 5] broken: 'b'"),
    ):
        with pytest.raises(OSError, match=f"^{re.escape(shown)}$"), naming_path("file.x"):
            raise error
    with pytest.raises(FileNotFoundError, match=r"found.json'$"), whole_file(tmp_path / "found.json"):
        pass  # nothing was written
    with pytest.raises(FileNotFoundError, match=r"absent/found.json'$"):
        write_json(tmp_path / "absent" / "found.json", 1)
