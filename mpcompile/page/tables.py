"""Tables and cards as HTML."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from mpcompile.page.charts import escape


def table(head: Sequence[str], rows: Iterable[Sequence[object]], best: int | None = None) -> str:
    """Return an HTML table, its first column left-aligned and row ``best`` in bold."""
    cells = "".join(f"<th>{escape(name)}</th>" for name in head)
    body = ""
    for place, row in enumerate(rows):
        mark = ' class="best"' if place == best else ""
        body += f"<tr{mark}>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>"
    return f'<div class="scroll"><table><thead><tr>{cells}</tr></thead><tbody>{body}</tbody></table></div>'


def card(value: str, what: str) -> str:
    """Return a figure in large type, with what it means below."""
    return f'<div class="card"><b>{escape(value)}</b>{escape(what)}</div>'
