"""Class maps: text files with the name of one class a line, in the order of a model's outputs."""

from __future__ import annotations

import codecs
import re
import unicodedata
from collections import Counter
from pathlib import Path

from mpcompile.data.sources.folders import number
from mpcompile.data.sources.regular import open_regular, printable
from mpcompile.errors import InputError

_MOST = 1 << 24  # bytes; a million classes need fewer
_MARKS = (  # the longer first: that of UTF-16 starts that of UTF-32
    (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)
_INVISIBLE = {"Cc", "Cf", "Zl", "Zp"}  # categories: control characters, marks of direction, soft hyphens, separators
_JOINERS = {"\u200c", "\u200d"}  # of these categories, but part of how names in some scripts are spelt


def read_class_map(path: Path) -> dict[str, int]:
    """Class name -> label from a text file with one name a line, in the order of the model's outputs.

    UTF-8, or UTF-16 and UTF-32 with a byte order mark; lines may end as on any system. Empty lines, and spaces around a
    name, don't count.

    Raises:
        InputError: there is no such file, it isn't in one of these encodings, holds a character that doesn't show, or a
            name twice.
    """
    with open_regular(path, "one name a line", "the class map") as file:
        content = file.read(_MOST + 1)
    if len(content) > _MOST:
        raise _refused(path, f"more than {_MOST >> 20} MiB")
    lines = re.split("\r\n|\r|\n", _decoded(path, content))
    for place, line in enumerate(lines, 1):
        odd = next((c for c in line.strip() if unicodedata.category(c) in _INVISIBLE and c not in _JOINERS), None)
        if odd is not None:
            raise _refused(path, f"the character U+{ord(odd):04X} in line {place}, which doesn't show")
    names = [line.strip() for line in lines if line.strip()]
    alike = Counter(unicodedata.normalize("NFC", name) for name in names)
    twice = next((name for name, count in alike.items() if count > 1), None)
    if twice is not None or not names:
        raise _refused(path, "an empty file" if not names else f"{printable(twice)!r} twice")
    return number(names)


def _decoded(path: Path, content: bytes) -> str:
    encoding = next((name for mark, name in _MARKS if content.startswith(mark)), "utf-8")
    if encoding == "utf-8" and b"\0" in content:
        raise _refused(path, "zero bytes: UTF-16 without a byte order mark, or no text; save it as UTF-8")
    try:
        return content.decode(encoding)
    except UnicodeDecodeError as error:
        line = content[: error.start].count(b"\n") + 1
        where = f" in line {line}" if encoding.startswith("utf-8") else ""
        raise _refused(path, f"bytes that aren't {encoding.upper()}{where}: save it as UTF-8") from error


def _refused(path: Path, found: str) -> InputError:
    return InputError(f"{printable(path)} is no class map", expected="every class once, one name a line", found=found)
