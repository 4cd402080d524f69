"""Is the fitted edge right? The Marchenko-Pastur fit on matrices of known structure.

    python -m bench.law.marchenko_pastur              # null calibration, planted spikes, matrices to reject
    python -m bench.law.marchenko_pastur --draws 1000

Null: iid Gaussian matrices of six shapes; bias and spread of the fitted edge, the rate of false spikes (nominal: 10 %),
and the rate of rejections. Eigenvalues are drawn exactly, from the bidiagonal form of a Wishart matrix (Dumitriu and
Edelman, math-ph/0206043).
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from scipy.linalg import eigvalsh_tridiagonal
from torch import Tensor

from bench.common import common_arguments, environment, fill, save, table
from mpcompile import rmt
from mpcompile.rmt.fitting import _judge

SHAPES = ((768, 768), (3072, 768), (192, 192), (64, 64), (576, 64), (4096, 64))
PLANTED = 40


def wishart(n: int, m: int, rng: np.random.Generator) -> np.ndarray:
    """Eigenvalues of WᵀW/N for a Gaussian (N, M) matrix, in descending order."""
    a = np.sqrt(rng.chisquare(n - np.arange(m)))
    b = np.sqrt(rng.chisquare(np.arange(m - 1, 0, -1)))
    diagonal = a**2
    diagonal[1:] += b**2
    return eigvalsh_tridiagonal(diagonal, a[:-1] * b)[::-1] / n


def null(n: int, m: int, draws: int) -> dict[str, Any]:
    """One row of the calibration table."""
    rng = np.random.default_rng([n, m])
    ratio, false, rejected, errors = [], 0, 0, []
    for _ in range(draws):
        lam = wishart(n, m, rng)
        sigma2, threshold = rmt.bema(lam, m / n, n)
        ratio.append(math.sqrt(sigma2))
        false += bool(lam[0] > threshold)
        found, _ = _judge(lam, n, 1.0, 0.0, (n, m))
        rejected += found.verdict == "not_mp"
        errors.append(found.fit_error)
    return {
        "shape": f"{n}x{m}",
        "draws": draws,
        "edge / true": float(np.mean(ratio)),
        "sd": float(np.std(ratio)),
        "false spikes": false / draws,
        "fit error": float(np.mean(errors)),
        "rejected": rejected / draws,
        "edges": ratio,
    }


def cases(generator: torch.Generator) -> dict[str, Callable[[], Tensor]]:
    """Matrices that are pure noise, and matrices that are not."""

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    def planted(base: Tensor) -> Tensor:
        u, v = (torch.linalg.qr(normal(768, PLANTED))[0] for _ in range(2))
        return base + (u * torch.linspace(60, 300, PLANTED, dtype=torch.float64)) @ v.T

    def student() -> Tensor:
        chi = normal(3, 768, 768).square().sum(0)
        return normal(768, 768) / (chi / 3).sqrt()

    def masked() -> Tensor:
        w = normal(768, 768)
        kept = w.abs().unflatten(1, (-1, 4)).argsort(-1).argsort(-1) >= 2
        return w * kept.flatten(1)

    return {
        "noise": lambda: normal(768, 768),
        "noise + 40 spikes, 60 to 300": lambda: planted(normal(768, 768)),
        "2:4 magnitude mask": masked,
        "Student t, 3 degrees of freedom": student,
        "row scales, lognormal(0.5)": lambda: normal(768, 768) * torch.exp(0.5 * normal(768, 1)),
        "row scales + 40 spikes": lambda: planted(normal(768, 768) * torch.exp(0.5 * normal(768, 1))),
        "rank 600 of 768": lambda: normal(768, 600) @ normal(600, 768) / 24.5,
        "q, k, v of three scales in one": lambda: torch.cat([s * normal(256, 768) for s in (0.5, 1.0, 2.0)]),
    }


def judge(name: str, make: Callable[[], Tensor]) -> dict[str, Any]:
    """Plain and row x column fit of one case, and two thresholds that assume no law."""
    w = make()
    plain, full = rmt.fit(w, separable=False), rmt.fit(w)
    return {
        "case": name,
        "plain": plain.verdict,
        "plain fit error": plain.fit_error,
        "plain spikes": plain.n_spikes,
        "row x column": full.verdict if full.separable else "",
        "fit error": full.fit_error,
        "spikes": full.n_spikes,
        "edge": full.edge,
        "shuffled": rmt.shuffle_edge(w, 2),
        "signal": list(full.signal),
    }


def draw(rows: list[dict[str, Any]], path: Any) -> None:
    """Plot histograms of the edge relative to its true value."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 3.6), layout="constrained")
    FigureCanvasAgg(figure)
    for axis, row in zip(figure.subplots(2, 3).flat, rows, strict=True):
        axis.hist(row["edges"], bins=30, color="0.7")
        axis.axvline(1, color="C3", linestyle="--", linewidth=0.8)
        axis.set_title(f"{row['shape']}: false spikes {row['false spikes']:.1%}", fontsize=7)
        axis.tick_params(labelsize=6)
    figure.supxlabel("fitted edge / true edge", fontsize=8)
    figure.savefig(path, dpi=150)


def main() -> None:
    """Measure, print, and write the JSON file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    common_arguments(parser)
    parser.add_argument("--draws", type=int, help="matrices per shape (200)")
    args = parser.parse_args()
    fill(args, {"draws": 200}, {"draws": 5})
    torch.set_num_threads(1)
    rows = [null(n, m, args.draws) for n, m in SHAPES]
    keys = ["shape", "draws", "edge / true", "sd", "false spikes", "fit error", "rejected"]
    digits = {"edge / true": ".4f", "sd": ".4f", "false spikes": ".3f", "fit error": ".4f", "rejected": ".3f"}
    print(table([[format(row[k], digits.get(k, "")) for k in keys] for row in rows], keys))
    found = [judge(name, make) for name, make in cases(torch.Generator().manual_seed(0)).items()]
    head = ["case", "plain", "plain fit error", "plain spikes", "row x column", "fit error", "spikes", "edge"]
    head.append("shuffled")
    shown = [[f"{c[k]:.3f}" if isinstance(c[k], float) else c[k] for k in head] for c in found]
    print(table(shown, head))
    planted = np.linspace(300, 60, PLANTED)
    signal = np.array(found[1]["signal"])
    if len(signal) == PLANTED:
        print(f"40 planted strengths, recovered by the BBP map: worst off by {abs(signal / planted - 1).max():.1%}")
    args.out.mkdir(parents=True, exist_ok=True)
    draw(rows, args.out / "marchenko_pastur.png")
    for row in rows:
        del row["edges"]
    save("marchenko_pastur", {"null": rows, "cases": found, "environment": environment(1)}, args.out)


if __name__ == "__main__":
    main()
