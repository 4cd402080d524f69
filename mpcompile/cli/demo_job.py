"""The demo, on real data: a small vision transformer for handwritten digits, from training to a compiled build.

Data: scikit-learn's ``load_digits``, 1,797 scans of 8x8 pixels, upsampled to 32x32.
"""

from __future__ import annotations

import copy
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
from mpcompile.backend import mpsparse
from mpcompile.config import Config
from mpcompile.errors import ArtifactError, MPCompileError
from mpcompile.io.writing import make_folder, write_atomically
from mpcompile.ir.module import IRModule
from mpcompile.kernels.store import cache_folder
from mpcompile.measure.audit import audit
from mpcompile.measure.report import COMPILED, DENSE_EAGER, Report
from mpcompile.pipeline import transform
from mpcompile.plan import Plan
from mpcompile.rmt.analysis import analyze
from mpcompile.training.distill import distill, parameter_groups

HELD_OUT, FOLDS = 450, 4  # scans per fold, number of folds; of the 1,797 scans, the last fold has 447
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
        verbose: also return the tables of audit, plan and analysis.
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
    settings = [demo.architecture, demo.epochs, demo.seed, fold, torch.get_num_threads(), torch.__version__, SHIFT]
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
    """Run the whole job and write the page, the artifact, the figures, the plan and the analysis into ``demo.out``.

    Returns:
        The summary, after the tables of audit, plan and analysis if ``demo.verbose``.
    """
    if demo.threads:
        torch.set_num_threads(demo.threads)
    make_folder(demo.out)
    data = load_data(demo.seed)
    images, labels = data.test
    demo.step(f"training a dense vision transformer on {len(data.train[0]):,} scans, {demo.epochs} epochs")
    dense = train_dense(demo, data)
    demo.step("pruning its weights, merging its tokens, distilling it")
    narrow, before = (_transformed(demo, dense, data, pattern) for pattern in ("2:4", "auto"))  # auto: 8:16 on a CPU
    student = copy.deepcopy(before)
    distill(student, dense, Batches(data.train, demo.seed + 1), lr=1e-3, progress=demo.progress)
    path = demo.out / "digits.mpc"
    mpcompile.save(student, path)
    student = mpcompile.load(path)  # the audit measures the saved artifact
    demo.step("compiling, and measuring every build")
    batches = list(zip(images.split(64), labels.split(64), strict=True))
    others = {"transformed 2:4": narrow, "transformed": before, "... distilled": student}
    compiled = torch.compile(student, backend=mpsparse, options={"frozen": True})
    report = audit(dense, compiled, batches, others=others, rounds=30, progress=demo.progress)
    demo.step("fitting the Marchenko-Pastur law to the dense weights")
    analysis = analyze(dense, progress=None if demo.progress else False)  # None: on a terminal alone
    write_atomically(demo.out / "report.json", report.to_json(indent=1))
    write_atomically(demo.out / "plan.json", student.plan.to_json(indent=1))
    write_atomically(demo.out / "analysis.json", analysis.to_json(indent=1))
    if importlib.util.find_spec("matplotlib") is not None:
        analysis.plot(demo.out / "analysis.png")
    _write_page(demo.out, student, images)
    text = summary(demo.out, dense, report, student.plan)
    if demo.verbose:
        law = f"The Marchenko-Pastur law in the dense model\n\n{analysis}"
        text = f"{report}\n\n{student.plan}\n\n{law}\n\n{text}"
    return text


def _transformed(demo: Demo, dense: nn.Module, data: Digits, pattern: str) -> IRModule:
    """Return the dense model with masks and merging, calibrated on 256 scans of the training set."""
    config = Config(pattern=pattern, tome_r=8)
    calibration = data.train[0][:256].split(64)
    gm = transform(dense, data.test[0][:64], config, calibration, seed=demo.seed)
    gm.plan.provenance = {
        "model": TITLE,
        "weights": f"trained by mpcompile demo, seed {demo.seed}",
        "num_classes": 10,
        "data": {"input_size": list(data.test[0].shape[1:])},
        "calibration_images": 256,
    }
    return gm


def _write_page(out: Path, student: IRModule, images: Tensor) -> None:
    """Write ``report.html`` as ``mpcompile report digits.mpc --audit report.json --analyze analysis.json`` does.

    Its pictures of merged tokens are of the first held-out scans.
    """
    from mpcompile import page
    from mpcompile.page.sources import Sources, read_json

    audited, analyzed = read_json(out / "report.json", "audit"), read_json(out / "analysis.json", "analyze")
    sources = Sources(audit=audited, analyze=analyzed)
    page.add_artifact(sources, out / "digits.mpc")
    for number, image in enumerate(images[:PICTURES], 1):
        grey = (255 * (image - image.min()) / (image.max() - image.min())).round().byte()
        pixels = grey.expand(3, -1, -1).permute(1, 2, 0).repeat_interleave(8, 0).repeat_interleave(8, 1).numpy()
        sources.pictures[f"held-out scan {number}"] = page.merging_steps(student, image, pixels)
    page.write(out / "report.html", sources)


def summary(out: Path, dense: nn.Module, report: Report, plan: Plan) -> str:
    """Return the result of the demo in a few lines.

    Args:
        out: folder of the page and the artifact.
        dense: the dense model.
        report: audit with labels and latencies.
        plan: plan of the artifact.
    """
    was: Any = report[DENSE_EAGER]
    now: Any = report[COMPILED]
    best: Any = report.best_dense
    weights = sum(parameter.numel() for parameter in dense.parameters())
    patterns = ", ".join(sorted({layer.pattern for layer in plan.layers.values()} - {"dense"}))
    points = 100 * (now.correct - was.correct) / was.samples
    faster = "faster" if now.speedup >= 1 else "slower"
    dtype = report.environment["dtype"]
    lines = {
        "made": f"{patterns} masks in {len(plan.masked)} of {len(plan.layers)} layers, "
        f"{plan.config['tome_r']} tokens merged per block, distilled from the dense model",
        "accuracy": f"dense {was.top1:.2%} -> {now.top1:.2%} on {was.samples} held-out scans: {points:+.2f} points "
        f"({now.lost} scans lost, {now.won} won)",
        "work": f"{was.macs / 1e6:.2f} -> {now.macs / 1e6:.2f} million multiply-accumulates per scan: "
        f"{1 - now.macs / was.macs:.1%} saved",
        "speed": f"{now.speedup:.2f}x, {faster} than the best dense build: {now.latency_ms:.2f} ms for "
        f"{report.environment['batch']} scans, {best.name} {best.latency_ms:.2f} ms, all {dtype}",
        "report": f"{out / 'report.html'} (open it in a browser)",
        "artifact": f"{out / 'digits.mpc'} ({(out / 'digits.mpc').stat().st_size / 2**20:.2f} MiB)",
        "tables": "report.json, plan.json and analysis.json in the same folder; --verbose prints them",
    }
    head = f"{TITLE}, {weights / 1e6:.2f} million weights: trained, pruned, merged, distilled, compiled"
    return "\n".join([head, "", *(f"  {name:8}  {text}" for name, text in lines.items())])
