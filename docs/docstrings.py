"""Griffe extension that adapts docstrings to the site: roles become code or links, examples become code blocks."""

from __future__ import annotations

import re
from typing import Any

import griffe

ROLE = re.compile(r":(?:func|class|meth|mod|data|attr|exc):`~?([\w.]+)`")
EXAMPLE = re.compile(r"^Example:$", re.MULTILINE)
CONSOLE = re.compile(r"(?:^>>> .*\n?(?:^(?!>>> )\S.*\n?)*)+", re.MULTILINE)


class Docstrings(griffe.Extension):
    """Rewrites the text of every docstring before it is parsed."""

    def on_package(self, *, pkg: griffe.Module, **_: Any) -> None:
        """Rewrite all docstrings of a package; public names become links to their entries."""
        names = pkg.exports or ()
        public = {f"{pkg.path}.{name if isinstance(name, str) else name.name}" for name in names}
        self._walk(pkg, public)

    def _walk(self, thing: griffe.Object, public: set[str]) -> None:
        if thing.docstring:
            thing.docstring.value = rewritten(thing.docstring.value, public)
        for member in thing.members.values():
            if not member.is_alias:
                self._walk(member, public)  # type: ignore[arg-type]


def rewritten(text: str, public: set[str]) -> str:
    """A docstring in Markdown, with Google-style sections."""

    def shown(match: re.Match[str]) -> str:
        name = match[1]
        return f"[`{name}`][{name}]" if name in public else f"`{name}`"

    text = EXAMPLE.sub("Examples:", ROLE.sub(shown, text))
    return CONSOLE.sub(lambda match: f"```pycon\n{match[0].rstrip()}\n```\n", text)
