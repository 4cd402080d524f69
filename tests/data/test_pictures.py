"""Image files: the formats that are read, the scaling of more than eight bits, and errors for damaged files."""

from __future__ import annotations

import io
import os
import socket

import numpy as np
import pytest
from PIL import EpsImagePlugin, Image

from mpcompile.data import datasets, images
from mpcompile.data.sources import pictures
from mpcompile.errors import InputError

GREY = np.arange(0, 256, dtype=np.float64).reshape(16, 16)  # every form of it has to be read as this


def stored(picture, form, **options):
    file = io.BytesIO()
    picture.save(file, form, **options)
    file.seek(0)
    return file


def pgm(values, most):
    return io.BytesIO(b"P5 16 16 %d\n" % most + values.astype(">u2").tobytes())


def tiff(values, bits=16, form=1, photometric=1, extra=()):
    """An uncompressed TIFF of one strip, little endian."""
    data = values.tobytes()
    entries = [(256, 3, 16), (257, 3, 16), (258, 3, bits), (259, 3, 1), (262, 3, photometric), (277, 3, 1)]
    entries += [(273, 4, 8), (279, 4, len(data)), (278, 3, 16), (339, 3, form), *extra]
    directory = len(entries).to_bytes(2, "little")
    for tag, kind, value in sorted(entries):
        directory += b"".join(part.to_bytes(size, "little") for part, size in ((tag, 2), (kind, 2), (1, 4), (value, 4)))
    place = (8 + len(data)).to_bytes(4, "little")
    return io.BytesIO(b"II*\0" + place + data + directory + bytes(4))


@pytest.mark.parametrize(
    "file",
    [
        lambda: stored(Image.fromarray(GREY.astype(np.uint8)), "PNG"),
        lambda: stored(Image.fromarray((GREY * 257).astype(np.uint16)), "PNG"),
        lambda: stored(Image.fromarray((GREY * 257).astype(np.uint16)), "TIFF"),
        lambda: stored(Image.fromarray((GREY * 257).astype(">u2")), "TIFF"),
        lambda: stored(Image.fromarray((GREY / 255).astype(np.float32)), "TIFF"),
        lambda: pgm(GREY * 257, 65535),
        lambda: pgm(GREY * 4, 1020),
        lambda: tiff((GREY * 257).astype(np.uint16)),
        lambda: tiff(65535 - (GREY * 257).astype(np.uint16), photometric=0),
        lambda: tiff((GREY * 16).astype(np.uint16), extra=[(281, 3, 4080)]),
        lambda: tiff((GREY * 1000).astype(np.uint32), bits=32, extra=[(281, 4, 255000)]),
        lambda: tiff((GREY * 128).astype(np.int16), form=2, extra=[(281, 3, 255 * 128)]),
    ],
)
def test_every_depth_is_converted_to_eight_bits(file):
    found = pictures.decode(file())
    assert found.mode == "RGB" and np.abs(np.asarray(found).astype(int) - GREY[:, :, None]).max() <= 1


@pytest.mark.parametrize(
    ("file", "message"),
    [
        (lambda: tiff((GREY * 16).astype(np.uint16)), "no value above 4080: dark, or of 12 bits"),
        (lambda: stored(Image.fromarray(GREY.astype(np.uint16)), "PNG"), "no value above 255: dark, or of 8 bits"),
        (lambda: pgm(GREY * 64, 65535), "of 14 bits"),
        (lambda: stored(Image.fromarray(GREY.astype(np.int32)), "TIFF"), "without a declared value of white"),
        (lambda: stored(Image.fromarray(GREY.astype(np.float32)), "TIFF"), "values from 0 to 255, not from 0 to 1"),
        (lambda: stored(Image.fromarray((GREY / 128 - 1).astype(np.float32)), "TIFF"), "values from -1 to"),
        (lambda: stored(Image.fromarray((GREY / 0).astype(np.float32)), "TIFF"), "values from nan to nan"),
        (
            lambda: tiff((GREY * 16).astype(np.uint16), extra=[(281, 3, 4000)]),
            "values from 0 to 4080, not from 0 to 4000",
        ),
    ],
)
def test_pixels_of_unknown_range_are_refused(file, message):
    with np.errstate(all="ignore"):
        content = file()
    with pytest.raises(pictures.Unreadable, match=message):
        pictures.decode(content)


def test_black_is_black_at_any_depth():
    for pixels in (np.zeros((4, 4), np.uint16), np.zeros((4, 4), np.float32)):
        assert not np.asarray(pictures.decode(stored(Image.fromarray(pixels), "TIFF"))).any()


def test_colours_of_sixteen_bits(tmp_path):
    import struct
    import zlib

    def png(values):
        rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
        parts = ((b"IHDR", struct.pack(">2I5B", 4, 4, 16, 2, 0, 0, 0)), (b"IDAT", zlib.compress(rows)), (b"IEND", b""))
        chunks = (struct.pack(">I", len(d)) + n + d + struct.pack(">I", zlib.crc32(n + d)) for n, d in parts)
        return io.BytesIO(b"\x89PNG\r\n\x1a\n" + b"".join(chunks))

    assert np.abs(np.asarray(pictures.decode(png(np.full((4, 4, 3), 200 * 257)))).astype(int) - 200).max() <= 1
    with pytest.raises(pictures.Unreadable, match="of 12 bits"):
        pictures.decode(png(np.full((4, 4, 3), 200 * 16)))


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGBA", "CMYK", "RGB"])
def test_every_mode_is_converted_to_rgb(mode, recwarn):
    half = Image.new("RGB", (8, 8), "white")
    half.paste((0, 0, 0), (0, 0, 4, 8))
    options = {"transparency": bytes([0, 255])} if mode == "P" else {}
    found = pictures.decode(stored(half.convert(mode), "TIFF" if mode == "CMYK" else "PNG", **options))
    assert found.mode == "RGB" and np.array_equal(np.asarray(found), np.asarray(half)) and not recwarn.list


@pytest.mark.parametrize("suffix", sorted(images.SUFFIXES - {".mpo", ".pfm", ".pbm", ".avifs"}))
def test_every_listed_suffix_is_one_that_is_read(suffix, tmp_path):
    path = tmp_path / f"a{suffix}"
    Image.new("RGB", (16, 16), (200, 100, 50)).save(path)
    assert np.abs(np.asarray(images.open_image(path))[8, 8].astype(int) - [200, 100, 50]).max() < 8


def test_formats_of_several_pictures_and_of_floats(tmp_path):
    grey = Image.fromarray((GREY / 255).astype(np.float32))
    Image.new("RGB", (16, 16), (200, 100, 50)).save(
        tmp_path / "a.mpo", save_all=True, append_images=[grey.convert("L")]
    )
    assert np.abs(np.asarray(images.open_image(tmp_path / "a.mpo"))[8, 8].astype(int) - [200, 100, 50]).max() < 8
    grey.save(tmp_path / "a.pfm")
    assert np.abs(np.asarray(images.open_image(tmp_path / "a.pfm"))[:, :, 0] - GREY).max() <= 1


def test_no_other_format_is_tried(tmp_path, monkeypatch):
    called = []
    monkeypatch.setattr(EpsImagePlugin, "Ghostscript", lambda *a, **k: called.append(1) or Image.new("RGB", (9, 9)).im)
    (tmp_path / "z" / "a").mkdir(parents=True)
    path = tmp_path / "z" / "a" / "0.jpg"
    path.write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n1 1 add\n")
    source = datasets.dataset(str(tmp_path / "z"), "train", True)
    for read in (lambda: images.open_image(path), lambda: source[0]):
        with pytest.raises(InputError, match=f"{path}.*no image of a known format"):
            read()
    assert not called


def test_a_name_does_not_decide_the_format(tmp_path):
    path = tmp_path / "a.jpg"
    Image.new("RGB", (8, 8), (1, 2, 3)).save(path, "PNG")
    assert np.asarray(images.open_image(path))[0, 0].tolist() == [1, 2, 3]


@pytest.mark.parametrize(
    "error", [RuntimeError("x\ny"), KeyError(1), IndexError(), MemoryError(), EOFError("\x1b[2J"), AttributeError("a")]
)
def test_whatever_a_decoder_raises_names_the_file(error, tmp_path, monkeypatch):
    path = tmp_path / "ant" / "0.png"
    path.parent.mkdir()
    Image.new("RGB", (8, 8)).save(path)
    source = datasets.dataset(str(tmp_path), "train", True)

    def broken(*args, **kwargs):
        raise error

    monkeypatch.setattr(pictures.Image, "open", broken)
    for read in (lambda: images.open_image(path), lambda: source[0]):
        with pytest.raises(InputError, match=f"{path}") as caught:
            read()
        assert str(caught.value).isprintable()


def test_bombs_are_refused_by_name(tmp_path, monkeypatch):
    path = tmp_path / "ant" / "0.png"
    path.parent.mkdir()
    Image.new("RGB", (40, 40)).save(path)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    source = datasets.dataset(str(tmp_path), "train", True)
    for read in (lambda: images.open_image(path), lambda: source[0]):
        with pytest.raises(InputError, match=f"{path}.*exceeds limit"):
            read()


def test_only_regular_files_are_opened(tmp_path):
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "folder.png").mkdir()
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(tmp_path / "s.png"))
        kinds = (
            ("pipe.png", "a FIFO"),
            ("folder.png", "a folder"),
            ("s.png", "a socket"),
            ("none.png", "No such file"),
        )
        for name, found in kinds:
            with pytest.raises(InputError, match=f"cannot read .*{name}.*found {found}"):
                images.open_image(tmp_path / name)
    with pytest.raises(InputError, match="found a device"):
        images.open_image("/dev/zero")
    with pytest.raises(InputError) as caught:
        images.open_image(tmp_path / ("x" * 200 + "\x1b[2J\n") / ("y" * 200))
    assert str(caught.value).isprintable() and len(str(caught.value)) < 600
