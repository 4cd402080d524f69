"""Class maps: text files with one class name per line, in the order of a model's outputs."""

from __future__ import annotations

import codecs
import re
import unicodedata
from collections import Counter
from pathlib import Path

from mpcompile.data.sources.folders import number
from mpcompile.data.sources.regular import open_regular, printable
from mpcompile.errors import InputError

_LARGEST = 1 << 24  # bytes; a million classes need less
_MARKS = (  # longer ones first: the mark of UTF-16 is a prefix of that of UTF-32
    (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)
_INVISIBLE = {"Cc", "Cf", "Zl", "Zp"}  # categories: control characters, directional marks, soft hyphens, separators
_JOINERS = {"\u200c", "\u200d"}  # in these categories, but part of the spelling of names in some scripts


def read_class_map(path: Path) -> dict[str, int]:
    """Read a text file with one class name per line, in the order of the model's outputs.

    The encoding is UTF-8, or UTF-16 or UTF-32 with a byte order mark; any system's line ends are accepted. Empty lines,
    and spaces around a name, are ignored.

    Returns:
        The label of every class, by name.

    Raises:
        InputError: the file does not exist, has another encoding, contains an invisible character, or a name twice.
    """
    with open_regular(path, "one name per line", "the class map") as file:
        content = file.read(_LARGEST + 1)
    if len(content) > _LARGEST:
        raise _refused(path, f"more than {_LARGEST >> 20} MiB")
    lines = re.split("\r\n|\r|\n", _decoded(path, content))
    for place, line in enumerate(lines, 1):
        odd = next((c for c in line.strip() if unicodedata.category(c) in _INVISIBLE and c not in _JOINERS), None)
        if odd is not None:
            raise _refused(path, f"the character U+{ord(odd):04X} in line {place}, which is invisible")
    names = [line.strip() for line in lines if line.strip()]
    counts = Counter(unicodedata.normalize("NFC", name) for name in names)
    twice = next((name for name, count in counts.items() if count > 1), None)
    if twice is not None or not names:
        raise _refused(path, "an empty file" if not names else f"{printable(twice)!r} twice")
    return number(names)


def _decoded(path: Path, content: bytes) -> str:
    encoding = next((name for mark, name in _MARKS if content.startswith(mark)), "utf-8")
    if encoding == "utf-8" and b"\0" in content:
        raise _refused(path, "zero bytes: UTF-16 without a byte order mark, or not text; save it as UTF-8")
    try:
        return content.decode(encoding)
    except UnicodeDecodeError as error:
        line = content[: error.start].count(b"\n") + 1
        where = f" in line {line}" if encoding.startswith("utf-8") else ""
        raise _refused(path, f"bytes that are not {encoding.upper()}{where}: save it as UTF-8") from error


def _refused(path: Path, found: str) -> InputError:
    expected = "every class once, one name per line"
    return InputError(f"{printable(path)} is not a class map", expected=expected, found=found)
