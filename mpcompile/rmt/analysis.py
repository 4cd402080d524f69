"""Analysis: fits of the Marchenko-Pastur law to every weight of a model, as data, as a table, and as plots."""

from __future__ import annotations

import json
import os
import re
from collections import Counter
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from tabulate import tabulate
from torch import Tensor, nn
from tqdm import tqdm

from mpcompile import rmt
from mpcompile.errors import ArtifactError, InputError, MPCompileError, printable
from mpcompile.io.writing import write_atomically
from mpcompile.ir.numerics import exact
from mpcompile.rmt import Fit
from mpcompile.rmt.fitting import fit_and_spectra

__all__ = ["Analysis", "LayerAnalysis", "analyze", "study"]

MOST_TAPS = 49  # in a kernel fitted tap by tap; patch embeddings have hundreds, and their patches never overlap
_WORST = ("mp", "low_confidence", "not_mp")
_QKV = re.compile(r"(^|[._])(qkv|in_proj)([._]|$)")


@dataclass
class LayerAnalysis:
    """The fits of one weight.

    Attributes:
        shape: shape of the weight.
        fits: block -> fit: ``""`` for the whole weight (a convolution unfolded); ``"q"``, ``"k"`` and ``"v"`` if one
            layer holds all three.
        taps: for a convolution with 2 to 49 taps, fitted tap by tap: the medians ``edge`` and ``sigma``, ``mp`` (how
            many taps follow the law) and ``of`` (how many there are).
        reason: why the weight was not fitted, or None.
        spectra: block -> the singular values that its fit describes, in descending order; not part of the JSON.
    """

    shape: tuple[int, ...]
    fits: dict[str, Fit] = field(default_factory=dict)
    taps: dict[str, float] | None = None
    reason: str | None = None
    spectra: dict[str, NDArray[np.float64]] = field(default_factory=dict, repr=False, compare=False)

    def notes(self) -> dict[str, Any]:
        """The whole weight in a few numbers: σ̂ as the RMS over the blocks, the noise share of all blocks, the largest
        edge, the number of spikes, the worst verdict."""
        if not self.fits:
            return {}
        fits = list(self.fits.values())
        noise = [f.shape[0] * f.shape[1] * f.sigma**2 for f in fits]
        energy = [n / f.noise_share if f.noise_share > 0 else 0.0 for n, f in zip(noise, fits, strict=True)]
        result: dict[str, Any] = {
            "sigma": float(np.sqrt(np.mean([f.sigma**2 for f in fits]))),
            "edge": max(f.edge for f in fits),
            "edge_tw": max(f.edge_tw for f in fits),
            "spikes": sum(f.n_spikes for f in fits),
            "fit_error": max(f.fit_error for f in fits),
            "noise_share": sum(noise) / sum(energy) if sum(energy) > 0 else 0.0,
            "verdict": max((f.verdict for f in fits), key=_WORST.index),
            "separable": any(f.separable for f in fits),
        }
        if len(fits) > 1:
            result["blocks"] = {
                k: {"sigma": f.sigma, "edge": f.edge, "spikes": f.n_spikes, "verdict": f.verdict}
                for k, f in self.fits.items()
            }
        if self.taps is not None:
            result["taps"] = self.taps
        return result

    def to_dict(self) -> dict[str, Any]:
        """The fits as JSON values."""
        fits = {name: asdict(f) for name, f in self.fits.items()}
        return {"shape": list(self.shape), "reason": self.reason, **self.notes(), "fits": fits}


def study(name: str, weight: Tensor) -> LayerAnalysis:
    """Fit one weight, (out, in) or (out, in, kh, kw).

    If the name contains qkv (or in_proj) and the weight consists of three square blocks, queries, keys and values are
    fitted separately.

    Raises:
        InputError: as :func:`mpcompile.rmt.fit`, with the layer's name.

    Example:
        >>> sorted(study("attn.qkv", torch.randn(192, 64)).fits)
        ['k', 'q', 'v']
    """
    weight = weight.detach()
    blocks = ["q", "k", "v"] if _QKV.search(name) and weight.dim() == 2 and len(weight) == 3 * weight.shape[1] else [""]
    try:
        if weight.dim() not in (2, 4) or not weight.numel() or weight.is_complex() or weight.is_meta:
            rmt.fit(weight)  # raises, with the reason
        matrices = weight.flatten(1).reshape(len(blocks), len(weight) // len(blocks), -1)
        fits = fit_and_spectra(matrices)
        taps = rmt.fit_taps(weight) if weight.dim() == 4 and 1 < weight[0, 0].numel() <= MOST_TAPS else ()
    except InputError as error:
        raise InputError(str(error), layer=name) from error
    result = LayerAnalysis(tuple(weight.shape))
    for block, (fitted, spectrum) in zip(blocks, fits, strict=True):
        result.fits[block], result.spectra[block] = fitted, spectrum
    if taps:
        result.taps = {
            "edge": float(np.median([f.edge for f in taps])),
            "sigma": float(np.median([f.sigma for f in taps])),
            "mp": sum(f.verdict == "mp" for f in taps),
            "of": len(taps),
        }
    return result


@exact()
def study_all(weights: Mapping[str, Tensor], progress: bool | None = None) -> dict[str, LayerAnalysis]:
    """:func:`study` of each weight, on as many threads as torch uses, one matrix per thread.

    Eigenvalue solvers themselves gain little from a second thread.
    """
    threads = torch.get_num_threads()
    hidden = None if progress is None else not progress
    bar: dict[str, Any] = {"desc": "analyze", "unit": "layer", "total": len(weights), "disable": hidden}
    if threads == 1 or any(w.device.type != "cpu" for w in weights.values()):
        return {name: study(name, weight) for name, weight in tqdm(weights.items(), **bar)}
    largest = sorted(
        weights, key=lambda name: -weights[name].numel()
    )  # first, so that no large one is left for the end
    try:
        with ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            studied = dict(
                zip(largest, tqdm(pool.map(study, largest, (weights[n] for n in largest)), **bar), strict=True)
            )
    finally:
        torch.set_num_threads(threads)
    return {name: studied[name] for name in weights}


@dataclass
class Analysis:
    """The Marchenko-Pastur analysis of a model, layer by layer.

    Example:
        >>> model = nn.Sequential(nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 10))
        >>> analysis = analyze(model, progress=False)
        >>> analysis.layers["2"].fits[""].verdict
        'low_confidence'
    """

    layers: dict[str, LayerAnalysis]

    def to_json(self, indent: int | None = None) -> str:
        """All layers as JSON: shape, notes, and every fit with its spikes."""
        return json.dumps({name: layer.to_dict() for name, layer in self.layers.items()}, indent=indent)

    def table(self) -> str:
        """A table with one row per fit; sigma and edges are in the units of the weights."""
        rows = []
        for name, layer in self.layers.items():
            shape = "x".join(map(str, layer.shape))
            if layer.reason:
                rows.append([printable(name, 200), shape, *[""] * 6, layer.reason, ""])
            for block, f in layer.fits.items():
                verdict = {"mp": "mp", "not_mp": "not mp", "low_confidence": "low confidence"}[f.verdict]
                taps = layer.taps
                rows.append(
                    [
                        printable(f"{name} {block}".rstrip(), 200),
                        shape,
                        f"{f.sigma:.3g}",
                        f"{f.edge:.3g}",
                        str(f.n_spikes),
                        f"{f.spikes[0] / f.edge:.2f}" if f.spikes and f.edge else "",
                        f"{f.fit_error:.3f}",
                        f"{f.noise_share:.1%}",
                        verdict + (", row x column" if f.separable else ""),
                        "" if taps is None else f"{taps['mp']:.0f} of {taps['of']:.0f} mp, edge {taps['edge']:.3g}",
                    ]
                )
        head = ["layer", "weight", "sigma", "edge", "spikes", "largest / edge", "fit error", "noise", "law", "taps"]
        return tabulate(rows, headers=head, disable_numparse=True, colalign=("left", "left", *["right"] * 6, "left"))

    def __str__(self) -> str:
        fits = [f for layer in self.layers.values() for f in layer.fits.values()]
        count = Counter(f.verdict for f in fits)
        separable = sum(f.separable for f in fits)
        text = f"{len(fits)} matrices: {count['mp']} follow the law"
        text += f" ({separable} once row and column scales are divided out)" if separable else ""
        text += f", {count['not_mp']} do not, {count['low_confidence']} are too small or too narrow to judge"
        left = sum(layer.reason is not None for layer in self.layers.values())
        return f"{self.table()}\n\n{text}" + (f"; {left} not fitted" if left else "")

    def plot(self, path: str | os.PathLike[str]) -> None:
        """Plot all spectra on one page (png, pdf, svg, by the suffix): histogram, fitted law, edge, and spikes.

        Raises:
            MPCompileError: matplotlib is not installed.
            ArtifactError: the file cannot be written, or matplotlib does not support its format.
        """
        draw(self, Path(path))


def weights_of(model: nn.Module | Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, tuple[Tensor, str]]]:
    """The weights to fit by layer name, and the weights left out, each with the reason."""
    fitted: dict[str, Tensor] = {}
    left: dict[str, tuple[Tensor, str]] = {}
    if isinstance(model, nn.Module):
        seen = set()
        for path, module in model.named_modules():
            for leaf, weight in module.named_parameters(recurse=False):
                if weight.dim() < 2 or id(weight) in seen or leaf not in ("weight", "in_proj_weight"):
                    continue
                seen.add(id(weight))
                name = path if leaf == "weight" else f"{path}.{leaf}"
                groups = getattr(module, "groups", 1)
                why = "depthwise" if groups > 1 and weight.shape[1] == 1 else f"{groups} groups" if groups > 1 else None
                why = why or (None if weight.dim() in (2, 4) else f"{weight.dim()} axes")
                why = "embedding" if isinstance(module, nn.Embedding) else why
                if why:
                    left[name] = (weight.detach(), why)
                else:
                    fitted[name] = weight.detach()
        return fitted, left
    for name, tensor in model.items():
        if tensor.dim() < 2 or not tensor.is_floating_point() or not name.endswith("weight"):
            continue
        if tensor.dim() not in (2, 4) or min(tensor.shape[:2]) == 1:
            left[name.removesuffix(".weight")] = (tensor, "depthwise" if tensor.dim() == 4 else f"{tensor.dim()} axes")
        else:
            fitted[name.removesuffix(".weight")] = tensor
    return fitted, left


def analyze(model: nn.Module | Mapping[str, Tensor], *, progress: bool | None = None) -> Analysis:
    """Fit the Marchenko-Pastur law to every weight of a model: noise level, spectral edge, spikes, goodness of fit.

    Convolutions are fitted unfolded and tap by tap; queries, keys and values are fitted separately. Depthwise and
    grouped convolutions are left out.

    Args:
        model: any module, traceable or not, or a state dict.
        progress: show a progress bar; None shows one if stderr is a terminal.

    Raises:
        InputError: there is nothing to fit, or a weight is not finite (with the layer's name).

    Example:
        >>> print(analyze(nn.Linear(64, 64), progress=False).layers[""].fits[""].shape)
        (64, 64)
    """
    fitted, left = weights_of(model)
    if not fitted:
        raise InputError("there is nothing to analyse", expected="linear or 2-d convolution weights", found="none")
    layers = study_all(fitted, progress)
    layers |= {name: LayerAnalysis(tuple(w.shape), reason=why) for name, (w, why) in left.items()}
    order = {name: place for place, name in enumerate([*fitted, *left])}
    return Analysis(dict(sorted(layers.items(), key=lambda item: order[item[0]])))


def check_plot(path: Path) -> None:
    """Check that a plot can be drawn in the format that a file's suffix names.

    Raises:
        MPCompileError: matplotlib is not installed.
        ArtifactError: matplotlib does not support the format.
    """
    try:
        import matplotlib.figure  # noqa: F401
        from matplotlib.backends.backend_agg import FigureCanvasAgg
    except ImportError as error:
        raise MPCompileError("plots need matplotlib", hint="run pip install 'mpcompile[report]'") from error
    known = FigureCanvasAgg.get_supported_filetypes()
    if path.suffix.removeprefix(".").lower() not in known:
        expected = f"a format that matplotlib supports: {', '.join(f'.{name}' for name in sorted(known))}"
        raise ArtifactError(f"cannot write {path}", expected=expected, found=path.suffix or "a name without a suffix")


def draw(analysis: Analysis, path: Path, columns: int = 6) -> None:
    """Draw the page of :meth:`Analysis.plot`."""
    check_plot(path)
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    panels = [
        (f"{name} {block}".rstrip(), f, layer.spectra[block])
        for name, layer in analysis.layers.items()
        for block, f in layer.fits.items()
    ]
    columns = max(1, min(columns, len(panels)))
    rows = -(-len(panels) // columns)
    figure = Figure(figsize=(2.3 * columns, 0.6 + 1.7 * rows), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(rows, columns, squeeze=False)
    for axis in axes.flat[len(panels) :]:
        axis.set_visible(False)
    for axis, (title, fitted, spectrum) in zip(axes.flat, panels, strict=False):
        _panel(axis, title, fitted, spectrum)
    figure.suptitle(
        "Singular values (grey), Marchenko-Pastur law (blue), edge (red, dashed), spikes (orange)", fontsize=8
    )
    kind = path.suffix.removeprefix(".").lower()
    name = {"png": "Software", "pdf": "Creator", "svg": "Creator"}.get(kind)  # the field that names the program
    metadata = None if name is None else {name: "mpcompile"}
    write_atomically(path, lambda temporary: figure.savefig(temporary, format=kind, dpi=110, metadata=metadata))


def _panel(axis: Any, title: str, fitted: Fit, spectrum: NDArray[np.float64]) -> None:
    spikes = spectrum[spectrum > fitted.edge_tw]
    bulk = spectrum[spectrum <= fitted.edge_tw]
    values = bulk if len(bulk) else spectrum
    axis.hist(values, bins=max(8, int(np.sqrt(len(values)) * 1.5)), density=True, color="0.75")
    if fitted.sigma > 0:
        n, m = max(fitted.shape), min(fitted.shape)
        s = np.linspace(fitted.sigma * (np.sqrt(n) - np.sqrt(m)), fitted.edge, 200)[1:-1]
        unit = n * fitted.sigma**2
        axis.plot(s, rmt.mp_density(s**2 / unit, m / n) * 2 * s / unit, color="C0", linewidth=1)
        axis.axvline(fitted.edge, color="C3", linestyle="--", linewidth=0.8)
    if len(spikes):
        axis.plot(spikes, np.zeros(len(spikes)), "|", color="C1", markersize=9, clip_on=False)
    verdict = fitted.verdict.replace("_", " ") + (", row x column" if fitted.separable else "")
    axis.set_title(f"{title}\n{verdict}, error {fitted.fit_error:.3f}, {fitted.n_spikes} spikes", fontsize=5)
    axis.tick_params(labelsize=4, length=2, pad=1)
    axis.set_yticks([])
