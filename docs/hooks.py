"""mkdocs hook: puts the ``--help`` text of every command on the page of the command line."""

from __future__ import annotations

import argparse
import os
from typing import Any

PAGE, PLACE = "reference/command_line.md", "{{ commands }}"


def on_page_markdown(markdown: str, *, page: Any, **_: Any) -> str:
    """Put the help of every command into its page."""
    return markdown.replace(PLACE, commands()) if page.file.src_uri == PAGE else markdown


def commands() -> str:
    """Markdown: a heading and the help text for each command."""
    os.environ["COLUMNS"] = "110"  # argparse wraps at this width
    from mpcompile.cli import parser

    actions = parser()._actions
    choices = next(a.choices for a in actions if isinstance(a, argparse._SubParsersAction))
    assert choices
    return "\n\n".join(f"## {name}\n\n```text\n{choices[name].format_help().rstrip()}\n```" for name in choices)
