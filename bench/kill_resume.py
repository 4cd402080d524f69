"""Does a run that is killed again and again end with the weights of an undisturbed one?

    python -m bench.kill_resume --kills 20

A two-block transformer with dropout is distilled on random images, with a checkpoint after every step. The run is
forked off, killed with SIGKILL at a random moment, and taken up again; at the end all weights are compared bit by
bit.
"""

from __future__ import annotations

import argparse
import os
import random
import signal
import tempfile
import time
from pathlib import Path
from typing import Any

import timm
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

import mpcompile
from bench.common import common_arguments, environment, fill, save
from mpcompile.training import checkpoint


class Noise(Dataset[tuple[Tensor, int]]):
    """Random images, shifted at random each time they are read."""

    def __init__(self, count: int) -> None:
        self.images = torch.randn(count, 3, 32, 32, generator=torch.Generator().manual_seed(0))

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.images[index].roll(random.randrange(4), -1) + 0.1 * torch.randn(3, 32, 32), index % 10


def models() -> tuple[nn.Module, Any]:
    """A dense transformer, and its masked, merged student."""
    torch.manual_seed(0)
    shape = {"img_size": 32, "patch_size": 8, "embed_dim": 64, "depth": 2, "num_heads": 2, "num_classes": 10}
    dense = timm.models.vision_transformer.VisionTransformer(**shape, drop_path_rate=0.1, proj_drop_rate=0.1).eval()
    config = mpcompile.Config(pattern="2:4", score="magnitude", tome_r=2)
    return dense, mpcompile.transform(dense, torch.randn(1, 3, 32, 32), config)


def train(folder: Path, epochs: int, dense: nn.Module, student: Any) -> None:
    """One run, or the rest of one; leaves its weights in ``folder/final.pt``."""
    loader = DataLoader(Noise(96), 16, shuffle=True)
    options = {"epochs": epochs, "lr": 1e-3, "ema": 0.99, "features": 0.5, "accumulate": 2, "checkpoint_steps": 1}
    mpcompile.distill(student, dense, loader, out=folder, resume="auto", progress=False, **options)
    torch.save(student.state_dict(), folder / "final.pt")


def forked(folder: Path, epochs: int, made: tuple[nn.Module, Any], writes: float, moment: float) -> bool:
    """Run in a process of its own, killed some time after so many checkpoints; True if it came to its end before.

    Args:
        writes: checkpoints that are let through.
        moment: how long after the last of them, as a share of the time between two.
    """
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            # The first call after a fork renews PyTorch's thread pool. Made here, before autograd starts its threads:
            # two threads that make it at once can find no pool at all, and PyTorch aborts.
            torch.set_num_threads(1)
            train(folder, epochs, *made)
            code = 0
        finally:
            os._exit(code)
    path, seen, start = folder / checkpoint.NAME, 0, time.monotonic()
    last = path.stat().st_ino if path.exists() else None
    end = start + 0.2 * moment if writes == 0 else float("inf")
    times = [start]
    while time.monotonic() < end:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            if status:
                raise SystemExit("a run failed of itself, without being killed")
            return True
        found = path.stat().st_ino if path.exists() else None
        if found != last:
            last, seen = found, seen + 1
            times.append(time.monotonic())
            if seen == writes:
                between = times[-1] - times[-2]
                end = times[-1] + moment * between
        time.sleep(0.001)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    return False


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    common_arguments(parser)
    parser.add_argument("--kills", type=int)
    parser.add_argument("--epochs", type=int)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    fill(args, {"kills": 20, "epochs": 24}, {"kills": 3, "epochs": 5})
    torch.set_num_threads(1)  # so that processes can be forked off
    draw = random.Random(args.seed)
    with tempfile.TemporaryDirectory() as name:
        whole, broken = Path(name) / "whole", Path(name) / "broken"
        made = models()
        forked(whole, args.epochs, made, float("inf"), 0.0)
        expected = torch.load(whole / "final.pt", weights_only=True)
        kills, steps, done = 0, [], False
        while not done:
            writes = draw.randrange(4) if kills < args.kills else float("inf")
            done = forked(broken, args.epochs, made, writes, draw.random())
            if not done:
                kills += 1
                path = broken / checkpoint.NAME
                steps.append(int(checkpoint.read(path)["step"]) if path.exists() else 0)
                print(f"kill {kills}: the checkpoint is at step {steps[-1]}", flush=True)
        found = torch.load(broken / "final.pt", weights_only=True)
        left = [p.name for p in broken.iterdir() if p.name.endswith(".tmp")]
    equal = expected.keys() == found.keys() and all(torch.equal(expected[k], found[k]) for k in expected)
    print(
        f"{kills} kills; final weights {'equal bit by bit' if equal else 'DIFFER'}; files left behind: {left or 'none'}"
    )
    result = {"kills": kills, "steps at kills": steps, "equal": equal, "left": left, "environment": environment(1)}
    save("kill_resume", result, args.out)
    raise SystemExit(0 if equal and not left and kills == args.kills and steps[-1] else 1)


if __name__ == "__main__":
    main()
