"""Images in an .npz file, read one by one, so that memory use depends on the image size and not on the file size."""

from __future__ import annotations

import math
import zipfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
from PIL import Image

from mpcompile.data.sources.regular import open_regular, printable
from mpcompile.errors import InputError, first_line

EXPECTED = "an .npz file with uint8 'images' (N, H, W, 3) and, optionally, 'labels' (N)"
_PART = 1 << 20  # bytes skipped at a time
_WHOLE = 1 << 30  # maximum bytes of an array in Fortran order, which is read as a whole


@dataclass(frozen=True)
class Archive:
    """An .npz file whose array headers have been read and checked.

    Attributes:
        path: the file.
        shape: shape of its images, (N, H, W, 3).
        labels: class numbers (N,), or None.
        fortran: True if the array is in Fortran order, so that its images are not contiguous.
    """

    path: Path
    shape: tuple[int, ...]
    labels: np.ndarray | None
    fortran: bool = False

    def __len__(self) -> int:
        return self.shape[0]

    def pictures(self, chosen: Sequence[int]) -> Iterator[Image.Image]:
        """Yield the images with these indices, in ascending order, as PIL images in RGB.

        Raises:
            InputError: the file is damaged.
        """
        count, *shape = self.shape
        size, position = math.prod(shape), 0
        with open_regular(self.path, EXPECTED) as file:
            try:
                with zipfile.ZipFile(file) as archive, archive.open(_entry(archive, "images")) as entry:
                    _header(entry)
                    if self.fortran:
                        whole = np.frombuffer(_exactly(entry, count * size), np.uint8).reshape(self.shape, order="F")
                        yield from (Image.fromarray(np.ascontiguousarray(whole[number])) for number in chosen)
                        position = count
                    for number in () if self.fortran else chosen:
                        _skip(entry, (number - position) * size)
                        yield Image.fromarray(np.frombuffer(_exactly(entry, size), np.uint8).reshape(shape))
                        position = number + 1
                    _skip(entry, (count - position) * size)
                    if entry.read(1):  # reading past the end makes zipfile compare the checksum
                        raise ValueError("more values than its header declares")
            except InputError:
                raise
            except Exception as error:  # on damaged files zipfile and numpy raise anything
                raise _damaged(self.path, error) from error


def open_archive(path: Path) -> Archive:
    """Open an .npz file of images.

    Raises:
        InputError: it is missing, is not a regular file, is damaged, or holds other arrays.
    """
    with open_regular(path, EXPECTED) as file:
        try:
            with zipfile.ZipFile(file) as archive:
                return _read(path, archive)
        except InputError:
            raise
        except Exception as error:
            raise _damaged(path, error) from error


def _read(path: Path, archive: zipfile.ZipFile) -> Archive:
    images = _entry(archive, "images")
    with archive.open(images) as entry:
        shape, fortran, dtype, offset = _header(entry)
    if dtype != np.uint8 or len(shape) != 4 or shape[3] != 3 or min(shape) < 1:
        found = printable(f"{dtype} {shape}")
        raise InputError(f"{printable(path)} holds images of another form", expected=EXPECTED, found=found)
    if fortran and math.prod(shape) > _WHOLE:
        raise InputError(f"{printable(path)} is too large in Fortran order", expected="an array in C order")
    if images.file_size != offset + math.prod(shape):
        found = f"{images.file_size - offset} bytes for {shape}"
        raise InputError(f"{printable(path)} is damaged", expected=f"{math.prod(shape)} bytes", found=printable(found))
    most = Image.MAX_IMAGE_PIXELS
    if most is not None and shape[1] * shape[2] > 2 * most:  # Pillow's own limit for files
        found, expected = f"{shape[1]} x {shape[2]}", f"{2 * most} pixels"
        raise InputError(f"{printable(path)} holds images that are too large", expected=expected, found=found)
    labels = None
    if any(name in archive.namelist() for name in ("labels.npy", "labels")):
        with archive.open(_entry(archive, "labels")) as entry:
            labels = _labels(path, entry, shape[0])
    return Archive(path, shape, labels, fortran)


def _labels(path: Path, entry: IO[bytes], count: int) -> np.ndarray:
    shape, _, dtype, _ = _header(entry)
    if shape != (count,) or not np.issubdtype(dtype, np.integer):
        found = printable(f"{dtype} {shape} for {count} images")
        raise InputError(f"{printable(path)} holds labels of another form", expected=EXPECTED, found=found)
    labels = np.frombuffer(_exactly(entry, count * dtype.itemsize), dtype)
    if entry.read(1):
        raise ValueError("more labels than its header declares")
    return labels


def _entry(archive: zipfile.ZipFile, name: str) -> zipfile.ZipInfo:
    for entry in (f"{name}.npy", name):
        if entry in archive.namelist():
            return archive.getinfo(entry)
    raise ValueError(f"no '{name}' in it, but {', '.join(archive.namelist()[:4]) or 'nothing'}")


def _header(entry: IO[bytes]) -> tuple[tuple[int, ...], bool, np.dtype[Any], int]:
    """Read an array header: shape, Fortran order, dtype, and the header's size in bytes. Nothing is unpickled."""
    form = np.lib.format
    version = form.read_magic(entry)
    if version not in ((1, 0), (2, 0)):
        raise ValueError(f"an array of format {version}")
    read = form.read_array_header_1_0 if version == (1, 0) else form.read_array_header_2_0
    shape, fortran, dtype = read(entry)
    return shape, fortran and len(shape) > 1, dtype, entry.tell()


def _exactly(entry: IO[bytes], size: int) -> bytes:
    content = entry.read(size)
    if len(content) != size:
        raise ValueError("fewer values than its header declares")
    return content


def _skip(entry: IO[bytes], size: int) -> None:
    while size:
        size -= len(_exactly(entry, min(size, _PART)))


def _damaged(path: Path, error: Exception) -> InputError:
    return InputError(f"cannot read {printable(path)}", expected=EXPECTED, found=first_line(error))
