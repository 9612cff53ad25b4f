"""Strict JSON, and errors of readers that name the file."""

import errno
import os
from pathlib import Path

import numpy as np
import pytest
import torch

from lion_fast.io.reading import (
    Repeated,
    check_regular,
    naming,
    on_one_line,
    opened,
    parse_json,
    read_content,
    shown,
)


def test_json_is_that_of_the_standard_with_unique_names() -> None:
    assert parse_json(b'\xef\xbb\xbf{"a": [1, 2.5, null, "\xc3\xa9"]}') == {"a": [1, 2.5, None, "é"]}
    fields = parse_json('{"a": 1, "b": {"c": 1, "c": 1}, "a": 2}')
    assert isinstance(fields["a"], Repeated)
    assert isinstance(fields["b"]["c"], Repeated)
    lenient = parse_json("[NaN, " + "9" * 5000 + ", -" + "9" * 5000 + "]", standard=False)
    assert str(lenient) == "[nan, inf, -inf]"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[NaN]", "NaN is no JSON"),
        ("9" * 5000, "Exceeds the limit"),
        ("[" * 100_000, "nested too deeply"),
        (b"\xff", "can't decode byte 0xff"),
        ("{}".encode("utf-16"), "expected UTF-8, got UTF-16"),
        ("{}".encode("utf-32"), "expected UTF-8, got UTF-32"),
        ("{}".encode("utf-16-le"), "Expecting property name"),
        (b'"\xed\xa0\x80"', "can't decode byte 0xed"),
    ],
)
def test_other_content_is_no_json(content: str | bytes, message: str) -> None:
    with pytest.raises(ValueError, match=rf"^not JSON \(.*{message}"):
        parse_json(content)


def test_any_exception_of_a_reader_names_the_file() -> None:
    class OwnError(ValueError):
        pass

    with pytest.raises(OwnError, match=r"^a.x: not a table \(one two\)$"), naming("a.x", "a table", OwnError):
        raise RuntimeError("one\ntwo")
    with pytest.raises(OwnError, match=r"^a.x: not a table \(KeyError\)$"), naming("a.x", "a table", OwnError):
        raise KeyError
    with pytest.raises(OwnError, match=r"^a.x: as it is$"), naming("a.x", "a table", OwnError):
        raise OwnError("a.x: as it is")
    assert on_one_line("a\nb") == "a\\nb"


def test_values_are_short_whatever_they_are() -> None:
    class Broken:
        def __repr__(self) -> str:
            raise KeyError

    assert shown("a\nb") == r"'a\nb'"
    assert shown("x" * 10**6) == "'" + "x" * 115 + "...'"
    assert shown([0] * 10**6) == "[0, 0, 0, 0, 0, 0, ...]"
    assert shown(10**5000) == "an integer of 16610 bits"
    assert shown(np.zeros((2, 2))) == "array([[0., 0.], [0., 0.]])"
    assert shown([torch.zeros(2, 3)]) == "[a tensor torch.float32 [2, 3]]"
    assert shown(Broken()) == "Broken, whose repr raises KeyError"


def test_errors_of_the_kernel_name_the_file_and_do_not_blame_its_content(tmp_path: Path) -> None:
    with pytest.raises(OSError, match=r"^\[Errno 21\] Is a directory: '/'$"), naming("/", "a table"):
        os.read(os.open("/", os.O_RDONLY), 1)
    with pytest.raises(ValueError, match=r"^a.x: not a table \(no table\)$"), naming("a.x", "a table"):
        raise OSError("no table")
    (tmp_path / "a").write_bytes(b"content")
    assert read_content(tmp_path / "a") == b"content"
    with pytest.raises(OSError, match=rf"Input/output error: '{tmp_path}/a'$"), opened(tmp_path / "a"):
        raise OSError(errno.EIO, os.strerror(errno.EIO))
    shorter = f"^{tmp_path}/a: expected 7 bytes, as when it was first read, got 3$"
    with opened(tmp_path / "a", 7) as file:
        assert file.read() == b"content"
    os.truncate(tmp_path / "a", 3)
    with pytest.raises(OSError, match=shorter), opened(tmp_path / "a", 7):
        pytest.fail("a truncated file was opened")


def test_a_file_that_is_truncated_while_it_is_read_is_named(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"content")

    def truncate_and_read() -> None:
        with opened(tmp_path / "a", 7) as file:
            os.truncate(tmp_path / "a", 3)
            if file.read() != b"content":
                raise ValueError("what was read makes no sense")

    with pytest.raises(OSError, match=r"/a: expected 7 bytes, as when it was first read, got 3$"):
        truncate_and_read()


def test_only_regular_files_are_opened(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to("absent")
    for path, got in (
        (tmp_path, "a directory"),
        (tmp_path / "absent", "nothing at that path"),
        (tmp_path / "link", "a link to nothing"),
        (Path("/dev/null"), "a pipe, a socket or a device"),
        (Path("a\0b"), "nothing at that path"),
    ):
        with pytest.raises(FileNotFoundError, match=f": expected a file of words, got {got}$"):
            check_regular(path, "a file of words")
