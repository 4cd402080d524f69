"""Images in .npz files, whole and damaged."""

from __future__ import annotations

import io
import os
import struct
import tracemalloc
import zipfile

import numpy as np
import pytest
import torch
from PIL import Image

from mpcompile.data import images
from mpcompile.errors import InputError

DATA = {"input_size": [3, 32, 32], "interpolation": "bicubic", "mean": [0.5] * 3, "std": [0.25] * 3, "crop_pct": 1.0}
PIXELS = np.random.default_rng(0).integers(0, 256, (6, 8, 8, 3), dtype=np.uint8)


def npz(**arrays):
    file = io.BytesIO()
    np.savez(file, **arrays)
    return file.getvalue()


def head(shape, descr="|u1", fortran=False):
    text = repr({"descr": descr, "fortran_order": fortran, "shape": shape}).encode()
    text += b" " * (63 - (10 + len(text)) % 64) + b"\n"
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text


def packed(content, name="images.npy", how=zipfile.ZIP_STORED):
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", how) as archive:
        archive.writestr(name, content)
    return file.getvalue()


def flipped(content, place):
    return content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :]


WHOLE = npz(images=PIXELS, labels=np.arange(6))
STORED = packed(head((6, 8, 8, 3)) + PIXELS.tobytes())


@pytest.mark.parametrize("labels", [np.arange(6), np.arange(6, dtype=np.uint8), np.arange(6, dtype=">i2")])
@pytest.mark.parametrize("pixels", [PIXELS, np.asfortranarray(PIXELS)])
def test_a_sample_equals_the_array(labels, pixels, tmp_path):
    for save in (np.savez, np.savez_compressed):
        save(tmp_path / "a.npz", images=pixels, labels=labels)
        found = images.images_at(tmp_path / "a.npz", DATA, samples=4, batch=3, classes=6, seed=1)
        assert len(found) == 2 and found.count == 4
        first, again = list(found), list(found)
        assert all(torch.equal(a, b) for x, y in zip(first, again, strict=True) for a, b in zip(x, y, strict=True))
        chosen = [int(label) for batch in first for label in batch[1]]
        expected = torch.stack([images.preprocess(DATA)(Image.fromarray(PIXELS[number])) for number in chosen])
        assert torch.equal(torch.cat([batch[0] for batch in first]), expected) and chosen == sorted(set(chosen))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "cannot read"),
        (b"no zip", "cannot read"),
        (WHOLE[: len(WHOLE) // 2], "cannot read"),
        (flipped(STORED, 400), "CRC"),
        (packed(head((6, 8, 8, 3)) + bytes(100)), "is damaged"),
        (packed(head((6, 8, 8, 3)) + bytes(6 * 192 + 1)), "is damaged"),
        (packed(head((1 << 40, 8, 8, 3))), "is damaged"),
        (packed(head((1 << 30, 1 << 30, 1 << 30, 3))), "is damaged"),
        (packed(head((6, -8, -8, 3)) + bytes(6 * 192)), "holds images of another form"),
        (packed(head((0, 8, 8, 3))), "holds images of another form"),
        (packed(head((6, 8, 0, 3))), "holds images of another form"),
        (packed(head((6, 8, 8, 3), "|O") + bytes(1200)), "holds images of another form"),
        (packed(head((6, 8, 8, 3), "<f4") + bytes(4 * 6 * 192)), "holds images of another form"),
        (packed(b"\x93NUMPY\x09\x00" + bytes(99)), "cannot read"),
        (packed(b"\x93NUMPY\x01\x00\x10\x00" + b"(" * 16), "cannot read"),
        (packed(STORED, "pictures.npy"), "no 'images' in it, but pictures.npy"),
        (npz(images=PIXELS, labels=np.arange(5)), "holds labels of another form"),
        (npz(images=PIXELS, labels=np.arange(6.0)), "holds labels of another form"),
        (npz(images=PIXELS, labels=np.arange(6) - 1), "a label in .* is out of range; expected 0 to 5.*found -1"),
        (npz(images=PIXELS, labels=np.arange(1, 7)), "found 6"),
        (npz(images=PIXELS, labels=np.array(["a"] * 6, object)), "holds labels of another form"),
    ],
)
def test_damaged_and_hostile_archives_are_refused(content, message, tmp_path):
    path = tmp_path / "a.npz"
    path.write_bytes(content)
    with pytest.raises(InputError, match=message) as caught:
        images.read_images(path, DATA, samples=6, classes=6)
    assert str(path) in str(caught.value) and str(caught.value).isprintable() and len(str(caught.value)) < 600


def test_images_beyond_pillows_limit_are_refused(tmp_path, monkeypatch):
    (tmp_path / "a.npz").write_bytes(WHOLE)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 31)
    with pytest.raises(InputError, match=r"a\.npz holds images that are too large; expected 62 pixels, found 8 x 8"):
        images.read_images(tmp_path / "a.npz", DATA, samples=2)


def test_a_sample_takes_no_memory_for_the_rest(tmp_path):
    content = head((4000, 64, 64, 3)) + bytes(4000 * 64 * 64 * 3)  # 47 MiB of zeros in few bytes
    (tmp_path / "a.npz").write_bytes(packed(content, how=zipfile.ZIP_DEFLATED))
    del content
    tracemalloc.start()
    found, _ = images.read_images(tmp_path / "a.npz", DATA, samples=3)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(found) == 3 and peak < 8 << 20


def test_only_regular_files_are_accepted(tmp_path):
    os.mkfifo(tmp_path / "pipe.npz")
    (tmp_path / "folder.npz").mkdir()
    for name, found in (("pipe", "a FIFO"), ("folder", "a folder"), ("none", "No such file")):
        with pytest.raises(InputError, match=rf"cannot read .*{name}\.npz.*found {found}"):
            images.read_images(tmp_path / f"{name}.npz", DATA, samples=2)
