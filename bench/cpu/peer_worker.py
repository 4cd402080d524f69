"""One build of one model in a process of its own, which times it on command; started by ``bench.cpu.peers``.

    python -m bench.cpu.peer_worker JOB

JOB is JSON: ``model``, ``batch``, ``threads``, ``calibration`` and ``spec`` (see ``Spec``). The process makes the
build, compares its outputs with those of the same graph in torch, in fp32, and writes a line of JSON: facts, or an
error. For every line of its input, a number, it calls the build once untimed, then that many times, and writes the
seconds of these. At the end of its input it writes its memory and ends.
"""

from __future__ import annotations

import copy
import ctypes
import functools
import gc
import json
import os
import resource
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import timm
import torch
from timm.data import resolve_model_data_config
from torch import Tensor, nn

import mpcompile
from bench import common
from bench.cpu.e2e import engines_of
from bench.cpu.memory import private_bytes
from mpcompile.backend import compiled_graphs, mpsparse
from mpcompile.errors import first_line
from mpcompile.measure.rivals import TOLERANCE, median_difference
from mpcompile.runtimes.catalogue import build as runtime_build

CHECKED = 8  # images on which the outputs are checked; rounding may change which tokens of some of them merge
GUARDS: dict[str, Any] = {"guard_filter_fn": torch.compiler.keep_tensor_guards_unsafe}  # of dynamo
Call = Callable[[Tensor], Any]


@dataclass(frozen=True)
class Spec:
    """A build.

    Attributes:
        name: in tables.
        runtime: ``"torch"``, ``"ours"``, or a key of ``mpcompile.runtimes.catalogue.RUNTIMES``.
        precision: ``"fp32"``, ``"bf16"`` or ``"int8"``.
        pattern, tome_r: of the transform; None for the dense model.
        options: of Inductor; None runs the model in eager mode.
        channels_last: the memory format of images, and of torch's weights.
    """

    name: str
    runtime: str = "torch"
    precision: str = "fp32"
    pattern: str | None = None
    tome_r: int = 0
    options: dict[str, Any] | None = None
    channels_last: bool = False


def made(spec: Spec, model: nn.Module, x: Tensor, job: dict[str, Any]) -> tuple[Call, nn.Module, dict[str, Any]]:
    """The build, its graph in torch, and facts about it."""
    graph, facts = model, dict[str, Any]()
    if spec.pattern is not None:
        config = mpcompile.Config(pattern=spec.pattern, tome_r=spec.tome_r, score="magnitude")
        with torch.enable_grad():
            graph = gm = mpcompile.transform(model, x, config)
        facts["macs_ratio"] = gm.plan.macs.executed / gm.plan.macs.dense
    if spec.runtime not in ("torch", "ours"):
        ranges = (((torch.randn_like(x),), {}) for _ in range(-(-job["calibration"] // len(x))))
        found = runtime_build(graph, x, spec.runtime, spec.precision, calibration=ranges)
        return found, graph, facts | {"version": found.version}
    run = copy.deepcopy(graph).bfloat16() if spec.precision == "bf16" else graph
    if spec.channels_last and spec.runtime == "torch":
        run = copy.deepcopy(run).to(memory_format=torch.channels_last)
    inputs = placed(spec, x)
    call: Call = run
    if spec.runtime == "ours":
        call = torch.compile(run, backend=mpsparse, options={"frozen": True, **GUARDS}, dynamic=False)
        call(inputs)
        facts["engines"] = engines_of(list(compiled_graphs()))
    elif spec.options is not None:
        call, _ = common.compiled_dense(run, inputs, **spec.options, **GUARDS)
    return lambda images: call(placed(spec, images)), graph, facts


def placed(spec: Spec, x: Tensor) -> Tensor:
    """Images in the dtype and the memory format of a build."""
    x = x.bfloat16() if spec.precision == "bf16" and spec.runtime in ("torch", "ours") else x
    return x.contiguous(memory_format=torch.channels_last) if spec.channels_last else x


def checked(spec: Spec, call: Call, graph: nn.Module, x: Tensor) -> float:
    """The difference of a build's outputs from those of its graph in fp32.

    Raises:
        SystemExit: it is wrong.
    """
    images = [x, *(torch.randn_like(x) for _ in range(1, -(-CHECKED // len(x))))]
    found = torch.cat([call(part).float() for part in images])
    difference = median_difference(found, torch.cat([graph(part) for part in images]))
    if not difference <= TOLERANCE[spec.precision]:
        raise SystemExit(f"WRONG: outputs differ by {difference:.1e}")
    return difference


def timed(call: Callable[[], Any], calls: int) -> list[float]:
    """Seconds of each call, after one that is not timed: another process has had the caches."""
    call()
    seconds = []
    for _ in range(calls):
        start = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - start)
    return seconds


@torch.no_grad()
def serve(job: dict[str, Any], answer: Callable[[Any], None]) -> None:
    """Make the build, and answer requests until the input ends."""
    spec = Spec(**job["spec"])
    torch.set_num_threads(job["threads"])
    torch.manual_seed(0)
    model = timm.create_model(job["model"]).eval()
    x = torch.randn(job["batch"], *resolve_model_data_config(model)["input_size"])
    start = time.perf_counter()
    call, graph, facts = made(spec, model, x, job)
    facts |= {"build_s": time.perf_counter() - start, "relative_rms": checked(spec, call, graph, x)}
    inputs = placed(spec, x)
    del model, graph
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # the memory of compilers goes back before the next worker starts
    answer(facts)
    for line in sys.stdin:
        answer(timed(functools.partial(call, inputs), int(line)))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    answer({"peak_bytes": peak, "serving_bytes": private_bytes()})


def main() -> int:
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print goes to stderr

    def answer(value: Any) -> None:
        print(json.dumps(value), file=out, flush=True)

    try:
        serve(json.loads(sys.argv[1]), answer)
    except (Exception, SystemExit) as error:
        answer({"error": f"{type(error).__name__}: {first_line(error):.300}"})
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
