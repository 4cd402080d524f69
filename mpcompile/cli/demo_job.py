"""The demo, on real data: a small vision transformer for handwritten digits, from training to a compiled build.

Data: scikit-learn's ``load_digits``, 1,797 scans of 8x8 pixels, upsampled to 32x32.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

import mpcompile
from mpcompile.errors import ArtifactError, MPCompileError
from mpcompile.io.writing import make_folder, write_atomically
from mpcompile.kernels.store import cache_folder
from mpcompile.measure.audit import audit
from mpcompile.measure.report import COMPILED, DENSE_EAGER, Report
from mpcompile.optimization.accuracy.outcome import Outcome
from mpcompile.rmt.analysis import analyze
from mpcompile.training.distill import parameter_groups

HELD_OUT, FOLDS = 450, 4  # scans per fold, number of folds; of the 1,797 scans, the last fold has 447
KEPT_BACK = 300  # training scans that judge builds
BATCH = 64  # scans per call
MAX_DROP = 0.01
SCANS = "scans of handwritten digits"
SHIFT = 2  # pixels of random shift in training
PICTURES = 2  # held-out scans on the page
TITLE = "A vision transformer that reads handwritten digits"


@dataclass(frozen=True)
class Demo:
    """Options of the demo.

    Attributes:
        quick: two blocks and 12 epochs instead of four and 20.
        seed: seed of the split, the weights and the batches.
        out: folder for the results.
        threads: number of PyTorch's CPU threads; None leaves the choice to PyTorch.
        progress: print the steps of the job to stderr, with progress bars on a terminal.
        verbose: also return the tables of search, audit, plan and analysis.
    """

    quick: bool = False
    seed: int = 0
    out: Path = Path("mpcompile-demo")
    threads: int | None = None
    progress: bool = True
    verbose: bool = False

    @property
    def architecture(self) -> dict[str, Any]:
        """Arguments of timm's ``VisionTransformer``."""
        size = {"img_size": 32, "patch_size": 4, "in_chans": 1, "embed_dim": 64, "num_heads": 4}
        return {**size, "depth": 2 if self.quick else 4, "num_classes": 10, "global_pool": "avg"}

    @property
    def epochs(self) -> int:
        """Epochs of training."""
        return 12 if self.quick else 20

    @property
    def minutes(self) -> float:
        """Time budget of the search."""
        return 1.0 if self.quick else 4.0

    def step(self, text: str) -> None:
        """Print the step that the job is starting."""
        if self.progress:
            print(f"demo: {text}", file=sys.stderr, flush=True)


@dataclass
class Digits:
    """Normalised images (B, 1, 32, 32) and labels (B,) of training and held-out scans."""

    train: tuple[Tensor, Tensor]
    test: tuple[Tensor, Tensor]


def split(count: int, seed: int, fold: int = 0) -> tuple[Tensor, Tensor]:
    """Return the indices of the training and of the held-out scans among ``count``."""
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed))
    start, end = fold * HELD_OUT, (fold + 1) * HELD_OUT
    return torch.cat([order[:start], order[end:]]), order[start:end]


def load_data(seed: int, fold: int = 0) -> Digits:
    """Return the digits, shuffled by ``seed``; part ``fold`` of :data:`FOLDS` is held out.

    Raises:
        MPCompileError: scikit-learn is not installed.
    """
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise MPCompileError(
            "the demo needs scikit-learn, which contains the digits", hint="run pip install 'mpcompile[demo]'"
        ) from error
    digits = load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32)[:, None] / 16
    images = F.interpolate(images, size=32, mode="bilinear", align_corners=False)
    labels = torch.tensor(digits.target)
    train, test = split(len(images), seed, fold)
    images = (images - images[train].mean()) / images[train].std()
    return Digits((images[train], labels[train]), (images[test], labels[test]))


class Batches:
    """Shuffled, randomly shifted training batches: a new order on every iteration, determined by the seed."""

    def __init__(self, data: tuple[Tensor, Tensor], seed: int, size: int = 32) -> None:
        self.images, self.labels = data
        self.size = size
        self.generator = torch.Generator().manual_seed(seed)

    def __len__(self) -> int:
        return len(self.images) // self.size

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        order = torch.randperm(len(self.images), generator=self.generator)
        padded = F.pad(self.images, (SHIFT,) * 4, value=float(self.images.min()))
        edge = self.images.shape[-1]
        for start in range(0, len(self) * self.size, self.size):
            chosen = order[start : start + self.size]
            y, x = torch.randint(0, 2 * SHIFT + 1, (2,), generator=self.generator).tolist()
            yield padded[chosen, :, y : y + edge, x : x + edge], self.labels[chosen]


def train_dense(demo: Demo, data: Digits, fold: int = 0) -> nn.Module:
    """Train the dense model, or read it from the cache if an earlier run with the same settings trained it."""
    from safetensors.torch import load_file, save_file
    from timm.models.vision_transformer import VisionTransformer

    torch.manual_seed(demo.seed)
    model = VisionTransformer(**demo.architecture)
    settings = [
        demo.architecture,
        demo.epochs,
        demo.seed,
        fold,
        len(data.train[0]),
        torch.get_num_threads(),
        torch.__version__,
        SHIFT,
    ]
    key = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:16]
    folder = cache_folder()
    cached = folder / f"digits-{key}.safetensors"
    if cached.is_file():
        try:
            model.load_state_dict(load_file(cached))
            return model.eval()
        except Exception:
            cached.unlink(missing_ok=True)  # damaged, or written by another program: train again
    batches = Batches(data.train, demo.seed)
    optimizer = torch.optim.AdamW(parameter_groups(model, 0.05), lr=2e-3)
    steps = demo.epochs * len(batches)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=steps, pct_start=0.2)
    hidden = None if demo.progress else True
    for _ in tqdm(range(demo.epochs), desc="train dense", unit="epoch", disable=hidden):
        for scans, digits in batches:
            loss = F.cross_entropy(model(scans), digits, label_smoothing=0.1)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_atomically(cached, lambda temporary: save_file(model.state_dict(), temporary))
    except (OSError, ArtifactError):
        pass  # without the cache, the next run trains again
    return model.eval()


def run(demo: Demo) -> str:
    """Run the whole job and write the page, the artifact, its runner, the figures, the plan and the analysis.

    Returns:
        The summary, after the tables of search, audit, plan and analysis if ``demo.verbose``.
    """
    if demo.threads:
        torch.set_num_threads(demo.threads)
    make_folder(demo.out)
    data, judges = kept_back(load_data(demo.seed))
    scans = f"{len(data.train[0]):,} scans, {demo.epochs} epochs"
    demo.step(f"training a dense vision transformer on {scans}")
    dense = train_dense(demo, data)
    demo.step(f"searching for the fastest build that drops by at most {MAX_DROP:.0%} on {KEPT_BACK} other scans")
    path = demo.out / "digits.mpc"
    result = _optimized(demo, dense, data, judges, path)
    demo.step("measuring it on held-out scans")
    images, labels = data.test
    batches = list(zip(images.split(BATCH), labels.split(BATCH), strict=True))
    runner = mpcompile.load_runner(path)  # the audit measures what was saved
    report = audit(dense, runner, batches, rounds=30, progress=demo.progress)
    demo.step("fitting the Marchenko-Pastur law to the dense weights")
    analysis = analyze(dense, progress=None if demo.progress else False)  # None: on a terminal alone
    result.frontier.write(demo.out / "frontier.json")
    write_atomically(demo.out / "report.json", report.to_json(indent=1))
    write_atomically(demo.out / "plan.json", result.module.plan.to_json(indent=1))
    write_atomically(demo.out / "analysis.json", analysis.to_json(indent=1))
    if importlib.util.find_spec("matplotlib") is not None:
        analysis.plot(demo.out / "analysis.png")
    _write_page(demo.out, result, images)
    text = summary(demo.out, dense, report, result)
    if demo.verbose:
        law = f"The Marchenko-Pastur law in the dense model\n\n{analysis}"
        text = f"{result}\n\n{report}\n\n{result.module.plan}\n\n{law}\n\n{text}"
    return text


def kept_back(data: Digits) -> tuple[Digits, tuple[Tensor, Tensor]]:
    """Take :data:`KEPT_BACK` training scans out, which judge builds: neither training nor fits see them."""
    (images, labels), cut = data.train, len(data.train[0]) - KEPT_BACK
    return Digits((images[:cut], labels[:cut]), data.test), (images[cut:], labels[cut:])


def _optimized(
    demo: Demo, dense: nn.Module, data: Digits, judges: tuple[Tensor, Tensor], path: Path
) -> mpcompile.Optimized:
    """Return the fastest build for batches of :data:`BATCH` scans, saved at ``path``."""
    result = mpcompile.optimize(
        dense,
        data.train[0][:256].split(64),
        validation=list(zip(*(part.split(BATCH) for part in judges), strict=True)),
        max_drop=MAX_DROP,
        batch=BATCH,
        minutes=demo.minutes,
        seed=demo.seed,
        progress=demo.progress,
    )
    result.module.plan.provenance |= {
        "model": TITLE,
        "weights": f"trained by mpcompile demo, seed {demo.seed}",
        "num_classes": 10,
        "data": {"input_size": list(data.test[0].shape[1:])},
        "calibration_images": 256,
    }
    result.save(path)
    return result


def _write_page(out: Path, result: mpcompile.Optimized, images: Tensor) -> None:
    """Write ``report.html`` as ``mpcompile report digits.mpc --optimize frontier.json --audit report.json ...`` does.

    Its pictures of merged tokens are of the first held-out scans.
    """
    from mpcompile import page
    from mpcompile.page.sources import Sources, read_json

    audited, analyzed = read_json(out / "report.json", "audit"), read_json(out / "analysis.json", "analyze")
    sources = Sources(audit=audited, analyze=analyzed, optimize=read_json(out / "frontier.json", "optimize"))
    page.add_artifact(sources, out / "digits.mpc")
    merged = any(result.recipe.merges)
    for number, image in enumerate(images[: PICTURES if merged else 0], 1):
        grey = (255 * (image - image.min()) / (image.max() - image.min())).round().byte()
        pixels = grey.expand(3, -1, -1).permute(1, 2, 0).repeat_interleave(8, 0).repeat_interleave(8, 1).numpy()
        sources.pictures[f"held-out scan {number}"] = page.merging_steps(result.module, image, pixels)
    page.write(out / "report.html", sources)


def summary(out: Path, dense: nn.Module, report: Report, result: mpcompile.Optimized) -> str:
    """Return the result of the demo in a few lines.

    Args:
        out: folder of the page and the artifact.
        dense: the dense model.
        report: audit of the chosen build with labels.
        result: of the search.
    """
    was: Any = report[DENSE_EAGER]
    now: Any = report[COMPILED]
    chosen: Any = result.chosen
    best: Any = result.frontier.best_dense
    weights = sum(parameter.numel() for parameter in dense.parameters())
    outcome = Outcome(was.samples, 0, now.lost, now.won, now.correct, 0.0, 0.0)
    low, high = outcome.interval()
    drop = f"{100 * outcome.drop:.2f} ± {50 * (high - low):.2f} points on {was.samples} held-out scans"
    head = f"{TITLE}: {result.speedup:.2f} times as fast as the best dense build, at a drop of {drop}"
    if chosen.dense:
        head = f"{TITLE}: nothing beats the best dense build at a drop of {MAX_DROP:.0%}"
    lines = {
        "model": f"{weights / 1e6:.2f} million weights, trained on {SCANS}",
        "made": chosen.name,
        "accuracy": f"dense {was.top1:.2%} -> {now.top1:.2%} ({now.lost} scans lost, {now.won} won)",
        "work": f"{was.macs / 1e6:.2f} -> {now.macs / 1e6:.2f} million multiply-accumulates per scan: "
        f"{1 - now.macs / was.macs:.1%} saved",
        "speed": f"{chosen.latency_ms:.2f} ms for {BATCH} scans; {best.name} {best.latency_ms:.2f} ms",
        "tried": f"{len(result.frontier)} builds, in {', '.join(_runtimes(result))}",
        "report": f"{out / 'report.html'} (open it in a browser)",
        "artifact": f"{out / 'digits.mpc'} ({(out / 'digits.mpc').stat().st_size / 2**20:.2f} MiB); "
        "mpcompile.load_runner runs it",
        "tables": "frontier.json, report.json, plan.json and analysis.json in the same folder; --verbose prints them",
    }
    return "\n".join([head, "", *(f"  {name:8}  {text}" for name, text in lines.items())])


def _runtimes(result: mpcompile.Optimized) -> list[str]:
    return sorted({entry.runtime for entry in result.frontier if entry.runtime is not None})
