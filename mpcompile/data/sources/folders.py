"""The images below a folder: which files are read, which are not and why, and the names of their classes.

The class of an image is the first folder below the root, however deep the image is. Links to files and folders are
followed, so that pictures may be on another disk. A folder is read once, in its own place rather than through a link to
it, and a link to a folder that contains the link is not followed.
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

# Files and folders that systems and editors create, besides those whose names start with a dot.
_LITTER = {"__macosx", "@eadir", "$recycle.bin", "system volume information", "lost+found", "thumbs.db", "desktop.ini"}
_NAMED = 3  # maximum names of each kind in a note
_LINE = 550  # maximum characters of a note
HIDDEN, DANGLING, LOOPS, AGAIN, SPECIAL, OTHER = range(6)
_KINDS = {  # kind -> singular, plural
    HIDDEN: ("hidden entry", "hidden entries"),
    DANGLING: ("dangling link", "dangling links"),
    LOOPS: ("link to a folder that holds it", "links to folders that hold them"),
    AGAIN: ("link to a folder that is read elsewhere", "links to folders that are read elsewhere"),
    SPECIAL: ("FIFO, socket or device", "FIFOs, sockets or devices"),
    OTHER: ("file of another format", "files of other formats"),
}


def natural_key(name: str) -> tuple[list[int | str], str]:
    """Return a key that sorts names as timm does, 2 before 10, with ties broken by the exact name."""
    parts = re.split(r"(\d+)", name.lower())
    return [int(part) if place % 2 else part for place, part in enumerate(parts)], name


def hidden(name: str) -> bool:
    """Return True if a file or folder belongs to the system or an editor."""
    return name.startswith(".") or name.lower() in _LITTER


def subfolders(place: Path, classes: Collection[str] = ()) -> list[str]:
    """Return the sorted names of the folders in a folder, and of links to folders; none if ``place`` is not a folder.

    Hidden folders are left out, unless they are in ``classes``.
    """
    try:
        with os.scandir(place) as entries:
            shown = (entry for entry in entries if entry.name in classes or not hidden(entry.name))
            return sorted(entry.name for entry in shown if os.path.isdir(entry.path))
    except OSError:
        return []


@dataclass
class Listing:
    """The content of a folder.

    Attributes:
        root: the folder.
        files: the images, in order.
        classes: sub-folders of ``root`` with images at any depth, 2 before 10.
        empty: sub-folders of ``root`` without images.
        folders: all folders with images at any depth, as paths relative to ``root``.
        skipped: kind -> entries that were not read, as paths relative to ``root``.
    """

    root: Path
    files: list[Path] = field(default_factory=list)
    classes: list[str] = field(default_factory=list)
    empty: list[str] = field(default_factory=list)
    folders: set[str] = field(default_factory=set)
    skipped: dict[int, list[str]] = field(default_factory=dict)

    def class_of(self, path: Path) -> str | None:
        """Return the class of one of the files; None if it is in ``root`` itself."""
        below = path.parts[len(self.root.parts) :]
        return below[0] if len(below) > 1 else None

    def without_class(self) -> list[Path]:
        """Return the files in ``root`` itself."""
        return [path for path in self.files if self.class_of(path) is None]

    def outside_classes(self) -> str:
        """Return the part of a note on the files in ``root`` itself, for folders whose sub-folders are classes."""
        return _counted([path.name for path in self.without_class()], "image in no folder", "images in no folder")

    def check_not_empty(self) -> None:
        """Check that there are images.

        Raises:
            InputError: there are none.
        """
        if not self.files:
            note = self.note()
            raise InputError(
                f"there are no images in {printable(self.root)}",
                expected=" ".join(sorted(SUFFIXES)),
                found="no image" if note is None else f"none ({note})",
            )

    def note(self, *more: str) -> str | None:
        """Return one line about entries that were not read, with ``more`` at its end, or None without any."""
        parts = [_described(kind, names) for kind, names in sorted(self.skipped.items())]
        if self.empty:
            parts.append(_counted(self.empty, "folder without images", "folders without images"))
        parts += more
        line = f"not read in {printable(self.root)}: {', '.join(parts)}"
        return None if not parts else line if len(line) <= _LINE else f"{line[:_LINE]}..."


def _described(kind: int, names: Sequence[str]) -> str:
    singular, plural = _KINDS[kind]
    if kind == OTHER:  # may be as many as images: their formats say more than their names
        suffixes = Counter(os.path.splitext(name)[1].lower() or os.path.basename(name) for name in names)
        named = listed([suffix for suffix, _ in suffixes.most_common()], 8)
        return f"{len(names)} {singular if len(names) == 1 else plural} ({named})"
    return _counted(names, singular, plural)


def _counted(names: Sequence[str], singular: str, plural: str) -> str:
    return f"{len(names)} {singular if len(names) == 1 else plural} ({listed(sorted(names), _NAMED)})"


class _Walk:
    """Reads folders; the targets of links are read after everything that is in its own place."""

    def __init__(self, listing: Listing, classes: Collection[str]) -> None:
        self.listing, self.classes = listing, classes
        self.top = str(listing.root)
        self.links: list[tuple[str, list[str]]] = []
        self.seen: set[tuple[int, int]] = set()
        self.images: list[str] = []

    def skip(self, kind: int, path: str) -> None:
        self.listing.skipped.setdefault(kind, []).append(os.path.relpath(path, self.top))

    def read_all(self) -> None:
        """Read the root and everything that links in it lead to."""
        self.read(self.top, [os.path.realpath(self.top)])
        while self.links:
            links, self.links = sorted(self.links, key=lambda link: (link[0].count(os.sep), link[0])), []
            for path, chain in links:
                self.follow(path, chain)

    def follow(self, path: str, chain: list[str]) -> None:
        """Read the target of a link, unless it has been read or contains the link.

        Args:
            path: the link.
            chain: real paths of the folders that led to it: the root, targets of links, and the link's own folder.
        """
        real = os.path.realpath(path)
        if any(os.path.commonpath([real, place]) == real for place in chain):
            self.skip(LOOPS, path)
        elif self._identity(path) in self.seen:
            self.skip(AGAIN, path)
        else:
            self.read(path, [*chain, real])

    def read(self, top: str, chain: list[str]) -> None:
        """Read a folder and all folders below it."""
        waiting = [top]
        while waiting:
            place = waiting.pop()
            identity = self._identity(place)
            if identity in self.seen:  # a folder mounted twice
                self.skip(AGAIN, place)
                continue
            self.seen.add(identity)
            waiting += self.entries(place, chain)

    def entries(self, place: str, chain: list[str]) -> list[str]:
        """Record the images of one folder, defer its links, and return its sub-folders."""
        below = []
        try:
            with os.scandir(place) as entries:
                for entry in entries:
                    if hidden(entry.name) and not (place == self.top and entry.name in self.classes):
                        self.skip(HIDDEN, entry.path)
                    elif entry.is_dir(follow_symlinks=False):
                        below.append(entry.path)
                    elif entry.is_symlink() and os.path.isdir(entry.path):
                        self.links.append((entry.path, [*chain, os.path.realpath(place)]))
                    else:
                        self.record(entry)
        except OSError as error:
            raise _unreadable(place, error) from error
        return below

    def record(self, entry: os.DirEntry[str]) -> None:
        """Record an entry that is not a folder: as an image, or as skipped."""
        if entry.is_symlink() and not os.path.exists(entry.path):
            self.skip(DANGLING, entry.path)
        elif not entry.is_file():
            self.skip(SPECIAL, entry.path)
        elif os.path.splitext(entry.name)[1].lower() in SUFFIXES:
            self.images.append(entry.path)
        else:
            self.skip(OTHER, entry.path)

    @staticmethod
    def _identity(path: str) -> tuple[int, int]:
        try:
            status = os.stat(path)
        except OSError as error:
            raise _unreadable(path, error) from error
        return status.st_dev, status.st_ino


def _unreadable(path: str, error: OSError) -> InputError:
    found = error.strerror or type(error).__name__
    return InputError(f"cannot read the folder {printable(path)}", expected="a folder that may be listed", found=found)


def list_images(root: Path, classes: Collection[str] = ()) -> Listing:
    """List all images below a folder.

    Args:
        root: the folder.
        classes: names of known classes: a folder with such a name is never hidden.

    Raises:
        InputError: the folder does not exist, or one below it cannot be listed.
    """
    try:
        mode = os.stat(root).st_mode
    except (OSError, ValueError) as error:
        found = "no such folder" if isinstance(error, FileNotFoundError) else getattr(error, "strerror", None) or error
        raise InputError(f"there are no images in {printable(root)}", expected="a folder", found=found) from error
    if not stat.S_ISDIR(mode):
        raise InputError(f"there are no images in {printable(root)}", expected="a folder", found=kind_of(mode))
    listing, classes = Listing(root), frozenset(classes)
    walk = _Walk(listing, classes)
    walk.read_all()
    listing.files = sorted(map(Path, walk.images))
    populated = {name for name in map(listing.class_of, listing.files) if name is not None}
    listing.classes = sorted(populated, key=natural_key)
    skipped = {name for kind in (LOOPS, AGAIN) for name in listing.skipped.get(kind, ())}
    listing.empty = sorted(set(subfolders(root, classes)) - populated - skipped, key=natural_key)
    length = len(root.parts)
    for parent in {path.parent for path in listing.files}:
        parts = parent.parts[length:]
        listing.folders |= {os.sep.join(parts[:depth]) for depth in range(1, len(parts) + 1)}
    return listing


def number(names: Iterable[str]) -> dict[str, int]:
    """Return the label of every class name: its position."""
    return {name: label for label, name in enumerate(names)}


def matched(folders: Iterable[str], known: dict[str, int]) -> dict[str, int | None]:
    """Return the label of each folder, by name; None if its name is not a known class.

    Names that differ only in Unicode normalisation (an accent as a character of its own) are equal.
    """
    same = {unicodedata.normalize("NFC", name): label for name, label in known.items()}
    return {name: known.get(name, same.get(unicodedata.normalize("NFC", name))) for name in folders}
