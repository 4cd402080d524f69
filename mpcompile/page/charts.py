"""Charts as SVG text and pictures as data URIs: nothing to fetch, colours from the page's style sheet."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image

from mpcompile.errors import printable

ROW, GAP, LABEL, PLOT = 20, 6, 170, 330  # pixels: height of a bar, gap between bars, width of names, width of bars


def escape(value: object) -> str:
    """Escape text for HTML and SVG; control characters and bidirectional marks become visible escapes."""
    return html.escape(printable(value), quote=True)


def svg(width: float, height: float, body: str, title: str) -> str:
    """Return a picture that scales with the page; screen readers read ``title`` instead."""
    size = f'viewBox="0 0 {width:g} {height:g}" width="{width:g}"'
    return f'<svg {size} role="img" aria-label="{escape(title)}">{body}</svg>'


def text(x: float, y: float, content: object, kind: str = "", anchor: str = "start") -> str:
    """Return a line of text with its baseline at ``y``."""
    return f'<text x="{x:.1f}" y="{y:.1f}" class="{kind}" text-anchor="{anchor}">{escape(content)}</text>'


def rect(x: float, y: float, width: float, height: float, kind: str) -> str:
    """Return a filled rectangle."""
    return f'<rect x="{x:.2f}" y="{y:.2f}" width="{max(width, 0.5):.2f}" height="{height:.2f}" class="{kind}"/>'


def line(x1: float, y1: float, x2: float, y2: float, kind: str) -> str:
    """Return a straight line."""
    return f'<line x1="{x1:.2f}" y1="{y1:.2f}" x2="{x2:.2f}" y2="{y2:.2f}" class="{kind}"/>'


def circle(x: float, y: float, radius: float, kind: str, title: str) -> str:
    """Return a filled circle; ``title`` is shown where the pointer rests on it."""
    return f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{radius:g}" class="{kind}"><title>{escape(title)}</title></circle>'


@dataclass(frozen=True)
class Bar:
    """A bar of a chart.

    Attributes:
        name: the text on the left of the bar.
        value: its length.
        shown: the text on its right.
        kind: ``"dense"``, ``"sparse"`` or ``"other"``; selects its colour.
        low, high: the ends of its whisker, or None.
        start: its left end; nonzero only in waterfalls.
    """

    name: str
    value: float
    shown: str
    kind: str = "other"
    low: float | None = None
    high: float | None = None
    start: float = 0.0


def bars(chart: Sequence[Bar], title: str, mark: float | None = None, longest: float = 0.0) -> str:
    """Return a chart of horizontal bars, with a line at ``mark``.

    The chart is scaled so that the longest of the bars, their whiskers, ``mark`` and ``longest`` fills its width.
    """
    longest = max([longest, *(max(bar.start + bar.value, bar.high or 0, mark or 0) for bar in chart)]) or 1.0
    scale, body = PLOT / longest, ""
    values = ""  # drawn after the mark, whose line would otherwise strike them through
    for number, bar in enumerate(chart):
        y = number * (ROW + GAP)
        end = LABEL + (bar.start + bar.value) * scale
        body += text(LABEL - 8, y + 14, _short(bar.name), anchor="end")
        body += rect(LABEL + bar.start * scale, y, bar.value * scale, ROW, f"bar {bar.kind}")
        if bar.low is not None and bar.high is not None:
            left, right = LABEL + bar.low * scale, LABEL + bar.high * scale
            body += line(left, y + ROW / 2, right, y + ROW / 2, "whisker")
            end = max(end, right)
        values += text(end + 6, y + 14, bar.shown, "value")
    height = len(chart) * (ROW + GAP)
    if mark is not None:
        body += line(LABEL + mark * scale, -2, LABEL + mark * scale, height - GAP + 2, "mark")
    return svg(LABEL + PLOT + 170, height, body + values, title)


def _short(name: str, length: int = 24) -> str:
    return name if len(name) <= length else f"…{name[-length + 1 :]}"


def histogram(
    edges: Sequence[float],
    heights: Sequence[float],
    curve: Sequence[tuple[float, float]],
    spikes: Sequence[float],
    title: str,
    width: float = 260,
    height: float = 110,
) -> str:
    """Return a histogram of a density, with ``curve`` (a law) drawn over it and ``spikes`` as ticks on the axis."""
    right = max([edges[-1], *spikes, *(x for x, _ in curve)]) or 1.0
    top = max([*heights, *(y for _, y in curve)]) or 1.0
    across, up = width / right, (height - 30) / top
    floor = height - 22
    body = "".join(
        rect(a * across, floor - h * up, max((b - a) * across - 0.6, 0.4), h * up, "bar other")
        for a, b, h in zip(edges[:-1], edges[1:], heights, strict=True)
        if h > 0
    )
    if curve:
        points = " ".join(f"{x * across:.1f},{floor - y * up:.1f}" for x, y in curve)
        body += f'<polyline points="{points}" class="law"/>'
    body += line(0, floor, width, floor, "axis")
    body += "".join(line(x * across, floor - 7, x * across, floor + 3, "spike") for x in spikes)
    body += text(0, height - 6, "0", "small") + text(width, height - 6, f"{right:.3g}", "small", "end")
    return svg(width, height, body, title)


def data_uri(pixels: np.ndarray, kind: str = "PNG") -> str:
    """Return an (H, W, 3) uint8 picture as a data URI; ``kind``: PNG, or JPEG for photographs."""
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, kind, optimize=True, **({"quality": 88} if kind == "JPEG" else {}))
    return f"data:image/{kind.lower()};base64,{base64.b64encode(buffer.getvalue()).decode()}"


_RAMP = np.array([[247, 251, 255], [158, 202, 225], [49, 130, 189], [8, 48, 107]], dtype=float)  # light to dark blue


def heat(shares: np.ndarray) -> np.ndarray:
    """Return the colours (H, W, 3) uint8 of shares (H, W) in [0, 1]: light for 0, dark for 1."""
    place = np.clip(shares, 0, 1) * (len(_RAMP) - 1)
    low = np.minimum(place.astype(int), len(_RAMP) - 2)
    part = (place - low)[..., None]
    return ((1 - part) * _RAMP[low] + part * _RAMP[low + 1]).round().astype(np.uint8)
