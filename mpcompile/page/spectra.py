"""Spectra of weights and the Marchenko-Pastur law: from the JSON of ``analyze``, else computed from an artifact."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from mpcompile import rmt
from mpcompile.ir.module import IRModule
from mpcompile.ir.view import stored_layers
from mpcompile.page.charts import escape, histogram
from mpcompile.page.sources import Sources, number, numbers, records

BINS, CURVE = 40, 60  # columns of a histogram, points of the curve of the law
SMALLEST = 2  # fewest singular values for which a matrix is drawn


@dataclass(frozen=True)
class Spectrum:
    """The spectrum of one weight.

    Attributes:
        name: name of the layer.
        values: singular values, in any order; empty if only the fit is known.
        n, m: longer and shorter side of the matrix; 0 if unknown.
        sigma, edge: parameters of the fitted noise; None if unknown.
        spikes, verdict, error: see :class:`mpcompile.rmt.Fit`; None if unknown.
    """

    name: str
    values: np.ndarray
    n: int
    m: int
    sigma: float | None
    edge: float | None
    spikes: int | None
    verdict: str | None
    error: float | None


def spectra(sources: Sources) -> tuple[list[Spectrum], str]:
    """Return the known spectra and a sentence on their source."""
    analyzed = sources.analyze or {}
    read = [_from_json(name, entry) for name, entry in records(analyzed.get("layers", analyzed))]
    read = [s for s in read if len(s.values) or s.edge is not None]
    if any(len(s.values) for s in read):
        return read, "Singular values of the dense weights."
    if sources.artifact is not None:
        computed = _computed(sources.artifact)
        if read:
            fits = {s.name: s for s in read}
            text = "The fits are those of the dense weights; the columns show the stored weights, after masking."
            return [_joined(s, fits[s.name]) if s.name in fits else s for s in computed], text
        return computed, "Singular values of the stored weights, after masking and refitting."
    return read, "Fits to the dense weights."


def _joined(drawn: Spectrum, fit: Spectrum) -> Spectrum:
    """Return a spectrum with the columns and the law of ``drawn`` and the figures of ``fit``."""
    return replace(drawn, edge=fit.edge, spikes=fit.spikes, verdict=fit.verdict, error=fit.error)


def _from_json(name: str, entry: Mapping[str, Any]) -> Spectrum:
    shape = [int(x) for x in numbers(entry.get("shape"))]
    sides = (shape[0], math.prod(shape[1:])) if len(shape) > 1 else (0, 0)
    values = np.array(numbers(entry.get("singular_values")))
    if not len(values) and max(sides):
        values = np.sqrt(max(sides) * np.clip(numbers(entry.get("eigenvalues")), 0, None))
    spikes, verdict = number(entry.get("spikes")), entry.get("verdict")
    return Spectrum(
        name,
        values,
        max(sides),
        min(sides),
        sigma=number(entry.get("sigma")),
        edge=number(entry.get("edge")),
        spikes=None if spikes is None else int(spikes),
        verdict=None if verdict is None else str(verdict),
        error=number(entry.get("fit_error")),
    )


@torch.no_grad()
def _computed(gm: IRModule) -> list[Spectrum]:
    """Return the spectra of the masked layers of an artifact."""
    drawn: dict[str, Spectrum] = {}
    for layer in stored_layers(gm):
        weight = layer.weight.tensor.detach().float()
        if layer.pattern is None or layer.name in drawn or min(weight.flatten(1).shape) < SMALLEST:
            continue
        rows = weight.flatten(1)
        values = torch.linalg.svdvals(rows).numpy()
        fit = rmt.fit(weight)
        sides = max(rows.shape), min(rows.shape)
        drawn[layer.name] = Spectrum(
            layer.name, values, *sides, fit.sigma, fit.edge, fit.n_spikes, fit.verdict, fit.fit_error
        )
    return list(drawn.values())


def draw(spectrum: Spectrum) -> str:
    """Return a histogram of singular values with the law over it, as an HTML figure."""
    s, spikes = spectrum.values, np.array([])
    edge = spectrum.edge
    if edge is not None:
        spikes = s[s > edge * 1.02]
    bulk = s[s <= edge * 1.02] if edge is not None and (s <= edge * 1.02).any() else s
    edges = np.linspace(0, bulk.max() * 1.0001 or 1.0, BINS + 1)
    counts, _ = np.histogram(bulk, edges)
    heights = counts / (len(s) * np.diff(edges))
    curve = []
    if spectrum.sigma and spectrum.n and spectrum.m:
        lowest = spectrum.sigma * (math.sqrt(spectrum.n) - math.sqrt(spectrum.m))
        highest = spectrum.sigma * (math.sqrt(spectrum.n) + math.sqrt(spectrum.m))
        x = np.linspace(max(lowest, highest * 1e-3), highest, CURVE)
        # s = sqrt(N lambda), so the density of s is that of lambda times d lambda / d s = 2 s / N
        y = rmt.mp_density(x**2 / spectrum.n, spectrum.m / spectrum.n, spectrum.sigma**2) * 2 * x / spectrum.n
        curve = list(zip(x.tolist(), y.tolist(), strict=True))
    words = [] if spectrum.verdict is None else [spectrum.verdict.replace("_", " ")]
    words += [] if spectrum.spikes is None else [f"{spectrum.spikes} spike{'' if spectrum.spikes == 1 else 's'}"]
    words += [] if edge is None else [f"edge {edge:.3g}"]
    title = f"Singular values of {spectrum.name} and the Marchenko-Pastur law"
    picture = histogram(edges.tolist(), heights.tolist(), curve, spikes.tolist(), title)
    caption = f"<code>{escape(spectrum.name)}</code> {escape(', '.join(words))}"
    return f"<figure>{picture}<figcaption>{caption}</figcaption></figure>"
