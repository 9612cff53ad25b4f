"""Memory and work of decoding a PIL image, estimated from its header before its pixels are allocated."""

from PIL import Image, JpegImagePlugin, PpmImagePlugin, TiffImagePlugin

_RGB = 4  # bytes per pixel of Pillow's RGB
_STORED = {"1": 1, "L": 1, "P": 1, "I;16": 2, "I;16B": 2, "I;16L": 2, "I;16N": 2}  # bytes per pixel; 4 for other modes
# Bytes per pixel that decoders need besides the image: measured, or assumed for plug-ins.
_DECODER = {"AVIF": 8, "HEIF": 8, "JPEG2000": 13, "WEBP": 10}
_COEFFICIENTS = 2  # bytes per pixel and band that a JPEG needs until the last of several scans
_TOKENS = 10  # bytes per pixel and band that Pillow's decoder in Python needs for a PPM file of numbers
_BITS, _ROWS_PER_STRIP, _TILE_WIDTH, _TILE_LENGTH = 258, 278, 322, 323  # tags of TIFF
_CHUNK = 1 << 20


def bytes_needed(image: Image.Image) -> int:
    """Return the most bytes that are held at a time until a file's image, not decoded yet, is upright RGB."""
    pixels, stored = image.width * image.height, _STORED.get(image.mode, 4)
    decoding = pixels * stored + _decoder_bytes(image, pixels)
    converting, turning = pixels * (stored + _RGB), pixels * 2 * _RGB
    return max(decoding, converting, turning)


def scan_pixels(image: Image.Image) -> int:
    """Return the number of pixels that are decoded, each as often as a JPEG file has scans: a byte may hold a scan."""
    return image.width * image.height * max(1, _scans(image))


def _decoder_bytes(image: Image.Image, pixels: int) -> int:
    bands = len(image.getbands())
    if isinstance(image, JpegImagePlugin.JpegImageFile):
        return pixels * bands * _COEFFICIENTS if "progressive" in image.info or _scans(image) > 1 else 0
    if isinstance(image, PpmImagePlugin.PpmImageFile):
        return 0 if not image.tile or image.tile[0][0] == "raw" else pixels * bands * _TOKENS
    if isinstance(image, TiffImagePlugin.TiffImageFile):
        tags = image.tag_v2
        if _TILE_WIDTH in tags:  # tiles may be larger than the image
            block = tags[_TILE_WIDTH] * tags.get(_TILE_LENGTH, 0)
        else:
            block = image.width * min(image.height, tags.get(_ROWS_PER_STRIP, image.height))
        return block * sum(tags.get(_BITS, (1,))) // 8
    return pixels * _DECODER.get(image.format or "", 0)


def _scans(image: Image.Image) -> int:
    """Count the markers of scans in a JPEG file; compressed data contain none, and a thumbnail's count too."""
    if not isinstance(image, JpegImagePlugin.JpegImageFile) or image.fp is None:
        return 0
    count, last, start = 0, b"", image.fp.tell()
    image.fp.seek(0)
    while chunk := image.fp.read(_CHUNK):
        count += (last + chunk).count(b"\xff\xda")
        last = chunk[-1:]
    image.fp.seek(start)
    return count
