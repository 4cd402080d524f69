"""The CPU engine against every runtime: each build in a process of its own, all of them interleaved.

    python -m bench.cpu.peers --models vit_tiny_patch16_224 --batch 1 8 --threads 2

Dense: torch in eager mode, compiled, with freezing, with max-autotune, in bf16, and channels last for models with
convolutions beyond the stem; ONNX Runtime; OpenVINO in fp32, bf16 and int8 (NNCF, calibrated on noise: the weights are
random, which does not affect speed). Ours: masks, merging, both, and the merged graph in the other runtimes. What is
not installed, or not multiplied by this processor, is left out with a line that says so.

Frozen builds, torch's and ours, are called from C++ (``cpp_wrapper``). Before a call of a compiled build, dynamo checks
only its inputs (``torch.compiler.keep_tensor_guards_unsafe``), as a server would have it.

Every build lives in a worker (``bench.cpu.peer_worker``), because threads and allocators of one runtime disturb the
others in the same process. In every round each worker, in random order, calls its build once untimed and a few times
timed, while all others wait. Workers check their outputs before they are timed; a wrong build is reported, not timed.

"vs best dense" is the median of the best dense build of the same precision over that of the build; "vs fp32" the same
against the best dense build in fp32. ``peak`` is the largest memory that the worker ever had, compilation included;
``serving`` is the private memory that it has while it answers requests.

Results go into cpu_peers.json, by instruction set, so that those of other machines stay. A record (model, batch,
threads) that has all builds asked for is not measured again, unless with --again.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import fnmatch
import itertools
import json
import os
import random
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from typing import Any

import timm
import torch

from bench import common
from bench.cpu.e2e import convolutional
from bench.cpu.peer_worker import Spec
from mpcompile.kernels.machine import cpu_flags, has_bf16
from mpcompile.runtimes.base import titled
from mpcompile.runtimes.catalogue import RUNTIMES

NAME = "cpu_peers"
MODELS = ("vit_tiny_patch16_224", "deit_small_patch16_224", "vit_base_patch16_224", "convnextv2_base", "resnet50")
MODELS += ("efficientnet_lite0",)
EXTENSIONS = ("avx512_vnni", "avx_vnni", "avx512_bf16", "amx_bf16", "amx_int8")  # beside the instruction set
FREEZING = {"freezing": True}
AUTOTUNE = {"freezing": True, "max_autotune": True}


def isa() -> str:
    """The instruction set of the kernels, and what else decides the speed of bf16 and int8."""
    flags = cpu_flags() or frozenset()
    return " ".join([str(common.environment()["isa"]), *(name for name in EXTENSIONS if name in flags)])


def specs(model: str, r: int) -> list[Spec]:
    """The builds of a model."""
    with torch.device("meta"):
        network = timm.create_model(model)
    attention = any(type(module).__name__ == "Attention" for module in network.modules())
    return [*_of_torch(convolutional(network)), *_of_runtimes(r if attention else 0), *_of_ours(network, r, attention)]


def _of_torch(convolutions: bool) -> list[Spec]:
    ways: dict[str, Any] = {"eager": None, "compile": {}, "freezing": FREEZING, "max-autotune": AUTOTUNE}
    found = [Spec(f"torch {way}", options=options) for way, options in ways.items()]
    if convolutions:
        found += [dataclasses.replace(spec, name=f"{spec.name} channels_last", channels_last=True) for spec in found]
    if has_bf16():
        fast = [spec for spec in found if spec.options == FREEZING]
        found += [dataclasses.replace(spec, name=f"{spec.name} bf16", precision="bf16") for spec in fast]
    return found


def _of_runtimes(r: int) -> list[Spec]:
    """The dense model in every runtime, and a merged one."""
    found = []
    for name, runtime in RUNTIMES.items():
        if not runtime.installed:
            print(f"{runtime.title} is not installed (pip install 'mpcompile[{runtime.extra}]')")
            continue
        for precision in runtime.precisions():
            title = titled(runtime.title, precision)
            found.append(Spec(title, name, precision))
            if r:
                found.append(Spec(f"r = {r} in {title}", name, precision, "dense", r))
    return found


def _of_ours(network: torch.nn.Module, r: int, attention: bool) -> list[Spec]:
    found = [Spec(f"ours {pattern}", "ours", pattern=pattern) for pattern in ("dense", "12:16", "8:16")]
    if attention:
        found += [dataclasses.replace(spec, name=f"{spec.name}, r = {r}", tome_r=r) for spec in found]
    if convolutional(network):
        found += [dataclasses.replace(spec, name=f"{spec.name} channels_last", channels_last=True) for spec in found]
    if has_bf16():
        merging = r if attention else 0
        behind = f", r = {r} bf16" if attention else " bf16"
        last = convolutional(network)
        found += [Spec(f"ours {p}{behind}", "ours", "bf16", p, merging, channels_last=last) for p in ("dense", "2:4")]
    return found


class Worker:
    """A process with one build."""

    def __init__(self, job: dict[str, Any]) -> None:
        self.errors = tempfile.TemporaryFile("w+")  # noqa: SIM115 (closed in stop)
        command = [sys.executable, "-m", "bench.cpu.peer_worker", json.dumps(job)]
        self.process = subprocess.Popen(
            command, cwd=common.ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.errors, text=True
        )
        self.facts = self.answer()

    def answer(self) -> Any:
        """The next line of the worker; an error if it has died."""
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if line:
            return json.loads(line)
        self.errors.seek(0)
        last = (self.errors.read().strip().splitlines() or ["no output"])[-1]
        return {"error": f"exit {self.process.wait()}: {last:.300}"}

    def seconds(self, calls: int) -> list[float]:
        """Times of calls, while every other worker waits.

        Raises:
            SystemExit: the worker has died.
        """
        assert self.process.stdin is not None
        print(calls, file=self.process.stdin, flush=True)
        found = self.answer()
        if not isinstance(found, list):
            raise SystemExit(f"a worker ended while it was timed: {found['error']}")
        return found

    def end(self) -> Any:
        """Its memory; the process ends."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        return self.answer()

    def stop(self) -> None:
        """End the process in any case."""
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        self.errors.close()


@contextlib.contextmanager
def workers(args: argparse.Namespace, model: str, batch: int, chosen: list[Spec]) -> Iterator[dict[str, Worker]]:
    """Start a worker for every build, one after another."""
    running: dict[str, Worker] = {}
    try:
        for spec in chosen:
            print(f"{model}, batch {batch}: {spec.name}", file=sys.stderr, flush=True)
            job = {"model": model, "batch": batch, "threads": args.threads, "calibration": args.calibration}
            running[spec.name] = Worker({**job, "spec": dataclasses.asdict(spec)})
        yield running
    finally:
        for worker in running.values():
            worker.stop()


def measure(args: argparse.Namespace, model: str, batch: int, chosen: list[Spec]) -> dict[str, Any]:
    """Build, then time everything in interleaved rounds."""
    builds: dict[str, dict[str, Any]] = {}
    before = common.environment(args.threads)
    with workers(args, model, batch, chosen) as running:
        for spec in chosen:
            facts = {"runtime": spec.runtime, "precision": spec.precision, "dense": spec.pattern is None}
            builds[spec.name] = facts | running[spec.name].facts
        ready = [name for name, build in builds.items() if "error" not in build]
        order, seconds = random.Random(0), {name: [] for name in ready}
        for _ in range(args.rounds):
            for name in order.sample(ready, len(ready)):
                seconds[name] += running[name].seconds(args.calls)
        for name in ready:
            builds[name] |= {"ms": common.quartiles(seconds[name], 1e3), **running[name].end()}
    before["load average at the end"] = common.environment()["load average"]
    compare(builds)
    key = {"model": model, "batch": batch, "threads": args.threads}
    return {**key, "rounds": args.rounds, "calls": args.calls, "environment": before, "builds": builds}


def compare(builds: dict[str, dict[str, Any]]) -> None:
    """Set the ratios of every build: to the best dense one of its precision, and to the best in fp32."""
    dense = [build for build in builds.values() if build["dense"] and "ms" in build]
    best: dict[str, float] = {}
    for build in dense:
        precision, median = build["precision"], build["ms"]["median"]
        best[precision] = min(best.get(precision, median), median)
    for build in builds.values():
        for key, precision in (("ratio", build["precision"]), ("ratio_fp32", "fp32")):
            if "ms" in build and precision in best:
                build[key] = best[precision] / build["ms"]["median"]
        build["best"] = build["dense"] and build.get("ratio") == 1.0


def show(record: dict[str, Any]) -> None:
    """Print the table of one record."""
    lines = []
    for name, build in record["builds"].items():
        if "error" in build:
            lines.append([name, build["precision"], build["error"][:60], *[""] * 5])
            continue
        ms = build["ms"]
        ratios = [common.ratio_text(build[key]) if key in build else "" for key in ("ratio", "ratio_fp32")]
        memory = [f"{build[key] / 2**20:,.0f}" for key in ("peak_bytes", "serving_bytes")]
        times = f"{ms['median']:,.1f} [{ms['q1']:,.1f}, {ms['q3']:,.1f}]"
        mark = " *" if build["best"] else ""
        lines.append([name + mark, build["precision"], times, *ratios, *memory, f"{build['relative_rms']:.1e}"])
    print(f"\n{record['model']}, batch {record['batch']}, {record['threads']} threads (* best dense of its precision)")
    head = ["build", "precision", "ms [quartiles]", "vs best dense", "vs fp32", "peak MiB", "serving MiB", "rel. RMS"]
    print(common.table(lines, head, left=2), flush=True)


def chart(data: dict[str, Any], args: argparse.Namespace) -> None:
    """Ratios to the best dense build in fp32, a panel for each model and instruction set."""
    panels: dict[str, dict[str, dict[str, float]]] = {}
    for key, records in data.items():
        for record in records:
            panel = panels.setdefault(f"{record['model']}, {record['threads']} threads, {key}", {})
            ratios = {name: build.get("ratio_fp32") for name, build in record["builds"].items()}
            panel[f"batch {record['batch']}"] = {name: ratio for name, ratio in ratios.items() if ratio is not None}
    common.plot(NAME, panels, "Speed against the best dense fp32 build of any runtime", args.out)


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", metavar="MODEL", help=f"timm names ({' '.join(MODELS)})")
    parser.add_argument("--batch", type=int, nargs="+", metavar="B", help="images per call (1 8)")
    parser.add_argument(
        "--builds", nargs="+", metavar="GLOB", help="builds by name, such as 'torch*' 'OpenVINO*' (all)"
    )
    parser.add_argument("--tome-r", type=int, default=8, metavar="R", help="tokens merged per block (%(default)s)")
    parser.add_argument("--threads", type=int, default=2, metavar="N", help="(%(default)s)")
    parser.add_argument("--rounds", type=int, metavar="N", help="interleaved rounds (15)")
    parser.add_argument("--calls", type=int, metavar="N", help="timed calls of each build in a round (3)")
    parser.add_argument("--calibration", type=int, metavar="N", help="images of noise that int8 is calibrated on (32)")
    parser.add_argument("--again", action="store_true", help="measure records that exist, too")
    common.common_arguments(parser)
    args = parser.parse_args(argv)
    full = {"models": list(MODELS), "batch": [1, 8], "builds": ["*"], "rounds": 15, "calls": 3, "calibration": 32}
    quick = {"models": ["test_vit"], "batch": [2], "rounds": 2, "calls": 1, "calibration": 2}
    quick["builds"] = ["torch eager", "ONNX Runtime", "ours 8:16, r = *"]
    common.fill(args, full, quick)
    return args


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    if args.quick:
        os.environ.setdefault("MPCOMPILE_CACHE", str(args.out / "cache"))
    print(common.describe(common.environment(args.threads)))
    machine, failed = isa(), 0
    data = common.load(NAME, args.out) or {}
    for model, batch in itertools.product(args.models, args.batch):
        chosen = [s for s in specs(model, args.tome_r) if any(fnmatch.fnmatch(s.name, glob) for glob in args.builds)]
        records = data.setdefault(machine, [])
        key = (model, batch, args.threads)
        old = next((r for r in records if (r["model"], r["batch"], r["threads"]) == key), None)
        if old is None or args.again or not {spec.name for spec in chosen} <= old["builds"].keys():
            record = measure(args, model, batch, chosen)
            data[machine] = [r for r in records if r is not old] + [record]
            common.save(NAME, data, args.out)
            old = record
        show(old)
        failed += sum("error" in build for build in old["builds"].values())
    print()
    chart(data, args)
    print(f"figures: {args.out / NAME}.json")
    if failed:
        print(f"{failed} builds were not timed: see the tables", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
