"""The main job on real data: a small vision transformer for handwritten digits, from training to a compiled build.

Data: scikit-learn's ``load_digits``, 1,797 scans of 8x8 pixels, upsampled to 32x32.
"""

from __future__ import annotations

import copy
import hashlib
import importlib.util
import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
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
from mpcompile.kernels.store import cache_folder
from mpcompile.measure.audit import audit
from mpcompile.pipeline import transform
from mpcompile.rmt.analysis import analyze
from mpcompile.training.distill import distill, parameter_groups

HELD_OUT, FOLDS = 450, 4  # of 1,797 scans: the last part has 447
SHIFT = 2  # pixels of random shift in training


@dataclass(frozen=True)
class Demo:
    """Options of the demo: a quick or the full one, seed, folder for results, threads, progress bars."""

    quick: bool = False
    seed: int = 0
    out: Path = Path("mpcompile-demo")
    threads: int | None = None
    progress: bool = True

    @property
    def architecture(self) -> dict[str, Any]:
        """Arguments of timm's VisionTransformer."""
        size = {"img_size": 32, "patch_size": 4, "in_chans": 1, "embed_dim": 64, "num_heads": 4}
        return {**size, "depth": 2 if self.quick else 4, "num_classes": 10, "global_pool": "avg"}

    @property
    def epochs(self) -> int:
        return 12 if self.quick else 20


@dataclass
class Digits:
    """Images (B, 1, 32, 32), normalised, and labels (B,), split into training and held-out scans."""

    train: tuple[Tensor, Tensor]
    test: tuple[Tensor, Tensor]


def split(count: int, seed: int, fold: int = 0) -> tuple[Tensor, Tensor]:
    """Places of the training and of the held-out scans among ``count``."""
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed))
    start, end = fold * HELD_OUT, (fold + 1) * HELD_OUT
    return torch.cat([order[:start], order[end:]]), order[start:end]


def load_data(seed: int, fold: int = 0) -> Digits:
    """The digits, shuffled under ``seed``, and of ``FOLDS`` parts number ``fold`` held out."""
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise MPCompileError(
            "the demo needs scikit-learn, which brings the digits", hint="pip install 'mpcompile[demo]'"
        ) from error
    digits = load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32)[:, None] / 16
    images = F.interpolate(images, size=32, mode="bilinear", align_corners=False)
    labels = torch.tensor(digits.target)
    train, test = split(len(images), seed, fold)
    images = (images - images[train].mean()) / images[train].std()
    return Digits((images[train], labels[train]), (images[test], labels[test]))


class Batches:
    """Shuffled, randomly shifted training batches; another order each time it is iterated, the same under one seed."""

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
    """The dense model, trained on the spot, or from the cache of an earlier run with the same settings."""
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
            cached.unlink(missing_ok=True)  # written by something else, or damaged: train again
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
        pass  # a cache that can't be written only costs the next run its time
    return model.eval()


def run(demo: Demo) -> str:
    """The whole job; returns what there is to read and leaves report, plan and model in ``demo.out``."""
    if demo.threads:
        torch.set_num_threads(demo.threads)
    make_folder(demo.out)
    data = load_data(demo.seed)
    dense = train_dense(demo, data)
    images, labels = data.test
    batches = list(zip(images.split(64), labels.split(64), strict=True))

    config = Config(pattern="auto", tome_r=8)  # 8:16 on a CPU, which runs it as fast as 2:4
    calibration = data.train[0][:256].split(64)
    narrow = transform(dense, images[:64], replace(config, pattern="2:4"), calibration, seed=demo.seed)
    student = transform(dense, images[:64], config, calibration, seed=demo.seed)
    before = copy.deepcopy(student)
    distill(student, dense, Batches(data.train, demo.seed + 1), lr=1e-3, progress=demo.progress)
    path = demo.out / "digits.mpc"
    mpcompile.save(student, path)
    student = mpcompile.load(path)  # what is audited is what was saved
    others = {"transformed 2:4": narrow, "transformed": before, "... distilled": student}
    compiled = torch.compile(student, backend=mpsparse, options={"frozen": True})
    report = audit(dense, compiled, batches, others=others, rounds=30, progress=demo.progress)
    analysis = analyze(dense, progress=demo.progress)
    files = [demo.out / "report.json", demo.out / "plan.json", path, demo.out / "analysis.json"]
    write_atomically(demo.out / "analysis.json", analysis.to_json(indent=1))
    if importlib.util.find_spec("matplotlib") is not None:
        files.append(demo.out / "analysis.png")
        analysis.plot(files[-1])
    plan = student.plan
    write_atomically(demo.out / "report.json", report.to_json(indent=1))
    write_atomically(demo.out / "plan.json", plan.to_json(indent=1))
    chosen = ", ".join(sorted({layer.pattern for layer in plan.layers.values()} - {"dense"}))
    text = f"Digits, {len(images)} held-out scans, {chosen} + ToMe r = {config.tome_r}\n\n{report}\n\n{plan}"
    text += f"\n\nThe Marchenko-Pastur law in the dense model\n\n{analysis}"
    return f"{text}\n\nwritten: {', '.join(map(str, files))}"
