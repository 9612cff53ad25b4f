"""Drawings replace drawings, and nothing else."""

import os
from pathlib import Path

import pytest
from PIL import Image

from lion_fast.io.drawings import expect_drawing, save_drawing
from lion_fast.io.owning import OutputExistsError

IMAGE = Image.new("RGB", (4, 4), "red")


def test_a_drawing_replaces_a_drawing(tmp_path: Path) -> None:
    path = tmp_path / "a.located.png"
    for image in (IMAGE, Image.new("RGB", (5, 5))):
        expect_drawing(path, "a.png")
        save_drawing(image, path)
        with Image.open(path) as found:
            assert found.size == image.size
    assert os.listdir(tmp_path) == ["a.located.png"]


@pytest.mark.parametrize("name", ["a.png", "a.jpg", "a.bmp"])
def test_another_image_is_replaced_only_if_told_to(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    for content in (b"mine", b""):
        path.write_bytes(content)
        if not content:
            IMAGE.save(path)
        before = path.read_bytes()
        with pytest.raises(OutputExistsError, match=f"--output: expected the name of a new file, got .*{name}"):
            expect_drawing(path, "b.png")
        assert path.read_bytes() == before
        expect_drawing(path, "b.png", overwrite=True)
    save_drawing(Image.new("RGB", (5, 5)), path)
    with Image.open(path) as found:
        assert found.size == (5, 5)


def test_the_image_itself_is_never_drawn_over(tmp_path: Path) -> None:
    image = tmp_path / "a.png"
    save_drawing(IMAGE, image)
    (tmp_path / "b.png").symlink_to(image)
    for path in (image, tmp_path / "b.png", tmp_path / "." / "a.png"):
        with pytest.raises(ValueError, match="--output: expected a file other than the input"):
            expect_drawing(path, image, overwrite=True)
    with pytest.raises(ValueError, match=r"--output: expected a suffix of an image format, such as .png, got .*a.txt"):
        expect_drawing(tmp_path / "a.txt", image)
    (tmp_path / "c.png").mkdir()
    with pytest.raises(IsADirectoryError, match="--output: expected a file, got the directory"):
        expect_drawing(tmp_path / "c.png", image)
