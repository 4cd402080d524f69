"""Decoding an image file to RGB with eight bits per channel.

The formats to try are listed here: by default, Pillow also tries formats that start another program (EPS starts
Ghostscript). The name of a file does not decide its format, only whether it is read from a folder at all.

Colours are Pillow's. Alpha is dropped, as in torchvision and timm; an animation is read as its first frame, and an EXIF
orientation is not applied. Grey values of more than eight bits are scaled by the value of white:

- 16-bit integers: 65535, or the value that the file declares (TIFF's MaxSampleValue, 12 bits per sample, PGM's
  maximum);
- floats: 1;
- 32-bit and signed integers: the value that the file declares.

Images with values outside that range are refused, and so are images of unknown range: 32-bit integers without a
declared maximum, and 16-bit images whose values fit in 14 bits, which are dark or, more likely, come from a camera with
10, 12 or 14 bits.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from PIL import Image, UnidentifiedImageError, features

from mpcompile.data.sources.regular import open_regular, printable
from mpcompile.errors import InputError, first_line

_FORMATS: dict[str, tuple[str, ...]] = {
    "JPEG": (".jpg", ".jpeg", ".jpe", ".jfif", ".mpo"),
    "PNG": (".png", ".apng"),
    "BMP": (".bmp",),
    "DIB": (".dib",),
    "GIF": (".gif",),
    "TIFF": (".tif", ".tiff"),
    "PPM": (".ppm", ".pgm", ".pbm", ".pnm", ".pfm"),
}
_OPTIONAL: dict[str, tuple[str, tuple[str, ...]]] = {  # format -> Pillow's feature, suffixes
    "WEBP": ("webp", (".webp",)),
    "JPEG2000": ("jpg_2000", (".jp2", ".j2k", ".j2c", ".jpc", ".jpf", ".jpx")),
    "AVIF": ("avif", (".avif", ".avifs")),
}


def _known() -> dict[str, tuple[str, ...]]:
    """Return the formats that the installed Pillow reads, with their suffixes."""
    available = {*features.modules, *features.codecs}  # checking a feature unknown to an older Pillow warns
    return _FORMATS | {f: s for f, (needed, s) in _OPTIONAL.items() if needed in available and features.check(needed)}


FORMATS = tuple(_known())
SUFFIXES = frozenset(suffix for suffixes in _known().values() for suffix in suffixes)

_MAX_SAMPLE, _BITS, _PHOTOMETRIC = 281, 258, 262  # TIFF tags
_WHITE = 65535
_DOUBTFUL = 1 << 14  # 16-bit images below it may really have only as many bits as their values need
_ROUNDING = 1e-4  # margin by which resampling may exceed the range of floats
EXPECTED = "an image file"


class Unreadable(Exception):
    """Pixels cannot be read; the message is the reason, to which callers add the name of the file."""


def open_image(path: Path | str) -> Image.Image:
    """Read a file as a PIL image in RGB.

    Raises:
        InputError: the file is missing, is not a regular file or an image, is damaged, or has an unknown range.
    """
    with open_regular(path, EXPECTED) as file:
        try:
            return decode(file)
        except Unreadable as error:
            raise InputError(f"cannot read {printable(path)}", expected=EXPECTED, found=error) from error


def decode(file: BinaryIO) -> Image.Image:
    """Decode an open file to a PIL image in RGB.

    Raises:
        Unreadable: it has no known image format, is damaged, exceeds Pillow's size limit, or has an unknown range.
    """
    try:
        with Image.open(file, formats=FORMATS) as image:
            return to_rgb(image)
    except Unreadable:
        raise
    except UnidentifiedImageError as error:
        raise Unreadable("no image of a known format") from error
    except Exception as error:  # decoders raise anything on damaged files
        raise Unreadable(first_line(error)) from error


def to_rgb(image: Image.Image) -> Image.Image:
    """Convert an image of any mode to RGB; see the docstring of this module.

    Raises:
        Unreadable: values are outside their range, or the range is unknown.
    """
    stored = _stored(image)
    image.load()
    if image.mode == "F" or image.mode == "I" or image.mode.startswith("I;16"):
        return Image.fromarray(_eight_bits(image, stored)).convert("RGB")
    if image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")  # converting to RGB directly gives the same, with a warning
    rgb = image.convert("RGB")
    if ";16" in str(stored):  # Pillow has kept the upper eight of the 16 bits per colour
        high = int(np.asarray(rgb).max())
        if high << 8 < _DOUBTFUL:
            raise Unreadable(_dark((high << 8) + 255))
    return rgb


def _stored(image: Image.Image) -> Any:
    """Return the arguments of Pillow's decoder: the raw mode of the pixels in the file, and PGM's maximum."""
    tile = getattr(image, "tile", None)
    return tile[0][3] if tile else None


def _dark(high: float) -> str:
    bits = max(8, int(high).bit_length())
    return f"16 bits, but no value above {high:g}: dark, or of {bits} bits; save it with 8 bits"


def _eight_bits(image: Image.Image, stored: Any) -> np.ndarray:
    values = np.asarray(image)
    tags = getattr(image, "tag_v2", {})
    white, declared = _white(image, tags, stored)
    low, high = float(values.min()), float(values.max())
    slack = _ROUNDING if image.mode == "F" else 0.0
    if not (-slack <= low and high <= white + slack):  # also refuses NaN
        raise Unreadable(f"values from {low:g} to {high:g}, not from 0 to {white:g}: save it with 8 bits")
    if not declared and 0 < high < _DOUBTFUL:
        raise Unreadable(_dark(high))
    scaled = np.clip(values.astype(np.float64) / white, 0, 1)
    if tags.get(_PHOTOMETRIC) == 0:  # white is zero: Pillow inverts only 8-bit images
        scaled = 1 - scaled
    return np.rint(255 * scaled).astype(np.uint8)


def _white(image: Image.Image, tags: Any, stored: Any) -> tuple[float, bool]:
    """Return the value of white, and True if the file declares it or the type implies it.

    Raises:
        Unreadable: the value is unknown.
    """
    if image.mode == "F":
        return 1.0, True
    declared = tags.get(_MAX_SAMPLE)
    declared = declared[0] if isinstance(declared, tuple) and declared else declared
    if isinstance(declared, (int, float)) and declared > 0:
        return float(declared), True
    if image.mode == "I" and image.format not in ("PNG", "PPM"):
        raise Unreadable("32-bit or signed integers without a declared value of white: save it with 8 bits")
    bits = tags.get(_BITS)
    if bits and bits[0] < 16:
        return float((1 << bits[0]) - 1), True
    scaled = image.format == "PPM" and isinstance(stored, tuple) and stored[-1] != _WHITE  # by Pillow
    return float(_WHITE), scaled
