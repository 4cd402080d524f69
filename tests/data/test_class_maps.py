"""Class maps as written by editors on any system."""

from __future__ import annotations

import os

import pytest
from PIL import Image

from mpcompile.data import datasets
from mpcompile.errors import InputError

NAMES = ["apple", "frog", "caf\u00e9", "red fox"]


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32"])
def test_names_are_read_in_every_encoding(encoding, end, tmp_path):
    path = tmp_path / "map.txt"
    path.write_bytes(end.join(["apple  ", "", " frog", *NAMES[2:], " ", ""]).encode(encoding))
    assert datasets.read_class_map(path) == {name: number for number, name in enumerate(NAMES)}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("caf\u00e9".encode("latin-1"), "bytes that are not UTF-8 in line 1"),
        ("apple\ncaf\u00e9\n".encode("cp1252"), "in line 2: save it as UTF-8"),
        ("\n".join(NAMES).encode("utf-16-le"), "UTF-16 without a byte order mark"),
        ("apple".encode("utf-16") + b"x", "bytes that are not UTF-16"),
        ("apple\nfrog\n\ufeffsky\n".encode(), "U\\+FEFF in line 3"),
        ("apple\u200e\nfrog\n".encode(), "U\\+200E in line 1"),
        ("apple\nfr\u00adog\n".encode(), "U\\+00AD in line 2"),
        (b"apple\t0\nfrog\t1", "U\\+0009 in line 1"),
        (b"a\x1b[2Jb", "U\\+001B in line 1"),
        ("caf\u00e9\ncafe\u0301\n".encode(), "'caf\u00e9' twice"),
        (b"apple\nfrog\napple \n", "'apple' twice"),
        (b"\n \r\n", "an empty file"),
        (b"", "an empty file"),
        (b"a" * (1 << 24) + b"a", "more than 16 MiB"),
    ],
)
def test_ambiguous_class_maps_are_refused(content, message, tmp_path):
    path = tmp_path / "map.txt"
    path.write_bytes(content)
    with pytest.raises(InputError, match=rf"map\.txt is not a class map.*found .*{message}") as caught:
        datasets.read_class_map(path)
    assert str(caught.value).isprintable() and len(str(caught.value)) < 600


def test_only_regular_files_are_accepted(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for name, found in (("pipe", "a FIFO"), (".", "a folder"), ("none", "No such file")):
        with pytest.raises(InputError, match=f"cannot read the class map .*found {found}"):
            datasets.read_class_map(tmp_path / name)


def test_a_class_map_that_does_not_fit_is_named(tmp_path):
    for name in NAMES:
        (tmp_path / "data" / name).mkdir(parents=True)
        Image.new("RGB", (8, 8)).save(tmp_path / "data" / name / "0.png")
    path = tmp_path / "map.txt"
    for text in (",0\n".join(NAMES), "\n".join(NAMES[:-1])):
        path.write_text(text)
        with pytest.raises(InputError, match=r"unknown classes; expected .*, the lines of .*map\.txt, found"):
            datasets.dataset(
                str(tmp_path / "data"), "train", True, classes=datasets.read_class_map(path), class_map=str(path)
            )
    path.write_text("\n".join([*NAMES, "more"]))
    source = datasets.dataset(str(tmp_path / "data"), "train", True, classes=datasets.read_class_map(path))
    with pytest.raises(InputError, match=r"different classes.*the lines of .*map\.txt"):
        datasets.check_classes(source, len(NAMES), str(path))
