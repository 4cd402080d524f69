"""The images below a folder: which files are read, which are not and why, and what their classes are called.

The class of an image is the first folder below the one that is read, however deep the image lies. Links to files and
folders are followed, so that pictures may lie on another disk; a folder is read once, in its own place rather than
where a link to it lies, and a link to a folder that holds the link is not followed.
"""

from __future__ import annotations

import os
import re
import stat
import unicodedata
from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from mpcompile.data.sources.pictures import SUFFIXES
from mpcompile.data.sources.regular import listed, printable
from mpcompile.errors import InputError
from mpcompile.io.reading import kind_of

# What systems and editors leave in folders; with all names that start with a dot.
_LITTER = {"__macosx", "@eadir", "$recycle.bin", "system volume information", "lost+found", "thumbs.db", "desktop.ini"}
_NAMED = 3  # names of each kind in a message
_LINE = 550  # characters of it
HIDDEN, DANGLING, LOOPS, AGAIN, SPECIAL, OTHER = range(6)
_KINDS = {  # kind -> one of them, several
    HIDDEN: ("hidden entry", "hidden entries"),
    DANGLING: ("dangling link", "dangling links"),
    LOOPS: ("link to a folder that holds it", "links to folders that hold them"),
    AGAIN: ("link to a folder that is read elsewhere", "links to folders that are read elsewhere"),
    SPECIAL: ("FIFO, socket or device", "FIFOs, sockets or devices"),
    OTHER: ("file of another format", "files of other formats"),
}


def natural_key(name: str) -> tuple[list[int | str], str]:
    """Sorts names as timm does, 2 before 10, and those that are alike to it by themselves."""
    parts = re.split(r"(\d+)", name.lower())
    return [int(part) if place % 2 else part for place, part in enumerate(parts)], name


def hidden(name: str) -> bool:
    """Whether a file or folder is one of the system's or an editor's."""
    return name.startswith(".") or name.lower() in _LITTER


def subfolders(place: Path, kept: Collection[str] = ()) -> list[str]:
    """Names of the folders in a folder, and of links to some, in order, hidden ones left out unless they are ``kept``;
    none where it is no folder."""
    try:
        with os.scandir(place) as entries:
            shown = (entry for entry in entries if entry.name in kept or not hidden(entry.name))
            return sorted(entry.name for entry in shown if os.path.isdir(entry.path))
    except OSError:
        return []


@dataclass
class Listing:
    """What lies below a folder.

    Attributes:
        root: the folder.
        files: the images, in order.
        classes: first folders below ``root`` that hold images, 2 before 10.
        empty: those that hold none.
        folders: every folder that holds images or leads to some, below ``root``.
        left: what wasn't read: kind -> paths below ``root``.
    """

    root: Path
    files: list[Path] = field(default_factory=list)
    classes: list[str] = field(default_factory=list)
    empty: list[str] = field(default_factory=list)
    folders: set[str] = field(default_factory=set)
    left: dict[int, list[str]] = field(default_factory=dict)

    def class_of(self, path: Path) -> str | None:
        """The class of one of its files; None where it lies in ``root`` itself."""
        below = path.parts[len(self.root.parts) :]
        return below[0] if len(below) > 1 else None

    def without_class(self) -> list[Path]:
        """Files in ``root`` itself."""
        return [path for path in self.files if self.class_of(path) is None]

    def beside(self) -> str:
        """What to tell of the files in ``root`` itself, where its folders are classes."""
        return _counted([path.name for path in self.without_class()], "image in no folder", "images in no folder")

    def check_not_empty(self) -> None:
        """It holds images.

        Raises:
            InputError: it holds none.
        """
        if not self.files:
            told = self.told()
            raise InputError(
                f"there are no images in {printable(self.root)}",
                expected=" ".join(sorted(SUFFIXES)),
                found="no image" if told is None else f"none ({told})",
            )

    def told(self, *more: str) -> str | None:
        """One line about what wasn't read, ``more`` among it, or None."""
        parts = [_said(kind, names) for kind, names in sorted(self.left.items())]
        if self.empty:
            parts.append(_counted(self.empty, "folder without images", "folders without images"))
        parts += more
        line = f"not read in {printable(self.root)}: {', '.join(parts)}"
        return None if not parts else line if len(line) <= _LINE else f"{line[:_LINE]}..."


def _said(kind: int, names: Sequence[str]) -> str:
    one, several = _KINDS[kind]
    if kind == OTHER:  # a folder may hold as many of them as images: their formats say more than their names
        suffixes = Counter(os.path.splitext(name)[1].lower() or os.path.basename(name) for name in names)
        named = listed([suffix for suffix, _ in suffixes.most_common()], 8)
        return f"{len(names)} {one if len(names) == 1 else several} ({named})"
    return _counted(names, one, several)


def _counted(names: Sequence[str], one: str, several: str) -> str:
    return f"{len(names)} {one if len(names) == 1 else several} ({listed(sorted(names), _NAMED)})"


class _Walk:
    """Reads folders; what a link leads to is read after everything that lies in its own place."""

    def __init__(self, listing: Listing, kept: Collection[str]) -> None:
        self.listing, self.kept = listing, kept
        self.top = str(listing.root)
        self.links: list[tuple[str, list[str]]] = []
        self.seen: set[tuple[int, int]] = set()
        self.found: list[str] = []

    def leave(self, kind: int, path: str) -> None:
        self.listing.left.setdefault(kind, []).append(os.path.relpath(path, self.top))

    def all(self) -> None:
        self.read(self.top, [os.path.realpath(self.top)])
        while self.links:
            links, self.links = sorted(self.links, key=lambda link: (link[0].count(os.sep), link[0])), []
            for path, chain in links:
                self.follow(path, chain)

    def follow(self, path: str, chain: list[str]) -> None:
        """Read what a link leads to, unless it has been read, or holds the place that the link lies in.

        Args:
            path: the link.
            chain: real paths of the folders that led to it: the root, those behind links, and its own.
        """
        real = os.path.realpath(path)
        if any(os.path.commonpath([real, place]) == real for place in chain):
            self.leave(LOOPS, path)
        elif self._identity(path) in self.seen:
            self.leave(AGAIN, path)
        else:
            self.read(path, [*chain, real])

    def read(self, top: str, chain: list[str]) -> None:
        waiting = [top]
        while waiting:
            place = waiting.pop()
            identity = self._identity(place)
            if identity in self.seen:  # a folder mounted twice
                self.leave(AGAIN, place)
                continue
            self.seen.add(identity)
            waiting += self.entries(place, chain)

    def entries(self, place: str, chain: list[str]) -> list[str]:
        """Take the images of one folder, put links off, and return the folders in it."""
        below = []
        try:
            with os.scandir(place) as entries:
                for entry in entries:
                    if hidden(entry.name) and not (place == self.top and entry.name in self.kept):
                        self.leave(HIDDEN, entry.path)
                    elif entry.is_dir(follow_symlinks=False):
                        below.append(entry.path)
                    elif entry.is_symlink() and os.path.isdir(entry.path):
                        self.links.append((entry.path, [*chain, os.path.realpath(place)]))
                    else:
                        self.take(entry)
        except OSError as error:
            raise _closed(place, error) from error
        return below

    def take(self, entry: os.DirEntry[str]) -> None:
        if entry.is_symlink() and not os.path.exists(entry.path):
            self.leave(DANGLING, entry.path)
        elif not entry.is_file():
            self.leave(SPECIAL, entry.path)
        elif os.path.splitext(entry.name)[1].lower() in SUFFIXES:
            self.found.append(entry.path)
        else:
            self.leave(OTHER, entry.path)

    @staticmethod
    def _identity(path: str) -> tuple[int, int]:
        try:
            status = os.stat(path)
        except OSError as error:
            raise _closed(path, error) from error
        return status.st_dev, status.st_ino


def _closed(path: str, error: OSError) -> InputError:
    found = error.strerror or type(error).__name__
    return InputError(f"can't read the folder {printable(path)}", expected="one that may be listed", found=found)


def list_images(root: Path, kept: Collection[str] = ()) -> Listing:
    """All images below a folder.

    Args:
        root: the folder.
        kept: names of classes that are known: such a folder isn't hidden, whatever it is called.

    Raises:
        InputError: there is no such folder, or one in it can't be listed.
    """
    try:
        mode = os.stat(root).st_mode
    except (OSError, ValueError) as error:
        found = "no such folder" if isinstance(error, FileNotFoundError) else getattr(error, "strerror", None) or error
        raise InputError(f"there are no images in {printable(root)}", expected="a folder", found=found) from error
    if not stat.S_ISDIR(mode):
        raise InputError(f"there are no images in {printable(root)}", expected="a folder", found=kind_of(mode))
    listing, kept = Listing(root), frozenset(kept)
    walk = _Walk(listing, kept)
    walk.all()
    listing.files = sorted(map(Path, walk.found))
    holding = {name for name in map(listing.class_of, listing.files) if name is not None}
    listing.classes = sorted(holding, key=natural_key)
    left = {name for kind in (LOOPS, AGAIN) for name in listing.left.get(kind, ())}
    listing.empty = sorted(set(subfolders(root, kept)) - holding - left, key=natural_key)
    length = len(root.parts)
    for parent in {path.parent for path in listing.files}:
        parts = parent.parts[length:]
        listing.folders |= {os.sep.join(parts[:depth]) for depth in range(1, len(parts) + 1)}
    return listing


def number(names: Iterable[str]) -> dict[str, int]:
    """Class name -> label, in the order given."""
    return {name: label for label, name in enumerate(names)}


def matched(folders: Iterable[str], known: dict[str, int]) -> dict[str, int | None]:
    """Label of each folder by the name of its class; None where it is none of the known ones.

    A name that systems spell in two ways (an accent that is a character of its own) is the same name.
    """
    same = {unicodedata.normalize("NFC", name): label for name, label in known.items()}
    return {name: known.get(name, same.get(unicodedata.normalize("NFC", name))) for name in folders}
