"""Does a run that is killed again and again end with the weights of an uninterrupted one?

    python -m bench.robustness.kill_resume --kills 20
    python -m bench.robustness.kill_resume --kills 20 --command

A two-block transformer with dropout is distilled on random images, with a checkpoint after every step. The run is
forked, killed with SIGKILL at a random moment, and resumed; at the end, all weights are compared bit for bit, and so
are the contents of the logs. With ``--command``, ``mpcompile distill`` runs on a folder of images, with workers and
augmentation, and is killed at any moment after its start, even while it makes the student.
"""

from __future__ import annotations

import argparse
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import timm
import torch
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

import mpcompile
from bench.common import common_arguments, environment, fill, load, save
from mpcompile.training import checkpoint, events


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
    """Start or resume a run; its weights go to ``folder/final.pt``."""
    loader = DataLoader(Noise(96), 16, shuffle=True)
    options = {"epochs": epochs, "lr": 1e-3, "ema": 0.99, "features": 0.5, "accumulate": 2, "checkpoint_steps": 1}
    val = [(torch.randn(8, 3, 32, 32, generator=torch.Generator().manual_seed(1)), torch.arange(8))]
    mpcompile.distill(student, dense, loader, val, out=folder, resume="auto", progress=False, **options)
    torch.save(student.state_dict(), folder / "final.pt")


def forked(folder: Path, epochs: int, made: tuple[nn.Module, Any], writes: float, moment: float) -> bool:
    """Run in a separate process that is killed after a number of checkpoints; True if the run ended before.

    Args:
        writes: number of checkpoints before the kill.
        moment: time from the last of them to the kill, as a share of the time between two.
    """
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            # The first call after a fork renews PyTorch's thread pool. It is made before autograd starts its threads:
            # if two threads renew the pool at once, they may find none, and PyTorch aborts.
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
                raise SystemExit("a run failed without being killed")
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


RECIPE = """
model: test_resnet
compile: {pattern: "2:4", score: magnitude}
calibration: {images: 16, batch: 8}
train: {epochs: 3, lr: 1e-3, ema: 0.9, bn_batches: 2, checkpoint_steps: 2}
data: {batch: 8, size: 64, workers: 2, auto_augment: rand-m9-mstd0.5-inc1, reprob: 0.25}
"""


def pictures(root: Path) -> None:
    """An image folder: two splits, two classes."""
    for split, count in (("train", 24), ("validation", 8)):
        for name in ("a", "b"):
            (root / split / name).mkdir(parents=True)
            for index in range(count):
                Image.effect_noise((80, 72), 40 + index).convert("RGB").save(root / split / name / f"{index}.png")


def run_command(root: Path, out: Path, seconds: float) -> bool:
    """``mpcompile distill``, killed with all its workers after this many seconds; True if it ended before."""
    command = [sys.executable, "-m", "mpcompile", "distill", str(root / "recipe.yaml"), "--data", str(root / "images")]
    command += ["--num-classes", "2", "--threads", "1", "--quiet", "--out", str(out), "--resume", "auto"]
    with (root / "output").open("w+") as output:
        process = subprocess.Popen(command, stdout=output, stderr=output, start_new_session=True)
        try:
            process.wait(seconds)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            return False
        if process.returncode:
            output.seek(0)
            raise SystemExit(f"a run failed without being killed: {output.read()}")
    return True


def killed(attempt: Callable[[bool], bool], broken: Path, kills: int) -> list[int]:
    """Start and kill a run repeatedly, then let it end; return the step of the checkpoint after each kill.

    Args:
        attempt: one attempt, which is killed unless it is the last one; True if the run ended.
        broken: the folder of the run.
        kills: number of kills before the last attempt.
    """
    steps: list[int] = []
    while not attempt(len(steps) >= kills):
        path = broken / checkpoint.NAME
        steps.append(int(checkpoint.read(path)["step"]) if path.exists() else 0)
        print(f"kill {len(steps)}: the checkpoint is at step {steps[-1]}", flush=True)
    return steps


def by_command(root: Path, kills: int, draw: random.Random) -> tuple[Path, Path, list[int]]:
    """An uninterrupted run, a killed one, and the steps at its kills."""
    pictures(root / "images")
    (root / "recipe.yaml").write_text(RECIPE)
    whole, broken = root / "whole", root / "broken"
    start = time.monotonic()
    run_command(root, whole, 3600)
    duration = time.monotonic() - start

    def attempt(last: bool) -> bool:
        while run_command(root, broken, 3600 if last else duration * draw.random()):
            if last:
                return True
            for name in ("distilled.mpc", checkpoint.NAME, "log.jsonl"):  # the run ended before the kill: start again
                (broken / name).unlink()
        return False

    return whole, broken, killed(attempt, broken, kills)


def by_fork(root: Path, kills: int, epochs: int, draw: random.Random) -> tuple[Path, Path, list[int]]:
    """The same with a function instead of the command."""
    whole, broken, made = root / "whole", root / "broken", models()
    forked(whole, epochs, made, float("inf"), 0.0)

    def attempt(last: bool) -> bool:
        return forked(broken, epochs, made, float("inf") if last else draw.randrange(4), draw.random())

    return whole, broken, killed(attempt, broken, kills)


def weights(folder: Path) -> dict[str, Tensor]:
    """The final weights of a run."""
    if (folder / "final.pt").exists():
        return dict(torch.load(folder / "final.pt", weights_only=True))
    return dict(mpcompile.load(folder / "distilled.mpc").state_dict())


def logged_epochs(folder: Path) -> list[Any]:
    """The epochs and steps in the log, without times."""
    return [
        {key: value for key, value in line.items() if key != "time"}
        for line in events.read(folder / "log.jsonl")
        if line["event"] in ("step", "epoch")
    ]


def main() -> None:
    """Measure, print, and write the JSON file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    common_arguments(parser)
    parser.add_argument("--kills", type=int)
    parser.add_argument("--epochs", type=int, help="without --command")
    parser.add_argument("--command", action="store_true", help="kill the command, not a function")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    fill(args, {"kills": 20, "epochs": 24}, {"kills": 3, "epochs": 5})
    torch.set_num_threads(1)  # so that processes can be forked
    draw = random.Random(args.seed)
    with tempfile.TemporaryDirectory() as name:
        if args.command:
            whole, broken, steps = by_command(Path(name), args.kills, draw)
        else:
            whole, broken, steps = by_fork(Path(name), args.kills, args.epochs, draw)
        expected, found = weights(whole), weights(broken)
        left = [p.name for p in broken.iterdir() if p.name.endswith(".tmp")]
        same_logs = logged_epochs(whole) == logged_epochs(broken)
    equal = expected.keys() == found.keys() and all(torch.equal(expected[k], found[k]) for k in expected)
    print(
        f"{len(steps)} kills; final weights {'equal bit for bit' if equal else 'DIFFER'}, logs "
        f"{'equal' if same_logs else 'DIFFER'}; files left over: {left or 'none'}"
    )
    row = {"kills": len(steps), "steps at kills": steps, "equal": equal, "logs alike": same_logs, "left": left}
    kept = load("kill_resume", args.out) or {}
    save(
        "kill_resume",
        {**kept, "command" if args.command else "function": {**row, "environment": environment(1)}},
        args.out,
    )
    raise SystemExit(0 if equal and same_logs and not left and len(steps) == args.kills and max(steps) else 1)


if __name__ == "__main__":
    main()
