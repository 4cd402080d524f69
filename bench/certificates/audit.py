"""Certificates: are they ever contradicted on random networks, and how far do they reach on real ones?

    python -m bench.certificates.audit                            random MLPs and CNNs, at least 100,000 cases
    python -m bench.certificates.audit --data FOLDER              real models as well (a folder with load.py)

A case is one sample, one set of replaced layers and one pattern. The check runs the pruned network itself, in fp32 and
in float64, and networks between the dense and the pruned one. No label that a tier certifies may differ, no logit may
move further than its bound, and cross-entropy may not rise beyond the sharp bound. As a control, the same check is run
with an unsound rule (ReLU enclosed only by its chord), which must be caught.
"""

from __future__ import annotations

import argparse
import copy
import random
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

import mpcompile
from bench.common import common_arguments, environment, fill, load, plotted, save, table
from bench.masks.ladder import task
from mpcompile import Config
from mpcompile.certificates.bounds import cross_entropy_bound
from mpcompile.certificates.enclosures import rules
from mpcompile.certificates.enclosures.enclosure import Enclosure
from mpcompile.certificates.report import Certificates
from mpcompile.kernels.nm_format import Pattern

PATTERNS = ("2:4", "8:16", "12:16", "15:16")
TIERS = ("0 measured", "1 enclosure", "2 Jacobian", "2 paper's form")
ACTIVATIONS: tuple[Callable[[], nn.Module], ...] = (nn.ReLU, nn.ReLU, nn.GELU, nn.SiLU, nn.Tanh, nn.LeakyReLU)
KINDS = ("mlp", "norm mlp", "cnn")


class Residual(nn.Module):
    """x + f(x)."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return x + self.inner(x)


def network(kind: str, rng: random.Random) -> tuple[nn.Module, tuple[int, ...]]:
    """A random network with 4 to 10 classes, weights from torch's generator, and the shape of its samples."""
    act = rng.choice(ACTIVATIONS)
    classes = rng.randint(4, 10)
    layers: list[nn.Module]
    if kind == "cnn":
        width = 16
        layers = [nn.Conv2d(3, width, 3, padding=1), nn.BatchNorm2d(width), act()]
        for _ in range(rng.randint(1, 2)):
            body = [nn.Conv2d(width, width, rng.choice((1, 3)), padding="same"), nn.BatchNorm2d(width), act()]
            layers += [Residual(nn.Sequential(*body))] if rng.random() < 0.5 else body
        if rng.random() < 0.5:
            layers.append(nn.MaxPool2d(2))
        layers += [nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(4 * width, classes)]
        shape: tuple[int, ...] = (3, 6, 6)
    else:
        width = rng.choice((32, 64))
        shape = (rng.choice((16, 32)),)
        layers = [nn.Linear(shape[0], width), act()]
        for _ in range(rng.randint(1, 3)):
            body = [nn.LayerNorm(width)] if kind == "norm mlp" else []
            body += [nn.Linear(width, width), act()]
            layers += [Residual(nn.Sequential(*body))] if rng.random() < 0.4 else body
        layers.append(nn.Linear(width, classes))
    model = nn.Sequential(*layers)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.3)  # type: ignore[union-attr, operator]
            module.running_var.uniform_(0.5, 1.5)  # type: ignore[union-attr, operator]
            nn.init.uniform_(module.weight, 0.5, 1.5)
        elif isinstance(module, (nn.Linear, nn.Conv2d)):
            nn.init.normal_(module.weight, std=1.4 / module.weight[0].numel() ** 0.5)
    return model.eval(), shape


def prunable(model: nn.Module, pattern: Pattern) -> list[str]:
    """Layers whose number of inputs is divisible by M, except the last one."""
    layers = [(n, m) for n, m in model.named_modules() if isinstance(m, (nn.Linear, nn.Conv2d))]
    found = [n for n, m in layers if not m.weight.shape[1] % pattern.m]
    return found[:-1] if len(found) > 1 else found


@torch.no_grad()
def pruned(model: nn.Module, layers: list[str], pattern: Pattern, moved: float = 0.0) -> nn.Module:
    """A copy with magnitude masks on some layers; ``moved`` is the relative change of their kept values."""
    result = copy.deepcopy(model)
    for name in layers:
        weight: Any = result.get_submodule(name).weight
        groups = weight.movedim(1, -1).unflatten(-1, (-1, pattern.m))
        mask = torch.zeros_like(groups).scatter(-1, groups.abs().topk(pattern.n, -1).indices, 1.0)
        mask = mask.flatten(-2).movedim(-1, 1)
        weight.mul_(mask * (1 + moved * torch.randn_like(weight)))
    return result


@torch.no_grad()
def between(dense: nn.Module, sparse: nn.Module, theta: float) -> nn.Module:
    """The network with weights sparse + theta (dense - sparse), in float64."""
    result = copy.deepcopy(sparse).double()
    for (_, s), d in zip(result.named_parameters(), dense.parameters(), strict=True):
        s.lerp_(d.double(), theta)
    return result


@dataclass
class Counts:
    """Counts over cases: their number, how many each tier certifies, and contradictions of certificates."""

    cases: int = 0
    certified: dict[str, int] = field(default_factory=lambda: dict.fromkeys(TIERS, 0))
    labels: dict[str, int] = field(default_factory=lambda: dict.fromkeys(TIERS, 0))
    bounds: dict[str, int] = field(default_factory=lambda: dict.fromkeys(TIERS, 0))
    entropy: dict[str, int] = field(default_factory=lambda: dict.fromkeys(TIERS, 0))
    closest: dict[str, float] = field(default_factory=lambda: dict.fromkeys(TIERS, 0.0))

    @property
    def contradictions(self) -> int:
        """Over all tiers: wrong labels, exceeded bounds, and larger rises of cross-entropy than proven."""
        return sum(sum(table.values()) for table in (self.labels, self.bounds, self.entropy))

    def add(self, other: Counts) -> None:
        """Add other counts; ``closest`` becomes the larger of the two."""
        self.cases += other.cases
        for tier in TIERS:
            for name in ("certified", "labels", "bounds", "entropy"):
                getattr(self, name)[tier] += getattr(other, name)[tier]
            self.closest[tier] = max(self.closest[tier], other.closest[tier])


@torch.no_grad()
def check(dense: nn.Module, sparse: nn.Module, x: Tensor, report: Certificates, thetas: tuple[float, ...]) -> Counts:
    """Compare a report with the networks themselves.

    Args:
        thetas: points between sparse (0) and dense (1) at which tiers 1 and 2 are checked too. Only used if one layer
            is replaced, because only then do they make a claim about such points.
    """
    counts = Counts(cases=len(x))
    before, before32 = copy.deepcopy(dense).double()(x.double()), dense(x)
    label, label32 = before.argmax(1), before32.argmax(1)
    truth = torch.randint(0, before.shape[1], (len(x),), generator=torch.Generator().manual_seed(0))
    networks: list[tuple[bool, nn.Module]] = [(True, copy.deepcopy(sparse).double()), (True, sparse)]
    networks += [(False, between(dense, sparse, theta)) for theta in thetas]
    for tier in report.tiers:
        kept, eta = torch.tensor(tier.kept), torch.tensor(tier.eta, dtype=torch.float64)
        counts.certified[tier.name] = int(kept.sum())
        rise = cross_entropy_bound(before, truth, eta)
        for end, model in networks:
            if not end and tier.name == TIERS[0]:
                continue
            single = next(model.parameters()).dtype == torch.float32
            after = model(x if single else x.double())
            change = (after.double() - (before32 if single else before).double()).abs().amax(1)
            counts.labels[tier.name] += int((kept & (after.argmax(1) != (label32 if single else label))).sum())
            counts.bounds[tier.name] += int((change > eta).sum())
            if not single:
                loss = nn.functional.cross_entropy
                real = loss(after, truth, reduction="none") - loss(before, truth, reduction="none")
                counts.entropy[tier.name] += int((real > rise + 1e-12).sum())
            if end and not single:
                counts.closest[tier.name] = max(counts.closest[tier.name], float((change / eta).nan_to_num(0).max()))
    return counts


Case = tuple[str, str, nn.Module, nn.Module, Tensor, tuple[float, ...]]


def cases(seed: int, kind: str, samples: int) -> Iterator[Case]:
    """One random network with every pattern: each layer by itself, all at once, and all with kept values changed."""
    rng = random.Random(seed)
    torch.manual_seed(seed)
    dense, shape = network(kind, rng)
    x = torch.randn(samples, *shape) * rng.choice((0.5, 1.0, 2.0))
    for text in PATTERNS:
        pattern = Pattern.parse(text)
        names = prunable(dense, pattern)
        for place, name in enumerate(names):
            depth = "last" if place == len(names) - 1 else "earlier"
            thetas = (rng.uniform(0.05, 0.95), rng.uniform(0.05, 0.95))
            yield text, depth, dense, pruned(dense, [name], pattern), x, thetas
        if len(names) > 1:
            yield text, "all", dense, pruned(dense, names, pattern), x, ()
        yield text, "all, moved", dense, pruned(dense, names, pattern, 0.05), x, ()


def soundness(least: int, samples: int, seed: int = 0, splits: int = 4) -> Iterator[dict[tuple[str, str, str], Counts]]:
    """Check at least this many cases, network by network; yields (kind, pattern, layers) -> the counts so far."""
    found: dict[tuple[str, str, str], Counts] = {}
    total = 0
    while total < least:
        kind = KINDS[seed % len(KINDS)]
        for pattern, depth, dense, sparse, x, thetas in cases(seed, kind, samples):
            report = mpcompile.certify(dense, sparse, x, splits=splits, progress=False)
            one = check(dense, sparse, x, report, thetas)
            found.setdefault((kind, pattern, depth), Counts()).add(one)
            total += one.cases
        seed += 1
        wrong = sum(f.contradictions for f in found.values())
        print(
            f"\r{total} cases, {wrong} contradictions", end="\n" if total >= least else "", file=sys.stderr, flush=True
        )
        yield found


def chord(x: Enclosure) -> Enclosure:
    """An unsound rule of ReLU for the control: its chord without the gap to the function."""
    if x.exact:
        return Enclosure(x.center.relu())
    low, high = x.bounds
    share = torch.where(low >= 0, 1.0, torch.where(high <= 0, 0.0, high / (high - low)))
    slope = None if x.slope is None else share * x.slope
    return Enclosure(share * x.center, slope, share * x.spread, tuple(share * t for t in x.tangents))


def control(samples: int, networks: int = 2) -> Counts:
    """Run the same check on ReLU networks with the unsound rule."""
    total = Counts()
    with mock.patch.dict(rules.RULES, {"relu": chord}), mock.patch(f"{__name__}.ACTIVATIONS", (nn.ReLU,)):
        for seed in range(networks):
            for _, _, dense, sparse, x, thetas in cases(seed, "mlp", samples):
                total.add(check(dense, sparse, x, mpcompile.certify(dense, sparse, x, progress=False), thetas))
    return total


def real(folder: Path, name: str, pattern: str, samples: int, score: str, splits: int) -> dict[str, Any]:
    """Certify a real model: all layers together, and each layer by itself."""
    job = task(folder, name)
    x, labels = (t[:samples] for t in job.evaluation)
    calibration = None
    options: dict[str, Any] = {"score": score, "permute": False, "restore": False}
    if score != "magnitude":
        calibration = list(job.calibration[0][:128].split(32))
        options = {"score": score, "permute": True, "restore": True}
    sparse = mpcompile.transform(job.model, x[:2], Config(pattern=pattern, **options), calibration)
    start = time.perf_counter()
    report = mpcompile.certify(job.model, sparse.eval(), [(x, labels)], splits=splits)
    print(f"{name} {pattern} {score}\n{report}\n", flush=True)
    data = report.to_dict()
    for tier in data["tiers"]:
        del tier["kept"], tier["eta"]
    return {
        "model": name,
        "pattern": pattern,
        "score": score,
        "splits": splits,
        "seconds": round(time.perf_counter() - start, 1),
        **data,
    }


def coverage(found: dict[tuple[str, str, str], Counts]) -> list[dict[str, Any]]:
    """Rows of the table: cases, share certified by each tier, contradictions, closest approach to a bound."""
    rows = []
    for (kind, pattern, depth), one in sorted(found.items()):
        share = {tier: one.certified[tier] / one.cases for tier in TIERS}
        row = {"network": kind, "pattern": pattern, "layers": depth, "cases": one.cases, "certified": share}
        rows.append({**row, "contradictions": one.contradictions, "closest": one.closest})
    return rows


def figure(rows: list[dict[str, Any]], models: list[dict[str, Any]], folder: Path) -> None:
    """Plot the coverage of random networks, and of every layer of the real ones."""
    kinds = list(dict.fromkeys(row["network"] for row in rows))
    height = 2.6 * (len(kinds) + len(models))
    path = folder / "certificates.png"
    with plotted(path, (9, height), rows=len(kinds) + len(models)) as canvas:
        if canvas is None:
            return
        drawn, axes = canvas
        for axis, kind in zip(axes[:, 0], kinds, strict=False):
            here = [row for row in rows if row["network"] == kind]
            for number, tier in enumerate(TIERS):
                places = [i + (number - 1.5) * 0.2 for i in range(len(here))]
                axis.bar(places, [100 * row["certified"][tier] for row in here], 0.2, label=f"tier {tier}")
            ticks = [f"{row['pattern']}\n{row['layers']}" for row in here]
            axis.set_xticks(range(len(here)), ticks, fontsize=6)
            axis.set_title(f"random networks: {kind}", fontsize=9)
            axis.set_ylabel("certified, %", fontsize=8)
        for axis, model in zip(axes[len(kinds) :, 0], models, strict=True):
            for number, tier in enumerate(TIERS):
                shares = [100 * layer["certified"].get(tier, 0) / model["samples"] for layer in model["layers"]]
                axis.plot(range(len(shares)), shares, "o-", markersize=3, color=f"C{number}")
            axis.set_title(f"{model['model']}, {model['pattern']}, {model['score']}: one layer replaced", fontsize=9)
            axis.set_ylabel("certified, %", fontsize=8)
            axis.set_xlabel("layer, first to last", fontsize=8)
        drawn.legend(*axes[0, 0].get_legend_handles_labels(), fontsize=7, ncols=4, loc="outside lower center")


def summary(rows: list[dict[str, Any]]) -> str:
    """The table of coverage."""
    lines = []
    for row in rows:
        shares = [f"{row['certified'][tier]:.1%}" for tier in TIERS]
        lines.append([row["network"], row["pattern"], row["layers"], row["cases"], *shares, row["contradictions"]])
    return table(lines, ["network", "pattern", "layers", "cases", *TIERS, "contradicted"], left=3)


def main() -> int:
    """Measure, print, write; return 1 if a certificate was contradicted or the control was not caught."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    common_arguments(parser)
    parser.add_argument("--cases", type=int, help="minimum number of cases (100000)")
    parser.add_argument("--batch", type=int, help="samples per network (1024)")
    parser.add_argument("--data", type=Path, metavar="FOLDER", help="weights and images with load.py: adds real models")
    parser.add_argument("--models", nargs="*", default=["resnet20", "vit_tiny"])
    parser.add_argument("--patterns", nargs="*", default=["12:16"], help="of the real models")
    parser.add_argument("--scores", nargs="*", default=["magnitude"], help="of the real models")
    parser.add_argument("--samples", type=int, help="samples per real model (100)")
    parser.add_argument("--splits", type=int, default=4)
    parser.add_argument("--only-real", action="store_true", help="keep the random networks of the last run")
    args = parser.parse_args()
    fill(args, {"cases": 100_000, "batch": 1024, "samples": 100}, {"cases": 2_000, "batch": 64, "samples": 4})
    result: dict[str, Any] = (load("certificates", args.out) if args.only_real else None) or {}
    if not args.only_real:
        caught = control(64)
        result["control"] = {"cases": caught.cases, "caught": caught.contradictions}
        for found in soundness(args.cases, args.batch, splits=args.splits):
            rows = coverage(found)
            result |= {"cases": sum(row["cases"] for row in rows), "coverage": rows}
            result |= {"contradictions": sum(row["contradictions"] for row in rows), "environment": environment()}
            save("certificates", result, args.out)
        print(summary(rows))
        print(f"{result['cases']} cases, {result['contradictions']} contradicted; control: {result['control']}")
    models = {(m["model"], m["pattern"], m["score"]): m for m in result.get("models", [])}
    if args.data is not None:
        for name in args.models:
            for pattern in args.patterns:
                for score in args.scores:
                    models[name, pattern, score] = real(args.data, name, pattern, args.samples, score, args.splits)
                    result["models"] = list(models.values())
                    save("certificates", result, args.out)
    result |= {"models": list(models.values()), "environment": environment()}
    save("certificates", result, args.out)
    figure(result.get("coverage", []), result["models"], args.out)
    return int(bool(result.get("contradictions")) or not result.get("control", {"caught": 1})["caught"])


if __name__ == "__main__":
    sys.exit(main())
