"""Does weight decay leave only the spikes? A network whose middle layer starts as noise, under an L2 penalty.

    python -m bench.law.bulk_collapse

W2 (256, 256) starts iid N(0, 1/N) between a fixed random first layer and a fixed random readout, with ReLU before and
after it; 120 samples of 4 clusters; full-batch gradient descent on cross-entropy + lambda ||W2||_F^2. The gradient of
the cross-entropy is in the span of the layer's inputs. Outside this span W2 only decays, and the bulk with it:
R(t) = (1 - 2 lambda lr)^t R(0). 4 spikes, one per cluster, remain. Without the penalty the bulk remains. Source: the
additive model of arXiv 2606.02608.

The run passes if the edge follows theory within 2 % as long as the law describes the bulk (fit error below 0.02), the
4 spikes move by at most 1 % after step 2400, and the edge of the control moves by less than 1 %.
"""

from __future__ import annotations

import argparse
from itertools import takewhile
from typing import Any

import torch
from torch import Tensor

from bench.common import RESULTS, common_arguments, environment, fill, save, table
from mpcompile import rmt

N, INPUTS, CLUSTERS, SAMPLES, RATE = 256, 64, 4, 120, 1.0
LENGTH = 3.0  # RMS norm of the inputs of the middle layer


def problem(seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Inputs of the middle layer (N, samples), labels, the initial W2, and the readout."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    labels = torch.arange(SAMPLES) % CLUSTERS
    x = normal(INPUTS, CLUSTERS)[:, labels] + 0.3 * normal(INPUTS, SAMPLES)
    psi = torch.relu(normal(N, INPUTS) / INPUTS**0.5 @ x)
    psi = psi / psi.square().sum(0).mean().sqrt() * LENGTH
    return psi, labels, normal(N, N) / N**0.5, normal(CLUSTERS, N) / N**0.5


def run(decay: float, steps: int, looks: list[int], seed: int) -> list[dict[str, Any]]:
    """Train, and fit the law at several steps."""
    psi, labels, w, readout = problem(seed)
    target = torch.nn.functional.one_hot(labels, CLUSTERS).double().T
    u, s, _ = torch.linalg.svd(psi, full_matrices=False)
    span = u[:, s > 1e-10 * s[0]]
    start = float((w - w @ span @ span.T).norm())
    rows = []
    for step in range(steps + 1):
        hidden = w @ psi
        p = (readout @ hidden.relu()).softmax(0)
        if step in looks:
            fit = rmt.fit(w, separable=False)
            largest = torch.linalg.svdvals(w)[: CLUSTERS + 1].tolist()
            rows.append(
                {
                    "step": step,
                    "decay": decay,
                    "loss": float(-(p[labels, torch.arange(SAMPLES)]).log().mean()),
                    "singular values": largest,
                    "edge": fit.edge,
                    "spikes": fit.n_spikes,
                    "fit error": fit.fit_error,
                    "off span": float((w - w @ span @ span.T).norm()) / start,
                    "theory": (1 - 2 * decay * RATE) ** step,
                }
            )
        w = w - RATE * ((readout.T @ ((p - target) / SAMPLES) * (hidden > 0)) @ psi.T + 2 * decay * w)
    return rows


def verdict(rows: list[dict[str, Any]], control: list[dict[str, Any]]) -> dict[str, Any]:
    """The criteria, each with the figure that it judges."""
    described = list(takewhile(lambda r: r["fit error"] < 0.02, rows))
    off_theory = [abs(r["edge"] / rows[0]["edge"] / r["theory"] - 1) for r in described]
    worst = max(off_theory)
    close = list(takewhile(lambda pair: pair[1] < 0.02, zip(described, off_theory, strict=True)))
    late = [r for r in rows if r["step"] >= 2400]
    last = late[-1]["singular values"][:CLUSTERS] if late else []
    moved = max((abs(a / b - 1) for r in late for a, b in zip(r["singular values"], last, strict=False)), default=1.0)
    drift = max(abs(r["edge"] / control[0]["edge"] - 1) for r in control)
    off = max(abs(r["off span"] / r["theory"] - 1) for r in described)
    return {
        "edge against theory, worst": worst,
        "described by the law until step": described[-1]["step"],
        "edge within 2 % of theory until step": close[-1][0]["step"],
        "off the span against theory, worst": off,
        "spikes after step 2400, worst move": moved,
        "control, edge drift": drift,
        "passed": worst < 0.02 and moved < 0.01 and drift < 0.01,
    }


def draw(rows: list[dict[str, Any]], control: list[dict[str, Any]], path: Any) -> None:
    """Plot edge and spikes against steps."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 3.6), layout="constrained")
    FigureCanvasAgg(figure)
    axis = figure.subplots()
    steps = [r["step"] for r in rows]
    for i in range(CLUSTERS):
        axis.plot(steps, [r["singular values"][i] for r in rows], color="C1", label="spikes" if i == 0 else None)
    axis.plot(steps, [r["edge"] for r in rows], "o-", color="C0", markersize=3, label="edge of the bulk (fitted)")
    axis.plot(steps, [rows[0]["edge"] * r["theory"] for r in rows], "k:", label="theory")
    axis.plot([r["step"] for r in control], [r["edge"] for r in control], "C2--", label="edge, no decay")
    axis.set_yscale("log")
    axis.set_xlabel("step")
    axis.set_ylabel("singular value")
    axis.legend(fontsize=7)
    figure.savefig(path, dpi=150)


def main() -> None:
    """Measure, print, and write the JSON file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    common_arguments(parser)
    parser.add_argument("--decay", type=float, default=1e-3)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    fill(args, {}, {})
    torch.set_num_threads(1)
    looks = [0, 50, 100, 200, 400, 800, 1200, 1600, 2400, 3200, 4800, 6000][: 5 if args.quick else None]
    rows = run(args.decay, looks[-1], looks, args.seed)
    short = [step for step in looks if step <= 1600]
    control = run(0.0, short[-1], short, args.seed)
    result = verdict(rows, control)
    cells = [
        [
            f"{r['decay']:g}",
            r["step"],
            f"{r['loss']:.4f}",
            " ".join(f"{s:.3f}" for s in r["singular values"]),
            f"{r['edge']:.3f}",
            r["spikes"],
            f"{r['fit error']:.3f}",
            f"{r['off span']:.4f}",
            f"{r['theory']:.4f}",
        ]
        for r in rows + control
    ]
    head = ["decay", "step", "loss", "singular values 1-5", "edge", "spikes", "fit error", "off span", "theory"]
    print(table(cells, head))
    print(result)
    save("bulk_collapse", {"decay": rows, "control": control, **result, "environment": environment(1)}, args.out)
    args.out.mkdir(parents=True, exist_ok=True)
    draw(rows, control, (args.out or RESULTS) / "bulk_collapse.png")


if __name__ == "__main__":
    main()
