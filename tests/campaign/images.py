"""Images given to `load_image`: mutated files of all formats, arrays, tensors and PIL objects."""

import functools
import io
import random
import struct
import zlib
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch._subclasses.fake_tensor import FakeTensorMode

from lion_fast.io.images import load_image
from tests.campaign.running import Trial

# A picture with enough structure for every format; 40 x 24.
PIXELS = np.add.outer(np.arange(24) * 7, np.arange(120) * 2).reshape(24, 40, 3).astype(np.uint8)
LOSSLESS = ("PNG", "TIFF", "BMP", "PPM", "TGA", "SGI", "PCX")
MODES = ("1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "YCbCr", "I", "F", "I;16", "LAB", "HSV")
KINDS = ("int32", "uint16", "ascii", "rational", "bytes")


def make(rng: random.Random, folder: Path) -> Trial:
    kind = rng.choice([_file, _file, _file, _png, _tiff, _icon, _array, _array, _tensor, _tensor, _pil, _pil])
    return kind(rng, folder)


@functools.cache
def _files() -> list[tuple[str, str, bytes]]:
    """Return valid files, each with its format and mode."""
    found = []
    for mode in ("1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "I;16", "F"):
        if mode == "I;16":
            image = Image.fromarray(PIXELS[:, :, 0].astype(np.uint16) * 257)
        elif mode == "F":
            image = Image.fromarray(PIXELS[:, :, 0].astype(np.float32) / 255)
        else:
            image = Image.fromarray(PIXELS).convert(mode)
        exif = Image.Exif()
        exif[0x0112] = 6
        for name, settings in (
            ("AVIF", {}), ("BMP", {}), ("GIF", {}), ("GIF", {"save_all": True, "append_images": [image.copy()]}),
            ("ICO", {}), ("JPEG", {}), ("JPEG", {"progressive": True, "exif": exif}), ("JPEG2000", {}),
            ("JPEG2000", {"tile_size": (16, 16)}), ("MPO", {"save_all": True, "append_images": [image.copy()]}),
            ("PCX", {}), ("PNG", {}), ("PNG", {"exif": exif, "interlace": 1}), ("PPM", {}), ("SGI", {}), ("TGA", {}),
            ("TGA", {"compression": "tga_rle"}), ("WEBP", {}), ("WEBP", {"lossless": True, "exif": exif}),
            ("TIFF", {}), ("TIFF", {"compression": "tiff_lzw", "exif": exif}), ("TIFF", {"compression": "jpeg"}),
            ("TIFF", {"compression": "tiff_deflate"}), ("TIFF", {"compression": "group4"}),
        ):  # fmt: skip
            file = io.BytesIO()
            if mode not in {"group4": ("1",), "jpeg": ("L", "RGB")}.get(str(settings.get("compression")), (mode,)):
                continue  # libtiff's encoders crash on other modes
            try:
                image.save(file, name, **settings)
            except (OSError, ValueError, KeyError, RuntimeError):  # the format has no such mode
                continue
            if file.getvalue():
                lossy = "JPEG in TIFF" if settings.get("compression") == "jpeg" else name
                found.append((lossy, mode, file.getvalue()))
    return found


def _file(rng: random.Random, folder: Path) -> Trial:
    name, mode, content = rng.choice(_files())
    changes, content = _mutated(rng, content)
    check = _expect_pixels if not changes and name in LOSSLESS and mode in ("RGB", "RGBA") else None
    source: Any = content
    if rng.random() < 0.5:
        source = folder / f"a.{name.lower()[:4]}"
        source.write_bytes(content)
    elif rng.random() < 0.2:
        source = io.BytesIO(content)
    return _trial(f"{name} {mode} {changes} {content.hex() if len(content) < 400 else ''}", source, check)


def _mutated(rng: random.Random, content: bytes) -> tuple[list[str], bytes]:
    changes, data = [], bytearray(content)
    for _ in range(rng.choice([0, 1, 1, 2, 4])):
        at = rng.randrange(min(len(data), rng.choice([40, 200, len(data)]))) if data else 0
        change = rng.choice(["bit", "byte", "word", "cut", "drop", "copy", "zeros", "join", "huge"])
        changes.append(f"{change} {at}")
        if change == "bit" and data:
            data[at] ^= 1 << rng.randrange(8)
        elif change == "byte" and data:
            data[at] = rng.choice([0, 1, 127, 128, 255, rng.randrange(256)])
        elif change == "word":
            data[at : at + 4] = struct.pack(rng.choice("<>") + "I", rng.choice([0, 1, 0x7FFFFFFF, 0xFFFFFFFF, 65536]))
        elif change == "huge":
            data[at : at + 2] = b"\xff\xff"
        elif change == "cut":
            del data[at:]
        elif change == "drop":
            del data[at : at + rng.randrange(1, 40)]
        elif change == "copy":
            data[at:at] = data[rng.randrange(len(data) + 1) :][: rng.randrange(1, 60)]
        elif change == "zeros":
            data[at : at + 30] = bytes(30)
        elif change == "join":
            data[at:] = rng.choice(_files())[2][at:]
    return changes, bytes(data)


def _png(rng: random.Random, folder: Path) -> Trial:
    """A PNG file from chunks with correct checksums: sizes up to bombs, ancillary chunks of any content."""
    width, height = (rng.choice([0, 1, 40, 3000, 9459, 70_000_000, 0x7FFFFFFF]) for _ in range(2))
    bits, color = rng.choice([1, 2, 4, 8, 16, 3]), rng.choice([0, 2, 3, 4, 6, 1])
    rows = b"\0" * rng.choice([0, 1, 100, 1 << 16])
    chunks = [(b"IHDR", struct.pack(">IIBBBBB", width, height, bits, color, 0, 0, rng.choice([0, 0, 1, 7])))]
    for _ in range(rng.choice([0, 1, 3])):
        kind = rng.choice(
            [b"tEXt", b"zTXt", b"iTXt", b"iCCP", b"eXIf", b"tRNS", b"gAMA", b"pHYs", b"acTL", b"fcTL", b"PLTE", b"sRGB"]
        )
        body = rng.choice(
            [
                b"",
                b"a\0\0" + zlib.compress(bytes(1000)),
                rng.randbytes(rng.choice([1, 8, 26, 768])),
                b"II*\0" + rng.randbytes(30),
            ]
        )
        chunks.append((kind, body))
    chunks += [(b"IDAT", zlib.compress(rows)), (b"IEND", b"")]
    if rng.random() < 0.2:
        rng.shuffle(chunks)
    content = b"\x89PNG\r\n\x1a\n" + b"".join(_png_chunk(*chunk) for chunk in chunks)
    return _trial(f"png {width} x {height}, {bits} bits, colour {color}, {[chunk[0] for chunk in chunks]}", content)


def _png_chunk(name: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def _tiff(rng: random.Random, folder: Path) -> Trial:
    """A TIFF file whose tags have any type, count and value, some of them twice."""
    strip = zlib.compress(bytes(40 * 24 * 3)) if rng.random() < 0.3 else PIXELS.tobytes()
    tags: dict[int, tuple[int, list[int]]] = {
        256: (3, [40]), 257: (3, [24]), 258: (3, [8, 8, 8]), 259: (3, [8 if len(strip) < 2000 else 1]), 262: (3, [2]),
        273: (4, [0]), 277: (3, [3]), 278: (3, [24]), 279: (4, [len(strip)]),
    }  # fmt: skip
    changed = rng.choices(
        [*tags, 274, 284, 317, 320, 322, 323, 324, 325, 330, 338, 339, 347, 530, 33723, 34665],
        k=rng.choice([0, 1, 2, 3]),
    )
    extra = []
    for tag in changed:
        entry = (
            rng.choice([1, 2, 3, 4, 5, 6, 7, 9, 10, 11, 12, 13, 16, 0, 99]),
            [rng.choice([0, 1, 2, 5, 8, 24, 32, 40, 255, 1 << 15, (1 << 31) - 1, (1 << 32) - 1])]
            * rng.choice([1, 1, 2, 3, 0]),
        )
        if rng.random() < 0.2:
            extra.append((tag, *entry))
        else:
            tags[tag] = entry
    entries = sorted([(tag, *entry) for tag, entry in tags.items()] + extra, key=lambda entry: entry[0])
    order = rng.choice("<>")
    start = 8 + 2 + 12 * len(entries) + 4
    body, long = b"", b""
    for tag, kind, values in entries:
        if tag == 273 and values == [0]:
            values = [start + 400]
        size = {1: 1, 2: 1, 3: 2, 4: 4, 6: 1, 7: 1, 9: 4, 11: 4, 13: 4}.get(kind, 8)
        packed = b"".join(
            (value % (1 << (8 * size))).to_bytes(size, "little" if order == "<" else "big") for value in values
        )
        count = rng.choice([len(values)] * 9 + [0, 1 << 20, (1 << 32) - 1])
        if len(packed) > 4:
            at, long = start + len(long), long + packed
            packed = struct.pack(order + "I", at)
        body += struct.pack(order + "HHI", tag, kind, count) + packed.ljust(4, b"\0")
    header = (b"II" if order == "<" else b"MM") + struct.pack(order + "HI", 42, 8)
    content = header + struct.pack(order + "H", len(entries)) + body + struct.pack(order + "I", 0)
    content += long[:400].ljust(400, b"\0") + strip
    check = _expect_pixels if not changed and len(strip) > 2000 and order == "<" else None
    return _trial(f"tiff {order} {[e for e in entries if e[0] in changed]}", content, check)


def _icon(rng: random.Random, folder: Path) -> Trial:
    """An ICO file whose image has another size than its directory says."""
    side = rng.choice([1, 256, 9459, 13_000])
    inner = _png_chunk(b"IHDR", struct.pack(">IIBBBBB", side, side, 1, 0, 0, 0, 0)) + _png_chunk(
        b"IDAT", zlib.compress(bytes(10))
    )
    png = b"\x89PNG\r\n\x1a\n" + inner + _png_chunk(b"IEND", b"")
    bitmap = struct.pack("<IiiHHIIiiII", 40, side, 2 * side, 1, rng.choice([1, 8, 24, 32]), 0, 0, 0, 0, 0, 0) + bytes(
        99
    )
    image = rng.choice([png, bitmap])
    offset = rng.choice([22, 22, 22, 0, 1 << 31])
    entry = struct.pack("<BBBBHHII", rng.choice([0, 16]), 0, 0, 0, 1, rng.choice([0, 32]), len(image), offset)
    content = b"\0\0\1\0" + struct.pack("<H", rng.choice([1, 1, 0, 3])) + entry + image
    return _trial(f"ico {side} {image[:4]!r} {offset}", content)


def _array(rng: random.Random, folder: Path) -> Trial:
    shape = rng.choice([(24, 40, 3), (24, 40), (3, 24, 40), (24, 40, 4), (24, 40, 1)])
    if rng.random() < 0.3:
        shape = tuple(rng.choice([0, 1, 2, 3, 4, 40, 300_000]) for _ in range(rng.randint(0, 5)))
    dtype = rng.choice(
        [
            "?",
            "u1",
            "i1",
            "u2",
            ">u2",
            "i4",
            ">i8",
            "u4",
            "u8",
            "f2",
            "f4",
            ">f8",
            "g",
            "F",
            "O",
            "U3",
            "S2",
            "M8[s]",
            "m8[s]",
            "V4",
            [("r", "u1"), ("g", "u1")],
        ]
    )
    size = int(np.prod(shape, dtype=np.int64))
    if size > 1 << 22:
        array = np.broadcast_to(np.zeros((), dtype), shape)
    else:
        values = rng.choice([[0, 1], [0, 255], [0.0, 1.0], [-1, 2], [np.nan], [np.inf], [0.5, 70_000]])
        base = np.resize(np.array(values), size).reshape(shape)
        try:
            with np.errstate(all="ignore"):
                array = base.astype(dtype)
        except (TypeError, ValueError):
            array = np.zeros(shape, dtype)
    wrapping = rng.choice(["", "", "", "read-only", "negative", "masked", "matrix", "strided", "list", "memmap"])
    if wrapping == "read-only":
        array.setflags(write=False)
    elif wrapping == "negative" and array.ndim:
        array = array[::-1]
    elif wrapping == "masked" and array.dtype.names is None and array.size < 1 << 22:
        array = np.ma.masked_array(array, mask=rng.choice([False, True]))
    elif wrapping == "matrix" and array.ndim == 2:
        array = array.view(np.matrix)
    elif wrapping == "strided" and array.ndim:
        array = array[..., ::2]
    elif wrapping == "memmap" and 0 < array.size < 1 << 22 and array.dtype.kind in "biuf":
        file = folder / "array"
        array.tofile(file)
        array = np.memmap(file, array.dtype, "r", shape=array.shape)
    return _trial(f"array {shape} of {dtype}, {wrapping}", [array] if wrapping == "list" else array)


def _tensor(rng: random.Random, folder: Path) -> Trial:
    shape = rng.choice([(3, 24, 40), (24, 40), (24, 40, 3), (1, 24, 40), (4, 24, 40), (), (0, 3, 3), (2, 2, 2, 2)])
    dtypes = sorted((value for value in vars(torch).values() if isinstance(value, torch.dtype)), key=str)
    dtype = rng.choice([torch.uint8, torch.float32, torch.bfloat16, *dtypes])
    tensor = torch.rand(shape) if rng.random() < 0.8 else torch.full(shape, rng.choice([float("nan"), -1.0, 2.0]))
    try:
        tensor = tensor.to(dtype)
    except (RuntimeError, NotImplementedError, TypeError):
        tensor = torch.zeros((*shape[:-1], shape[-1] * dtype.itemsize) if shape else (), dtype=torch.uint8)
        tensor = tensor.view(dtype) if shape else tensor
    change = rng.choice(list(_TENSORS))
    try:
        changed = _TENSORS[change](tensor)
    except (RuntimeError, NotImplementedError, TypeError, ValueError, IndexError, AssertionError):
        changed, change = tensor, f"not {change}"
    description = f"tensor {shape} of {dtype}, {change}"
    if change in ("vmap", "grad"):
        transform = torch.vmap if change == "vmap" else torch.func.grad
        source = torch.zeros(2, 3, 4, 4) if change == "vmap" else torch.zeros(3, 4, 4)

        def inside() -> None:
            transform(load_image)(source)

        return Trial(description, inside, ("image", "Expected"))
    return _trial(description, changed)


def _fake(tensor: torch.Tensor) -> torch.Tensor:
    with FakeTensorMode():
        return torch.empty(tensor.shape, dtype=tensor.dtype)


def _shrunk(tensor: torch.Tensor) -> torch.Tensor:
    tensor = tensor.clone()
    tensor.untyped_storage().resize_(tensor.untyped_storage().nbytes() // 2)
    return tensor


_TENSORS: dict[str, Callable[[torch.Tensor], Any]] = {
    "plain": lambda tensor: tensor,
    "negative bit": lambda tensor: torch._neg_view(tensor),  # type: ignore[reportPrivateImportUsage]
    "imaginary part of a conjugate": lambda tensor: torch.complex(tensor, -tensor).conj().imag,
    "conjugate bit": lambda tensor: torch.complex(tensor, tensor).conj(),
    "fake": _fake,
    "meta": lambda tensor: tensor.to("meta"),
    "sparse": lambda tensor: tensor.to_sparse(),
    "csr": lambda tensor: tensor.to_sparse_csr(),
    "mkldnn": lambda tensor: tensor.to_mkldnn(),
    "nested": lambda tensor: torch.nested.nested_tensor([tensor, tensor]),
    "jagged": lambda tensor: torch.nested.nested_tensor([tensor, tensor], layout=torch.jagged),
    "quantized": lambda tensor: torch.quantize_per_tensor(tensor.float(), 0.1, 0, torch.quint8),
    "expanded": lambda tensor: tensor[..., :1].expand(3, 30_000, 30_000),
    "wide": lambda tensor: tensor.flatten()[:1].expand(1, 1, 70_000_000),
    "gradient": lambda tensor: tensor.requires_grad_() * 1,
    "parameter": lambda tensor: torch.nn.Parameter(tensor),
    "uninitialized": lambda tensor: torch.nn.UninitializedParameter(),
    "small storage": _shrunk,
    "functional": lambda tensor: torch._to_functional_tensor(tensor),  # type: ignore[reportPrivateImportUsage]
    "transposed": lambda tensor: tensor.mT,
    "inference": lambda tensor: torch.inference_mode()(tensor.clone)(),
    "numpy": lambda tensor: tensor.numpy(),
    "vmap": lambda tensor: tensor,
    "grad": lambda tensor: tensor,
}

ODD: tuple[Any, ...] = (None, 5, -1.5, "6", b"\x00", (6, 6), [6], {}, float("nan"), 1 << 70, "\ud800", object(), 9)


def _pil(rng: random.Random, folder: Path) -> Trial:
    lazy = rng.random() < 0.5
    if lazy:
        name, mode, content = rng.choice(_files())
        if rng.random() < 0.4:
            content = _mutated(rng, content)[1]
        try:
            image = Image.open(io.BytesIO(content))
        except Exception:
            image = Image.open(io.BytesIO(_files()[0][2]))
    else:
        name, mode = "memory", rng.choice(MODES)
        image = Image.new(mode, rng.choice([(40, 24), (1, 1), (0, 3), (3, 200_000)]))
    change = rng.choice(["", "info", "info", "exif", "closed", "info is", "seek", "bomb", "shut"])
    odd = rng.choice(ODD)
    key = rng.choice(
        [
            "exif",
            "transparency",
            "icc_profile",
            "xmp",
            "XML:com.adobe.xmp",
            "Raw profile type exif",
            "progressive",
            "duration",
            "loop",
        ]
    )
    if change == "info":
        image.info[key] = odd
    elif change == "info is":
        image.info = odd
    elif change == "exif":
        with suppress(OSError):  # of an image whose damage its decoder notices now
            image.getexif()[0x0112] = odd
    elif change == "closed":
        image.close()
    elif change == "seek" and getattr(image, "n_frames", 1) > 1:
        image.seek(1)
    elif change == "shut" and getattr(image, "fp", None) is not None:
        image.fp.close()  # type: ignore[attr-defined]
    elif change == "bomb":
        header = _png_chunk(b"IHDR", struct.pack(">IIBBBBB", 13_000, 13_000, 1, 0, 0, 0, 0))
        image = Image.open(
            io.BytesIO(b"\x89PNG\r\n\x1a\n" + header + _png_chunk(b"IDAT", b"") + _png_chunk(b"IEND", b""))
        )
    return _trial(f"PIL {name} {mode}, {change} {key if change == 'info' else ''} {odd!r:.40}", image)


def _trial(description: str, source: Any, check: Callable[[Any], None] | None = None) -> Trial:
    return Trial(description, lambda: load_image(source), ["image"], check or _expect_rgb)


def _expect_rgb(image: Any) -> None:
    assert (image.mode, min(image.size) > 0) == ("RGB", True), (image.mode, image.size)
    assert len(image.tobytes()) == 3 * image.width * image.height


def _expect_pixels(image: Any) -> None:
    pixels = np.asarray(image)
    assert any(np.array_equal(pixels, turned) for turned in (PIXELS, np.rot90(PIXELS, -1))), pixels[:2, :2].tolist()
