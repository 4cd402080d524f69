"""Does a run that is killed again and again end with the weights of an undisturbed one?

    python -m bench.kill_resume --kills 20

A two-block transformer with dropout is distilled on random images, with a checkpoint after every step. The run is
forked off, killed with SIGKILL after a random time, and taken up again; at the end all weights are compared bit by
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


def train(folder: Path, epochs: int) -> None:
    """One run, or the rest of one; leaves its weights in ``folder/final.pt``."""
    dense, student = models()
    loader = DataLoader(Noise(96), 16, shuffle=True)
    options = {"epochs": epochs, "lr": 1e-3, "ema": 0.99, "features": 0.5, "accumulate": 2, "checkpoint_steps": 1}
    mpcompile.distill(student, dense, loader, out=folder, resume="auto", progress=False, **options)
    torch.save(student.state_dict(), folder / "final.pt")


def forked(folder: Path, epochs: int, seconds: float) -> bool:
    """Run in a process of its own, killed after so many seconds; True if it came to its end before."""
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            train(folder, epochs)
            code = 0
        finally:
            os._exit(code)
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            if status:
                raise SystemExit("a run failed of itself, without being killed")
            return True
        time.sleep(0.002)
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
    fill(args, {"kills": 20, "epochs": 12}, {"kills": 3, "epochs": 3})
    torch.set_num_threads(1)  # so that processes can be forked off
    draw = random.Random(args.seed)
    with tempfile.TemporaryDirectory() as name:
        whole, broken = Path(name) / "whole", Path(name) / "broken"
        start = time.monotonic()
        forked(whole, args.epochs, 1e9)
        seconds = time.monotonic() - start
        expected = torch.load(whole / "final.pt", weights_only=True)
        kills, steps, done = 0, [], False
        while not done:
            # Long enough to get on in the mean, and never again once there were enough.
            wait = draw.uniform(0, 2.5 * seconds / args.kills) if kills < args.kills else 1e9
            done = forked(broken, args.epochs, wait)
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
    raise SystemExit(0 if equal and not left else 1)


if __name__ == "__main__":
    main()
