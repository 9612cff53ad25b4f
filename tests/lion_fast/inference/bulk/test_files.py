"""Folders and patterns with links, pipes and files that are no images."""

import os
import socket
from pathlib import Path

import pytest
from PIL import Image

from lion_fast.inference.bulk.files import find_files
from lion_fast.inference.bulk.job import BulkJob
from lion_fast.inference.bulk.sources import open_source


@pytest.fixture(autouse=True)
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    write("photos/0.png", "photos/sub/1.png", "elsewhere/2.png", "elsewhere/deep/3.png")
    return tmp_path


def write(*names: str) -> None:
    for name in names:
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (4, 4)).save(name)


def found(input: str) -> list[str]:
    return [name for name, _ in find_files(input)]


def expect_both(*names: str) -> None:
    """Check that a folder and the pattern over it find the same images."""
    assert found("photos") == sorted(names)
    assert found("photos/**/*.png") == sorted(f"photos/{name}" for name in names)


def test_links_to_folders_are_followed() -> None:
    os.symlink("../elsewhere", "photos/more")
    expect_both("0.png", "more/2.png", "more/deep/3.png", "sub/1.png")


def test_each_folder_is_visited_once() -> None:
    """A folder's own name wins over a link's, so that a link that is added changes no id."""
    for target, name in ((".", "photos/a"), ("..", "photos/b"), ("sub", "photos/c"), ("photos/sub", "photos/sub/d")):
        os.symlink(target, name)
    os.symlink("self", "photos/self")
    expect_both("0.png", "b/elsewhere/2.png", "b/elsewhere/deep/3.png", "sub/1.png")
    assert "photos/0.png" in found("**/*.png")


def test_a_link_to_nothing_is_an_input_with_an_error() -> None:
    os.symlink("absent.png", "photos/4.png")
    os.symlink("0.png", "photos/5.png")
    expect_both("0.png", "4.png", "5.png", "sub/1.png")
    source = open_source(BulkJob("caption", "photos", "out.jsonl", "model"))
    assert [source.id(index) for index in range(len(source))] == ["0.png", "4.png", "5.png", "sub/1.png"]


def test_what_systems_write_beside_files_is_passed_over() -> None:
    write("photos/__MACOSX/0.png", "photos/.hidden/6.png", "photos/.7.png")
    for name in ("._0.png", ".DS_Store", "Thumbs.db", "list.txt", "table.jsonl", "old.zip"):
        (Path("photos") / name).write_bytes(b"\0\5\x16\7")
    expect_both("0.png", "sub/1.png")
    assert found("photos/.*.png") == ["photos/.7.png", "photos/._0.png"]


def test_shards_beside_images_are_ambiguous() -> None:
    Path("photos/old.tar").write_bytes(b"")
    with pytest.raises(ValueError, match=r"in the directory photos, got both, such as old.tar and 0.png; a pattern"):
        find_files("photos")
    Path("photos/sub/old.tar").write_bytes(b"")
    assert found("photos/*.tar") == ["photos/old.tar"]
    Path("shards/x.tar").mkdir(parents=True)
    Path("shards/A.TAR").write_bytes(b"")
    assert found("shards") == ["A.TAR"]


@pytest.mark.parametrize("input", ["photos", "photos/*.tar", "photos/*"])
def test_a_pipe_is_not_opened(input: str) -> None:
    os.remove("photos/0.png")
    os.remove("photos/sub/1.png")
    os.mkfifo("photos/pipe.tar")
    with pytest.raises(
        FileNotFoundError, match=r"photos/pipe.tar: expected a .tar file, got a pipe, a socket or a device"
    ):
        open_source(BulkJob("caption", input, "out.jsonl", "model"))


def test_a_socket_named_as_an_image_is_an_input_with_an_error() -> None:
    with socket.socket(socket.AF_UNIX) as server:
        server.bind("photos/s.png")
    assert found("photos") == ["0.png", "s.png", "sub/1.png"]


def test_names_that_become_equal_are_refused() -> None:
    write("photos/\udcff.png", r"photos/\udcff.png")
    with pytest.raises(ValueError, match="input: expected files with different names in UTF-8, got"):
        open_source(BulkJob("caption", "photos", "out.jsonl", "model"))


@pytest.mark.parametrize(
    ("pattern", "names"),
    [
        ("**/**/[01].png", ["photos/0.png", "photos/sub/1.png"]),
        ("./photos/?.png", ["./photos/0.png"]),
        ("photos/../elsewhere/**", ["photos/../elsewhere/2.png", "photos/../elsewhere/deep/3.png"]),
        ("*/*/*.png", ["elsewhere/deep/3.png", "photos/sub/1.png"]),
        ("photos/su[b]/1.png", ["photos/sub/1.png"]),
    ],
)
def test_patterns_are_those_of_glob(pattern: str, names: list[str], root: Path) -> None:
    assert found(pattern) == names
    absolute = f"{root}/{pattern.removeprefix('./')}"
    assert found(absolute) == [f"{root}/{name.removeprefix('./')}" for name in names]


@pytest.mark.parametrize(
    "pattern", ["photos/*/", "absent/*", "", "\0*", "*\0", "x" * 5000, "[", "*.gif", "photos/0.png/*"]
)
def test_a_pattern_without_files_is_an_error(pattern: str) -> None:
    with pytest.raises(FileNotFoundError, match="input: expected a file, a directory, or a pattern that matches files"):
        find_files(pattern)
