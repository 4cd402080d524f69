"""The frontier of a search on a page: accuracy kept against speed, every build a point, and the table."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mpcompile.optimization.frontier import CHOSEN
from mpcompile.page.charts import circle, escape, line, svg, text
from mpcompile.page.sources import Sources, number, records
from mpcompile.page.tables import card, table

WIDTH, HEIGHT, LEFT, FOOT = 640, 300, 64, 40  # pixels: of the chart, its left and its lower margin


def frontier(sources: Sources) -> str | None:
    """Return a card of the chosen build, the chart, and a row per build."""
    if sources.optimize is None:
        return None
    entries = list(records(sources.optimize.get("entries")))
    chosen = next((entry for _, entry in entries if entry.get("verdict") == CHOSEN), {})
    largest = number(sources.optimize.get("max_drop")) or 0.0
    cards = _cards(chosen, largest, number(sources.optimize.get("confidence")) or 0.0)
    rows = [_row(name, entry) for name, entry in entries]
    head = ["build", "drop [95 %]", "at most", "latency ms", "vs best dense", "MMAC", "weights MiB", "verdict"]
    picked = next((i for i, (_, entry) in enumerate(entries) if entry is chosen), None)
    return f'<div class="cards">{cards}</div>{_chart(entries, largest)}{table(head, rows, picked)}'


def _cards(chosen: Mapping[str, Any], largest: float, confidence: float) -> str:
    speed, latency, drop = (number(chosen.get(key)) for key in ("speedup", "latency_ms", "drop"))
    cards = ""
    if speed is not None and latency is not None:
        cards += card(f"{speed:.2f}x", f"as fast as the best dense build: {latency:.2f} ms per batch")
    if drop is not None:
        outcome = chosen.get("outcome")
        samples = outcome.get("samples") if isinstance(outcome, Mapping) else ""
        cards += card(
            f"{-100 * drop:+.2f} points",
            f"of top-1 on {samples} held-out images; at most {largest:.2%} lost with {confidence:.0%} confidence",
        )
    return cards


def _row(name: str, entry: Mapping[str, Any]) -> list[str]:
    drop, upper, speed, size, macs = (
        number(entry.get(k)) for k in ("drop", "upper", "speedup", "weight_bytes", "macs")
    )
    latency, interval = number(entry.get("latency_ms")), entry.get("interval")
    ends = [number(end) for end in interval] if isinstance(interval, list) else []
    between = f" [{ends[0]:.1%}, {ends[1]:.1%}]" if len(ends) == 2 and None not in ends else ""
    return [
        name,
        "" if drop is None else f"{drop:.2%}{between}",
        "" if upper is None else f"{upper:.2%}",
        "" if latency is None else f"{latency:.2f}",
        "" if speed is None else f"{speed:.2f}x",
        "" if macs is None else f"{macs / 1e6:,.0f}",
        "" if size is None else f"{size / 2**20:.1f}",
        str(entry.get("verdict", "")),
    ]


def _chart(entries: list[tuple[str, Mapping[str, Any]]], largest: float) -> str:
    """Return the points of all timed builds: speed to the right, change of top-1 upwards."""
    points = []
    for name, entry in entries:
        speed = number(entry.get("speedup"))
        if speed is not None:
            kind = CHOSEN if entry.get("verdict") == CHOSEN else "dense" if entry.get("dense") else "sparse"
            points.append((speed, -100 * (number(entry.get("drop")) or 0.0), kind, name))
    if not points:
        return ""
    right = max(1.2, *(p[0] for p in points)) * 1.05
    low = min(-100 * largest, *(p[1] for p in points)) - 0.4
    high = max(0.0, *(p[1] for p in points)) + 0.4
    across, up = (WIDTH - LEFT) / right, (HEIGHT - FOOT) / (high - low)

    def at(x: float, y: float) -> tuple[float, float]:
        return LEFT + x * across, (high - y) * up

    floor = HEIGHT - FOOT
    body = line(LEFT, floor, WIDTH, floor, "axis") + line(LEFT, 0, LEFT, floor, "axis")
    body += line(LEFT, at(0, 0)[1], WIDTH, at(0, 0)[1], "axis")
    body += line(LEFT, at(0, -100 * largest)[1], WIDTH, at(0, -100 * largest)[1], "mark")
    body += text(WIDTH, at(0, -100 * largest)[1] - 4, f"largest drop allowed, {largest:.2%}", "small", "end")
    for tick in range(1, int(right) + 1):
        body += text(at(tick, 0)[0], floor + 14, f"{tick}x", "small", "middle")
    for tick in range(-20, 21):
        if low <= tick <= high:
            body += text(LEFT - 6, at(0, tick)[1] + 4, f"{tick:+d}", "small", "end")
    for x, y, kind, name in sorted(points, key=lambda p: p[2] == CHOSEN):
        body += circle(*at(x, y), 8 if kind == CHOSEN else 5, f"bar {kind}", name)
    chosen = next((p for p in points if p[2] == CHOSEN), None)
    if chosen is not None:
        x, y = at(chosen[0], chosen[1])
        body += text(x, y - 12, "chosen", "value", "end" if x > WIDTH / 2 else "start")
    body += text(WIDTH / 2, HEIGHT - 6, "speed against the best dense build", "small", "middle")
    body += text(0, 10, "points of top-1", "small")
    caption = "grey: dense builds, blue: transformed builds, orange: the chosen one"
    picture = svg(WIDTH, HEIGHT, body, "change of top-1 against speed")
    return f"<figure>{picture}<figcaption>{escape(caption)}</figcaption></figure>"
