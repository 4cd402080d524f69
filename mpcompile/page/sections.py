"""The sections of the page: each renders its data as HTML, or returns None if it has no data."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import numpy as np
import torch

from mpcompile.ir.view import stored_layers
from mpcompile.kernels.nm_format import to_rows
from mpcompile.measure.report import COMPILED
from mpcompile.page import spectra
from mpcompile.page.charts import Bar, bars, data_uri, escape, heat
from mpcompile.page.frontier import frontier
from mpcompile.page.sources import Sources, number, records
from mpcompile.page.tables import card, table

SHOWN = 12  # figures shown unfolded; the others are folded
LISTED = 20  # entries of a list shown in a table
MAP_ROWS, MAP_COLUMNS = 24, 384  # maximum rows and columns of a density map


@dataclass(frozen=True)
class Section:
    """A part of the page.

    Attributes:
        anchor: the name of the section in links.
        title: its heading.
        missing: HTML shown if there is no data; it names the command that produces the data.
        render: sources -> HTML, or None if there is no data.
    """

    anchor: str
    title: str
    missing: str
    render: Callable[[Sources], str | None]


def folded(figures: Sequence[str], what: str) -> str:
    """Return a grid of figures, folded after the first :data:`SHOWN`."""
    text = f'<div class="grid">{"".join(figures[:SHOWN])}</div>'
    rest = figures[SHOWN:]
    if rest:
        text += f'<details><summary>{len(rest)} more {what}</summary><div class="grid">{"".join(rest)}</div></details>'
    return text


def _rows(sources: Sources) -> list[tuple[str, Mapping[str, Any]]]:
    return list(records(sources.figures().get("rows")))


def _chosen(rows: list[tuple[str, Mapping[str, Any]]]) -> tuple[Mapping[str, Any], Mapping[str, Any]]:
    """Return the row of the dense model and that of the audited build: the compiled one, else the last."""
    by_name = dict(rows)
    return rows[0][1], by_name.get(COMPILED, rows[-1][1])


def _percent(value: Any) -> str:
    share = number(value)
    return "" if share is None else f"{share:.2%}"


def _millions(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _pair(value: Any, form: Callable[[float], str]) -> str:
    """Return `` [low, high]``; "" if the value is not a pair of numbers."""
    if not isinstance(value, (list, tuple)) or len(value) != 2 or None in map(number, value):
        return ""
    return f" [{form(value[0])}, {form(value[1])}]"


# --- Gains ---


def headline(sources: Sources) -> str | None:
    """Return cards of the main figures, and a table with a row per build."""
    rows = _rows(sources)
    if not rows:
        return _size_card(sources)
    dense, ours = _chosen(rows)
    cards = _cards(dense, ours) + _disk(sources)
    head = [
        "build",
        "top-1 [95 %]",
        "agrees",
        "lost",
        "won",
        "MMAC",
        "weights MiB",
        "latency ms [quartiles]",
        "vs best dense",
    ]
    body = []
    for name, row in rows:
        macs, size, latency, speed = (number(row.get(key)) for key in ("macs", "weight_bytes", "latency_ms", "speedup"))
        unmeasured = "" if row.get("reason") is None else f"not run: {row['reason']}"
        body.append(
            [
                name,
                _percent(row.get("top1")) + _pair(row.get("interval"), lambda v: f"{v:.1%}"),
                _percent(row.get("agree")),
                "" if row.get("lost") is None else row["lost"],
                "" if row.get("won") is None else row["won"],
                "" if macs is None else f"{macs / 1e6:,.1f}",
                f"{size / 2**20:,.2f}" if size else "",
                unmeasured
                if latency is None
                else f"{latency:.2f}" + _pair(row.get("quartiles_ms"), lambda v: f"{v:.2f}"),
                "" if speed is None else f"{speed:.2f}x",
            ]
        )
    remarks = sources.figures().get("notes")
    notes = "".join(f"<li>{escape(note)}</li>" for note in remarks) if isinstance(remarks, list) else ""
    picked = next(i for i, (_, row) in enumerate(rows) if row is ours)
    return f'<div class="cards">{cards}</div>{table(head, body, picked)}<ul>{notes}</ul>'


def _cards(dense: Mapping[str, Any], ours: Mapping[str, Any]) -> str:
    cards = ""
    was, now = number(dense.get("top1")), number(ours.get("top1"))
    if was is not None and now is not None:
        cards += card(f"{now:.1%}", f"top-1, dense {was:.1%} ({100 * (now - was):+.1f} points)")
    elif (agree := number(ours.get("agree"))) is not None:
        cards += card(f"{agree:.1%}", "of the samples get the label of the dense model")
    was, now = number(dense.get("macs")), number(ours.get("macs"))
    if was and now is not None:
        cards += card(
            f"−{1 - now / was:.1%}", f"multiply-accumulates: {_millions(now / 1e6)} of {_millions(was / 1e6)} M"
        )
    speed, latency = number(ours.get("speedup")), number(ours.get("latency_ms"))
    if speed is not None and latency is not None:
        word = "faster" if speed >= 1 else "slower"
        cards += card(f"{speed:.2f}x", f"{word} than the best dense build: {latency:.2f} ms per batch")
    return cards


def _disk(sources: Sources) -> str:
    if sources.size is None:
        return ""
    share = f", {sources.size / sources.dense_size:.1%} of its dense weights" if sources.dense_size else ""
    return card(f"{sources.size / 2**20:,.2f} MiB", f"on disk{share}")


def _size_card(sources: Sources) -> str | None:
    """Return cards of the figures that the artifact alone has, without an audit."""
    if sources.artifact is None:
        return None
    macs = sources.artifact.plan.macs
    cards = _disk(sources)
    if macs.dense:
        done = f"multiply-accumulates: {_millions(macs.executed / 1e6)} of {_millions(macs.dense / 1e6)} M, by the plan"
        cards = card(f"−{macs.reduction:.1%}", done) + cards
    note = (
        "Accuracy and latency: not measured. <code>mpcompile audit MODEL --artifact FILE --record</code> measures them."
    )
    return f'<div class="cards">{cards}</div><p>{note}</p>'


def against_dense(sources: Sources) -> str | None:
    """Return accuracy, latency and arithmetic of every build as bars."""
    rows = _rows(sources)
    if not rows:
        return None
    dense, _ = _chosen(rows)

    def chart(title: str, key: str, scale: float, form: Callable[[float], str], ends: str | None = None) -> str:
        drawn = []
        for name, row in rows:
            value = number(row.get(key))
            if value is None:
                continue
            pair = row.get(ends) if ends else None
            low, high = pair if pair is not None and _pair(pair, str) else (None, None)
            untransformed = row.get("dense", name.startswith("dense"))  # absent from files of earlier versions
            kind = "dense" if untransformed else "sparse" if name == COMPILED else "other"
            whisker = (None, None) if low is None or high is None else (low * scale, high * scale)
            drawn.append(Bar(name, value * scale, form(value * scale), kind, *whisker))
        if not drawn:
            return ""
        mark = number(dense.get(key))
        return f"<h3>{escape(title)}</h3>" + bars(drawn, title, None if mark is None else mark * scale)

    text = chart("Top-1, % (whiskers: 95 % interval)", "top1", 100, lambda v: f"{v:.1f}", "interval")
    text += chart("Latency per batch, ms (whiskers: quartiles)", "latency_ms", 1, lambda v: f"{v:.2f}", "quartiles_ms")
    text += chart("Multiply-accumulates per sample, millions", "macs", 1e-6, _millions)
    return f'{text}<p class="soft">Dashed line: the dense model in eager mode.</p>' if text else None


# --- The weights ---


def spectrum(sources: Sources) -> str | None:
    """Return histograms of the singular values of every layer, with the Marchenko-Pastur law over them."""
    weights, where = spectra.spectra(sources)
    if not weights:
        return None
    figures = [spectra.draw(s) for s in weights if len(s.values)]
    head = ["layer", "sigma", "edge", "spikes", "fit error", "verdict"]
    body = [
        [s.name, *("" if v is None else f"{v:.4g}" for v in (s.sigma, s.edge)), "" if s.spikes is None else s.spikes,
         "" if s.error is None else f"{s.error:.4f}", (s.verdict or "").replace("_", " ")]
        for s in weights
    ]  # fmt: skip
    law = "Line: the Marchenko–Pastur law of the fitted noise; ticks: values above its edge."
    text = f"<p>{escape(where)} {law if figures else ''}</p>" + folded(figures, "spectra")
    return f"{text}<details><summary>All figures</summary>{table(head, body)}</details>"


def density(sources: Sources) -> str | None:
    """Return density maps, which show where the masks keep weights."""
    if sources.artifact is None:
        return None
    figures: dict[str, str] = {}
    for layer in stored_layers(sources.artifact):
        if layer.mask is None or layer.pattern is None or layer.name in figures:
            continue
        kept = to_rows(layer.mask.tensor).float()
        energy = _energy_kept(sources, layer.name)
        shares = _tiles(kept, layer.pattern.m)
        picture = data_uri(heat(shares))
        words = f"{layer.pattern}, {kept.mean():.0%} kept of {kept.shape[0]}x{kept.shape[1]}{energy}"
        words += f"; columns {shares.mean(0).min():.0%} to {shares.mean(0).max():.0%}"
        figures[layer.name] = (
            f'<figure><img class="map" src="{picture}" alt="Kept weights of {escape(layer.name)}">'
            f"<figcaption><code>{escape(layer.name)}</code> {escape(words)}</figcaption></figure>"
        )
    if not figures:
        return None
    key = '<p>Share of kept weights: 0 <span class="ramp"></span> 1. A column is one input channel (wide layers '
    key += f"show every n-th group only), a row up to 1/{MAP_ROWS} of the output channels.</p>"
    return key + folded(list(figures.values()), "maps")


def _energy_kept(sources: Sources, name: str) -> str:
    assert sources.artifact is not None  # density() has one
    plan = sources.artifact.plan.layers.get(name)
    energy = number((plan.notes.get("mask") or {}).get("kept_energy")) if plan is not None else None
    return "" if energy is None else f", {energy:.1%} of the energy"


def _tiles(kept: torch.Tensor, m: int) -> np.ndarray:
    """Return the share of weights that a mask (out, K) keeps, for each band of outputs and each input: (bands, inputs).

    Inputs are taken in whole groups of ``m``; at most :data:`MAP_ROWS` bands, at most :data:`MAP_COLUMNS` inputs.
    """
    groups = kept.unflatten(1, (-1, m))
    step = -(-groups.shape[1] * m // MAP_COLUMNS)
    columns = groups[:, ::step].flatten(1)
    return np.stack([band.mean(0).numpy() for band in columns.tensor_split(min(MAP_ROWS, len(columns)))])


def merged(sources: Sources) -> str | None:
    """Return sample images with merged tokens outlined."""
    text = ""
    for name, steps in sources.pictures.items():
        figures = "".join(
            f'<figure><img src="{data_uri(pixels, "JPEG")}" alt="{escape(f"{name}, {caption}")}">'
            f"<figcaption>{escape(caption)}</figcaption></figure>"
            for caption, pixels in steps
        )
        text += f'<h3>{escape(name)}</h3><div class="strip">{figures}</div>'
    key = "<p>The patches of a merged token are filled with their mean colour and share an outline.</p>"
    return key + text if text else None


# --- Proofs, time and environment ---


def certificates(sources: Sources) -> str | None:
    """Return the share of samples with a certified label, per tier."""
    certified = sources.certify or {}
    tiers = [
        (name, tier) for name, tier in records(certified.get("tiers")) if number(tier.get("certified")) is not None
    ]
    if not tiers:
        return None
    drawn = []
    for name, tier in tiers:
        samples = number(tier.get("samples")) or number(certified.get("samples")) or 0
        share = tier["certified"] / samples if samples else 0.0
        drawn.append(Bar(name, 100 * share, f"{share:.1%}: {tier['certified']:g} of {samples:g}", "sparse"))
    text = "<p>Share of the samples whose label provably equals that of the dense model, by tier of the proof.</p>"
    text += bars(drawn, "Certified samples, %", longest=100)
    items = [(str(s.get("kind", "")), str(s.get("text", ""))) for _, s in records(certified.get("statements"))]
    text += "<ul>" + "".join(f"<li><b>{escape(kind)}</b>: {escape(words)}</li>" for kind, words in items) + "</ul>"
    violations = number(certified.get("violations"))
    if violations:
        text = f"<p><b>Measurements exceed {violations:g} bounds: do not rely on the certificates.</b></p>{text}"
    return text


def waterfall(sources: Sources) -> str | None:
    """Return the latency of masked layers as a waterfall by kind of layer, from dense layers to the chosen engines."""
    timed: list[tuple[str, float, float, str]] = []
    for name, entry in records((sources.explain or {}).get("layers")):
        us, dense = number(entry.get("us")), number(entry.get("dense_us"))
        if us is not None and dense is not None:
            timed.append((_kind(name), us, dense, str(entry.get("engine", ""))))
    if not timed:
        return None
    timed.sort(key=lambda row: row[0])
    level = total = sum(dense for _, _, dense, _ in timed) / 1e3
    drawn, body = [Bar("dense layers", total, f"{total:.2f} ms", "dense")], []
    for kind, group in groupby(timed, key=lambda row: row[0]):
        members = list(group)
        us, dense = sum(row[1] for row in members) / 1e3, sum(row[2] for row in members) / 1e3
        after = level - (dense - us)
        change = f"{us - dense:+.2f} ms ({len(members)} layers, {dense / us if us else 1:.2f}x)"
        drawn.append(Bar(kind, abs(dense - us), change, "other", start=min(level, after)))
        engines = ", ".join(sorted({row[3] for row in members}))
        body.append([kind, len(members), f"{dense:.3f}", f"{us:.3f}", f"{dense / us if us else 1:.2f}x", engines])
        level = after
    drawn.append(Bar("layers as picked", level, f"{level:.2f} ms", "sparse"))
    text = "<p>Each masked layer timed alone; layers that stay dense are not included.</p>"
    text += bars(drawn, "Latency of masked layers by kind, ms")
    machine = (sources.explain or {}).get("machine")
    text += "" if machine is None else f'<p class="soft">{escape(machine)}</p>'
    return text + table(["layers", "count", "dense ms", "picked ms", "ratio", "engine"], body)


def _kind(name: str) -> str:
    """Return the part of a name that layers of one kind share: ``mlp.fc1`` for ``blocks.3.mlp.fc1``."""
    words = [word for word in name.split(".") if not word.isdigit()]
    return ".".join(words[-2:]) or name


def environment(sources: Sources) -> str | None:
    """Return machine, versions, provenance of the model, and the Config."""
    machine = sources.figures().get("environment")
    rows: list[tuple[str, object]] = list(_flat(machine)) if isinstance(machine, Mapping) else []
    if sources.artifact is not None:
        plan = sources.artifact.plan
        rows += [("artifact", sources.name)] if sources.name else []
        trained = plan.figures.get("distillation")
        rows += [*_flat(plan.provenance), *_flat({"config": plan.config})]
        rows += _flat({"distillation": trained}) if isinstance(trained, Mapping) else ()
    rows = [(key, "" if value is None else value) for key, value in rows]
    return f'<div class="words">{table(["name", "value"], rows)}</div>' if rows else None


def _flat(value: Mapping[str, Any], prefix: str = "") -> Iterable[tuple[str, object]]:
    for key, item in value.items():
        if isinstance(item, Mapping):
            yield from _flat(item, f"{prefix}{key}: ")
        elif isinstance(item, list):
            more = f", ... ({len(item)} in all)" if len(item) > LISTED else ""
            yield f"{prefix}{key}", ", ".join(map(str, item[:LISTED])) + more
        else:
            yield f"{prefix}{key}", item


def _missing(command: str) -> str:
    return f"No data: <code>{escape(command)}</code> produces it."


SECTIONS = (
    Section(
        "frontier", "Frontier", _missing("mpcompile optimize MODEL --images FOLDER --json optimize.json"), frontier
    ),
    Section("headline", "Gains", _missing("mpcompile audit MODEL --json audit.json"), headline),
    Section("dense", "Against dense", _missing("mpcompile audit MODEL --json audit.json"), against_dense),
    Section("spectra", "Spectra", _missing("mpcompile analyze MODEL --json analyze.json"), spectrum),
    Section("masks", "Masks", _missing("mpcompile report ARTIFACT"), density),
    Section("tokens", "Merged tokens", _missing("mpcompile report ARTIFACT --image cat.jpg"), merged),
    Section("certificates", "Certificates", _missing("mpcompile certify MODEL --json certify.json"), certificates),
    Section("time", "Where the time goes", _missing("mpcompile explain MODEL --json explain.json"), waterfall),
    Section("environment", "Environment", _missing("mpcompile audit MODEL --json audit.json"), environment),
)
