"""Loading images: every type of input becomes the same upright RGB, and invalid input is refused by name."""

import contextlib
import io
import multiprocessing
import struct
import warnings
import zlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageFile, ImageOps, PngImagePlugin
from torch._subclasses.fake_tensor import FakeTensorMode

from lion_fast.io.images import image_suffixes, load_batches, load_image, load_images

# Two rows of five distinct pixels, which reveal any rotation, flip or swap of channels.
PIXELS = np.random.default_rng(0).integers(0, 256, (2, 5, 3), dtype=np.uint8)


def pixels_of(image) -> np.ndarray:
    loaded = load_image(image)
    assert loaded.mode == "RGB"
    return np.asarray(loaded)


@pytest.fixture
def image(tmp_path) -> Path:
    path = tmp_path / "image.png"
    Image.fromarray(PIXELS).save(path)
    return path


@pytest.mark.parametrize(
    "array",
    [
        PIXELS,
        PIXELS.transpose(2, 0, 1),
        PIXELS.astype(np.int64),
        PIXELS.astype(np.uint16) * 257,
        PIXELS.astype(np.float32) / 255,
        PIXELS.astype(np.float64) / 255 * (1 + 1e-4),
        np.dstack([PIXELS, np.full((2, 5), 40, np.uint8)]),
        torch.tensor(PIXELS),
        torch.tensor(PIXELS).permute(2, 0, 1),
        (torch.tensor(PIXELS) / 255).permute(2, 0, 1).requires_grad_(),
        (torch.tensor(PIXELS) / 255).half(),
    ],
    ids=["HWC", "CHW", "int64", "uint16", "float32", "overshoot", "RGBA", "tensor", "tensor-CHW", "grad", "half"],
)
def test_arrays_give_the_same_image_in_any_layout_and_type(array):
    np.testing.assert_array_equal(pixels_of(array), PIXELS)


def test_bfloat16_is_read_to_its_precision():
    loaded = pixels_of((torch.tensor(PIXELS) / 255).bfloat16()).astype(int)
    assert np.abs(loaded - PIXELS).max() <= 1  # 8 bits of mantissa: half a unit of 1/256 at values near 1


@pytest.mark.parametrize("shape", [(2, 5), (2, 5, 1), (1, 2, 5)])
def test_grey_arrays_have_three_equal_channels(shape):
    grey = PIXELS[:, :, 0]
    np.testing.assert_array_equal(pixels_of(grey.reshape(shape)), np.dstack([grey] * 3))


def test_booleans_are_black_and_white():
    assert pixels_of(np.array([[True, False]])).tolist() == [[[255] * 3, [0] * 3]]


def test_ambiguous_arrays_are_channels_last_and_ambiguous_tensors_channels_first():
    array = np.arange(3 * 5 * 3, dtype=np.uint8).reshape(3, 5, 3)
    assert load_image(array).size == (5, 3)
    assert load_image(torch.tensor(array)).size == (3, 5)


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "YCbCr", "HSV"])
def test_every_mode_is_converted_as_by_pillow(mode):
    image = Image.fromarray(PIXELS).convert(mode)
    np.testing.assert_array_equal(pixels_of(image), np.asarray(image.convert("RGB")))


SIXTEEN_BITS = np.array([[0, 255, 256, 0x1234, 0x8000, 0xFFFF]])
HIGH_BYTES = [0, 0, 1, 0x12, 0x80, 0xFF]


@pytest.mark.parametrize(
    ("grey", "mode", "tones"),
    [
        (SIXTEEN_BITS.astype("<u2"), "I;16", HIGH_BYTES),
        (SIXTEEN_BITS.astype(">u2"), "I;16B", HIGH_BYTES),
        (SIXTEEN_BITS.astype("<i4"), "I", HIGH_BYTES),
        (np.array([[0, 128, 255]], np.int32), "I", [0, 128, 255]),  # may hold eight bits
        (np.array([[0, 0.5, 1]], np.float32), "F", [0, 128, 255]),
    ],
)
def test_grey_of_any_depth_keeps_its_tones(grey, mode, tones):
    image = Image.fromarray(grey)
    assert image.mode == mode
    assert pixels_of(image).tolist() == [[[tone] * 3 for tone in tones]]


def test_sixteen_bit_png_is_scaled_not_clipped(tmp_path):
    Image.fromarray(SIXTEEN_BITS.astype(np.uint16)).save(tmp_path / "deep.png")
    assert pixels_of(tmp_path / "deep.png")[0, :, 0].tolist() == HIGH_BYTES


def test_transparency_is_dropped_and_not_blended():
    clear_red = Image.new("RGBA", (1, 1), (200, 10, 20, 0))
    assert pixels_of(clear_red).tolist() == [[[200, 10, 20]]]


# The transformation of an array [H, W, C] for each EXIF orientation (TIFF 6.0, tag 274).
UPRIGHT = {
    1: lambda a: a,
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.transpose(1, 0, 2),
    6: lambda a: a.transpose(1, 0, 2)[:, ::-1],
    7: lambda a: a.transpose(1, 0, 2)[::-1, ::-1],
    8: lambda a: a.transpose(1, 0, 2)[::-1],
}


@pytest.mark.parametrize("orientation", UPRIGHT)
@pytest.mark.parametrize("suffix", ["png", "tiff"])
def test_images_are_turned_upright_once(tmp_path, orientation, suffix):
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = tmp_path / f"turned.{suffix}"
    Image.fromarray(PIXELS).save(path, exif=exif)
    loaded = load_image(path)
    np.testing.assert_array_equal(np.asarray(loaded), UPRIGHT[orientation](PIXELS))
    np.testing.assert_array_equal(pixels_of(loaded), np.asarray(loaded))


def test_damaged_exif_fields_do_not_affect_the_orientation(tmp_path):
    orientation = struct.pack("<HHIHH", 0x0112, 3, 1, 6, 0)
    date_that_is_a_number = struct.pack("<HHIHH", 0x0132, 5, 1, 38, 0) + struct.pack("<III", 0, 1, 1)
    exif = b"Exif\0\0" + b"II*\0" + struct.pack("<IH", 8, 2) + orientation + date_that_is_a_number
    Image.fromarray(PIXELS).save(tmp_path / "odd.png", exif=exif)
    with pytest.raises(AttributeError):  # Pillow's own function fails
        ImageOps.exif_transpose(Image.open(tmp_path / "odd.png"))
    np.testing.assert_array_equal(pixels_of(tmp_path / "odd.png"), UPRIGHT[6](PIXELS))


def test_truncated_exif_data_are_no_reason_for_a_warning(tmp_path, recwarn):
    Image.fromarray(PIXELS).save(tmp_path / "cut.png", exif=b"Exif\0\0" + b"II*\0" + struct.pack("<IH", 8, 2) + b"\0\0")
    with pytest.warns(UserWarning, match="Corrupt EXIF"):
        Image.open(tmp_path / "cut.png").getexif().get(0x0112)
    np.testing.assert_array_equal(pixels_of(tmp_path / "cut.png"), PIXELS)
    assert "EXIF" not in "".join(str(warning.message) for warning in recwarn.list)


def test_an_animation_gives_its_first_frame(tmp_path):
    first, second = Image.new("RGB", (4, 4), (255, 0, 0)), Image.new("RGB", (4, 4), (0, 0, 255))
    first.save(tmp_path / "moving.gif", save_all=True, append_images=[second])
    assert pixels_of(tmp_path / "moving.gif")[0, 0].tolist() == [255, 0, 0]


def test_the_callers_image_is_not_modified():
    image = Image.fromarray(PIXELS)
    image.info["comment"] = "mine"
    load_image(image).putpixel((0, 0), (1, 2, 3))
    assert image.info == {"comment": "mine"}
    np.testing.assert_array_equal(np.asarray(image), PIXELS)


@pytest.mark.parametrize("suffix", ["png", "jpg", "gif", "webp", "bmp"])
def test_a_truncated_file_is_refused(tmp_path, suffix):
    path = tmp_path / f"half.{suffix}"
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    Image.fromarray(noise).save(path)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(ValueError, match=rf"image \(.*half\.{suffix}\): expected a"):
        load_image(path)


@pytest.mark.parametrize("content", [b"", b"no image", b"\x89PNG\r\n\x1a\n", b"GIF89a"])
def test_a_file_that_is_not_an_image_is_refused(tmp_path, content):
    (tmp_path / "notes.txt").write_bytes(content)
    with pytest.raises(ValueError, match=r"notes\.txt\): expected an? (whole )?image"):
        load_image(tmp_path / "notes.txt")


@given(damage=st.lists(st.tuples(st.integers(0, 2000), st.integers(0, 255)), min_size=1, max_size=20))
def test_a_damaged_file_gives_an_image_or_a_value_error(damage, tmp_path_factory):
    path = tmp_path_factory.getbasetemp() / "damaged.jpg"
    Image.fromarray(np.tile(PIXELS, (8, 8, 1))).save(path)
    content = bytearray(path.read_bytes())
    for position, value in damage:
        content[position % len(content)] = value
    path.write_bytes(content)
    with warnings.catch_warnings(), contextlib.suppress(ValueError):
        warnings.simplefilter("ignore")
        assert load_image(path).mode == "RGB"


def png_of_claimed_size(width: int, height: int) -> bytes:
    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("side", [9460, 10_000, 60_000], ids=["above the limit", "warning", "error"])
def test_a_decompression_bomb_is_refused_before_it_is_read(tmp_path, side):
    (tmp_path / "bomb.png").write_bytes(png_of_claimed_size(side, side))
    with pytest.raises(ValueError, match=r"bomb\.png\): expected at most 89478485 pixels"):
        load_image(tmp_path / "bomb.png")


def test_postscript_is_refused(tmp_path):
    """Pillow would run Ghostscript on it."""
    Image.fromarray(PIXELS).save(tmp_path / "image.eps")
    with pytest.raises(ValueError, match=r"image\.eps\): expected an image file"):
        load_image(tmp_path / "image.eps")


@pytest.mark.parametrize("path", ["nowhere.png", ".", "a" * 5000, "a\0b", ""])
def test_a_path_that_is_not_a_file_is_named(tmp_path, monkeypatch, path):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(
        FileNotFoundError, match=rf"^image \({'.*' if path else 'an empty path'}\): expected an image file"
    ):
        load_image(path)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (np.zeros((0, 3, 3), np.uint8), r"with pixels, got shape \(0, 3, 3\)"),
        (Image.new("RGB", (0, 4)), "with pixels, got 0 x 4"),
        (np.zeros((5, 5, 2), np.uint8), r"C of 1, 3 or 4, got \(5, 5, 2\)"),
        (np.zeros(4, np.uint8), r"got \(4,\)"),
        (np.zeros((1, 1, 4, 4), np.uint8), r"got \(1, 1, 4, 4\)"),
        (np.full((2, 2), np.nan), r"in 0\.\.1, got nan\.\.nan"),
        (np.array([[0, np.inf]]), r"got 0\.\.inf"),
        (np.array([[0.0, 200.0]]), r"pass values in 0\.\.255 as uint8"),
        (torch.tensor([[-2.1, 2.6]]), "normalised pixels are not supported"),
        (np.array([[-1, 3]]), r"int64 values in 0\.\.255, got -1\.\.3"),
        (np.array([[0, 300]]), r"int64 values in 0\.\.255, got 0\.\.300"),
        (np.array([[1j]]), "complex128"),
        (torch.eye(3).to_sparse(), "a plain dense tensor"),
        (torch.zeros(3, 4, 4, device="meta"), "a plain dense tensor"),
        (np.array([["a"]]), "<U1"),
        (Image.fromarray(np.array([[70_000]], np.int32)), r"0\.\.65535, got 70000"),
    ],
)
def test_invalid_values_are_refused(value, message):
    with pytest.raises(ValueError, match=f"^photo: expected .*{message}"):
        load_image(value, "photo")


def test_bytes_are_read_like_the_file(tmp_path):
    path = tmp_path / "image.png"
    Image.new("RGB", (5, 3), "red").save(path)
    content = path.read_bytes()
    assert load_image(content).tobytes() == load_image(path).tobytes()
    assert [image.size for image in load_images([content, path])] == [(5, 3), (5, 3)]
    assert load_images(content)[0].size == (5, 3)
    with pytest.raises(ValueError, match=r"images\[1\]: expected a whole image|images\[1\]: expected an image file"):
        load_images([content, content[:-20]])


@pytest.mark.parametrize("value", [None, 3, bytearray(b"bytes"), range(3)])
def test_other_types_are_refused(value):
    with pytest.raises(TypeError, match=f"image: expected a PIL image, .* got {type(value).__name__}"):
        load_image(value)


def test_a_sequence_may_mix_all_types(image):
    kinds = [image, str(image), Image.open(image), PIXELS, torch.tensor(PIXELS)]
    for loaded in load_images(kinds):
        np.testing.assert_array_equal(np.asarray(loaded), PIXELS)


@pytest.mark.parametrize("convert", [np.asarray, torch.tensor])
def test_an_array_of_four_dimensions_is_a_batch(convert):
    batch = convert(np.stack([PIXELS, PIXELS[::-1]]))
    first, second = load_images(batch)
    np.testing.assert_array_equal(np.asarray(first), PIXELS)
    np.testing.assert_array_equal(np.asarray(second), PIXELS[::-1])


def test_a_single_image_gives_a_list_of_one(image):
    assert [len(load_images(one)) for one in (image, str(image), PIXELS, Image.open(image))] == [1] * 4


def test_errors_name_the_index_in_the_batch(image):
    with pytest.raises(ValueError, match=r"^images\[1\]: "):
        load_images([image, np.zeros((2, 2, 7))])
    with pytest.raises(ValueError, match="images: expected at least one image"):
        load_images([])


def tiff(*changes: tuple[int, int, int, int]) -> bytes:
    """Return a TIFF file of one pixel whose entries of (tag, type, count, value) differ or are added."""
    entries = {256: (3, 1, 1), 257: (3, 1, 1), 258: (3, 1, 8), 259: (3, 1, 1), 262: (3, 1, 1), 273: (4, 1, 8)}
    entries |= {tag: entry for tag, *entry in changes}  # type: ignore[misc]
    body = b"".join(struct.pack("<HHII", tag, *entry) for tag, entry in sorted(entries.items()))
    return struct.pack("<2sHIH", b"II", 42, 8, len(entries)) + body + struct.pack("<I", 0)


@pytest.mark.parametrize(
    "error", [MemoryError(), struct.error("x"), zlib.error("x\ny" * 999), KeyError(3), ZeroDivisionError(), TypeError()]
)
@pytest.mark.parametrize("stage", ["open", "load"])
def test_any_exception_of_a_decoder_is_an_unreadable_image(monkeypatch, image, error, stage):
    def fails(*_, **__):
        raise error

    where = (Image, "open") if stage == "open" else (PngImagePlugin.PngImageFile, "load")
    monkeypatch.setattr(*where, fails)
    with pytest.raises(ValueError, match=r"^image \(.*image\.png\): expected an? (whole )?image") as caught:
        load_image(image)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 1000


def test_tags_of_wrong_types_are_an_unreadable_image():
    assert load_image(tiff()).size == (1, 1)
    with pytest.raises(ValueError, match="image: expected"):
        load_image(tiff((273, 2, 2, 8)))  # a text for the offset of the pixels: TypeError from inside Pillow


def test_unreadable_exif_data_leave_the_image_as_it_is():
    for exif in (b"Exif\0\0nothing", 5, None, "II*"):
        image = Image.fromarray(PIXELS)
        image.info["exif"] = exif
        np.testing.assert_array_equal(pixels_of(image), PIXELS)
    image = Image.fromarray(PIXELS)
    image.getexif()[0x0112] = [6]
    np.testing.assert_array_equal(pixels_of(image), PIXELS)


def one_bit_png(width: int, height: int) -> bytes:
    file = io.BytesIO()
    Image.new("1", (width, height)).save(file, "PNG")
    return file.getvalue()


def icon_of(png: bytes) -> bytes:
    return b"\0\0\1\0\1\0" + struct.pack("<BBBBHHII", 16, 16, 0, 0, 1, 32, len(png), 22) + png


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (png_of_claimed_size(70_000_000, 1), "at most 131072 pixels per side, got 70000000 x 1"),
        (png_of_claimed_size(1, 70_000_000), "at most 131072 pixels per side, got 1 x 70000000"),
        (icon_of(png_of_claimed_size(13_000, 13_000)), "at most 89478485 pixels, got 13000 x 13000"),
    ],
    ids=["wide", "tall", "icon"],
)
def test_a_size_is_refused_before_it_is_decoded(content, message, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)  # as people set it to read large images
    with pytest.raises(ValueError, match=f"image: expected {message}"):
        load_image(content)
    if "icon" not in message and content.startswith(b"\x89PNG"):
        with pytest.raises(ValueError, match=f"image: expected {message}"):
            load_image(Image.open(io.BytesIO(content)))  # not decoded yet


def test_a_jpeg_of_many_scans_is_refused(monkeypatch):
    file = io.BytesIO()
    Image.new("RGB", (800, 800)).save(file, "JPEG", progressive=True)
    content = file.getvalue()
    scan = content[content.rindex(b"\xff\xda") : -2]
    assert load_image(content).size == (800, 800)
    with pytest.raises(ValueError, match=r"pixels in all scans of a JPEG file, got \d+ for 800 x 800"):
        load_image(content[:-2] + scan * 8000 + content[-2:])


def test_a_tile_larger_than_its_image_counts():
    with pytest.raises(ValueError, match=r"at most 1000000000 bytes to decode it, got 3600000001 for 1 x 1"):
        load_image(tiff((322, 4, 1, 60_000), (323, 4, 1, 60_000), (324, 4, 1, 8), (325, 4, 1, 9)))


@pytest.mark.parametrize(
    "array", [np.broadcast_to(np.uint8(7), (30_000, 30_000, 3)), torch.zeros(1).expand(3, 30_000, 30_000)]
)
def test_an_array_of_gigabytes_is_refused_at_once(array):
    with pytest.raises(ValueError, match="expected at most 89478485 pixels, got 30000 x 30000"):
        load_image(array)


def test_large_arrays_are_converted_in_bands():
    array = np.random.default_rng(0).random((1500, 1500, 3), np.float32)
    np.testing.assert_array_equal(pixels_of(array), np.rint(array * 255).astype(np.uint8))
    array[-1, -1, -1] = np.nan
    with pytest.raises(ValueError, match=r"got nan\.\.nan"):
        load_image(array)
    deep = np.arange(1500 * 1500, dtype=np.int32).reshape(1500, 1500) % 65536
    np.testing.assert_array_equal(pixels_of(Image.fromarray(deep))[:, :, 0], deep >> 8)


def test_a_negative_bit_is_resolved():
    negated = torch.complex(torch.zeros(3, 2, 5), torch.tensor(PIXELS).permute(2, 0, 1) / -255.0).conj().imag
    assert negated.is_neg()
    np.testing.assert_array_equal(pixels_of(negated), PIXELS)


def fake() -> torch.Tensor:
    with FakeTensorMode():
        return torch.zeros(3, 4, 4)


def without_storage() -> torch.Tensor:
    tensor = torch.zeros(3, 400, 400)
    tensor.untyped_storage().resize_(0)
    return tensor


@pytest.mark.parametrize(
    "make",
    [
        fake,
        without_storage,
        lambda: torch.nested.nested_tensor([torch.zeros(3, 4, 4)]),
        lambda: torch.nn.UninitializedParameter(),
        lambda: torch.zeros(3, 4, 4).to_mkldnn(),
        lambda: torch.zeros(3, 4, 4, dtype=torch.uint8).view(torch.bits8),
        lambda: torch.zeros(3, 4, 4, dtype=torch.complex32),
        lambda: np.zeros((4, 4), [("r", "u1")]),
        lambda: np.zeros((4, 4), "M8[s]"),
        lambda: np.zeros((4, 4), object),
        lambda: np.ma.masked_array(np.zeros((4, 4)), mask=True),
    ],
)
def test_tensors_and_arrays_without_plain_values_are_refused(make):
    with pytest.raises(ValueError, match=r"^photo: expected "):
        load_image(make(), "photo")
    assert load_image(torch.zeros(3, 4, 4, dtype=torch.float8_e5m2)).size == (4, 4)
    assert load_image(np.matrix([[0, 255]])).size == (2, 1)


def test_what_the_callers_own_object_raises_gets_a_note():
    class Own(Sequence):
        def __len__(self):
            return 3

        def __getitem__(self, index):
            if index == 1:
                raise LookupError("mine")
            return PIXELS

    class OwnImage(Image.Image):
        def load(self):
            raise LookupError("mine")

    own = OwnImage()
    own.__setstate__(Image.fromarray(PIXELS).__getstate__())
    for call, note in (
        (lambda: load_images(Own()), "raised by images[1]"),
        (lambda: load_image(own), "raised by image"),
    ):
        with pytest.raises(LookupError, match="mine") as caught:
            call()
        assert caught.value.__notes__ == [note]


def test_a_registered_plug_in_is_read(tmp_path, monkeypatch):
    class Heif(ImageFile.ImageFile):
        format = "HEIF"

        def _open(self):
            if self.fp.read(4) != b"heif":
                raise SyntaxError("not HEIF")
            self._size, self._mode = (2, 1), "RGB"
            self.tile = [("raw", (0, 0, 2, 1), 4, ("RGB", 0, 1))]

    (tmp_path / "a.heic").write_bytes(b"heif" + bytes(range(6)))
    with pytest.raises(ValueError, match=r"a\.heic\): expected an image file, of one of the formats"):
        load_image(tmp_path / "a.heic")
    assert ".heic" not in image_suffixes()
    Image.init()
    for registry in ("ID", "OPEN", "EXTENSION"):  # restored after the test
        monkeypatch.setattr(Image, registry, getattr(Image, registry).copy())
    Image.register_open("HEIF", Heif, lambda prefix: prefix.startswith(b"heif"))
    Image.register_extension("HEIF", ".heic")
    assert pixels_of(tmp_path / "a.heic").tolist() == [[[0, 1, 2], [3, 4, 5]]]
    assert ".heic" in image_suffixes()


def batch_of_large_images(path: Path) -> int:
    """Return the bytes by which the peak memory of this process grows."""

    def status(name: str) -> int:
        lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith(name)) << 10

    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    before = status("VmHWM")
    (batch,) = load_batches([path] * 4, 4, lambda image: image.resize((224, 224), Image.Resampling.BICUBIC))
    assert [image.size for image in batch] == [(224, 224)] * 4
    return status("VmHWM") - before


def test_a_batch_holds_one_image_at_its_full_size(tmp_path):
    (tmp_path / "bomb.png").write_bytes(one_bit_png(6000, 6000))  # 36 million pixels in 5 kB
    with multiprocessing.get_context("fork").Pool(1) as pool:
        grown = pool.apply(batch_of_large_images, (tmp_path / "bomb.png",))
    assert 0 < grown < 36e6 * 8  # four of them take 16 bytes per pixel
