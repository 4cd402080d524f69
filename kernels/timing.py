"""Latency of a layer on each engine of this machine: timed once, then read from memory or the cache folder.

The dense time to beat is the lower of eager torch's and that of torch.compile with freezing (weights prepacked for
oneDNN or MKL). Token counts are rounded up to four steps per octave, so that models whose blocks have fewer and fewer
tokens need few timings. All candidates of a layer are timed together, in interleaved rounds of random order; the median
counts. Each candidate cycles through several copies of its weights and inputs, because in a model a layer finds neither
in the processor's inner caches. Convolutions run channels last, as Inductor lays them out on CPUs. On CUDA, calls are
captured in a graph and timed by events, which excludes launch time.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import importlib.metadata
import itertools
import math
import os
import random
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mpcompile._version import __version__
from mpcompile.kernels import store
from mpcompile.kernels.engine import DENSE, PREPACKED, Engine, LayerSpec
from mpcompile.kernels.machine import cpu_name
from mpcompile.kernels.nm_format import from_rows

__all__ = [
    "DENSE",
    "PREPACKED",
    "CostModel",
    "CudaClock",
    "bucket",
    "bucketed",
    "cache_file",
    "compare",
    "cpu_name",
    "entry_key",
    "machine_key",
    "measure",
    "set_cost_model",
    "sources",
    "times",
    "triton_version",
    "wall_clock",
]

_ROUNDS, _ENOUGH_S, _TOO_LONG_S, _SAMPLE_S = 5, 0.06, 0.25, 0.006
_COPIES, _COPIES_BYTES = 16, 48 << 20  # at most this many copies, and this many bytes of weights and inputs
_HOPELESS = 3  # after two rounds, a candidate this many times slower than the best is timed no further

CostModel = Callable[[str, LayerSpec, int], "float | None"]
_MODEL: CostModel | None = None
_MEMORY: dict[tuple[str, str], dict[str, float]] = {}  # (file, entry key) -> name -> microseconds


def set_cost_model(model: CostModel | None) -> None:
    """Use the microseconds that ``model(engine name, spec, threads)`` returns; engines are timed where it returns None.

    The model is also called for ``"dense prepacked"``, for which None is allowed. Cost models serve tests, and builds
    on one machine for another. ``set_cost_model(None)`` returns to timing.
    """
    global _MODEL  # noqa: PLW0603
    _MODEL = model


def bucket(count: int) -> int:
    """Round ``count`` up to the next of ..., 64, 76, 90, 107, 128, 152, 181, 215, 256, ...

    Example:
        >>> [bucket(n) for n in (1, 3, 128, 129, 197)]
        [1, 3, 128, 152, 215]
    """
    step = max(0, math.ceil(4 * math.log2(max(1, count))) - 1)
    while int(2 ** (step / 4)) < count:
        step += 1
    return int(2 ** (step / 4))


def bucketed(spec: LayerSpec) -> LayerSpec:
    """Return the spec that is timed in place of this one: its tokens, or a convolution's batch, are rounded up."""
    if spec.inputs is None:
        return spec
    if spec.geometry is None:
        inputs: tuple[int, ...] = (bucket(math.prod(spec.inputs[:-1])), spec.inputs[-1])
    else:
        inputs = (bucket(spec.inputs[0]), *spec.inputs[1:])
    return dataclasses.replace(spec, inputs=inputs)


def entry_key(spec: LayerSpec, threads: int) -> str:
    """Return the key of a timing: everything it depends on besides the machine and the engine."""
    spec = bucketed(spec)
    device = torch.cuda.get_device_name(spec.device) if spec.device.type == "cuda" else spec.device.type
    shape, inputs = ("x".join(map(str, axes or ())) for axes in (spec.shape, spec.inputs))
    kind = "linear" if spec.geometry is None else f"conv2d {spec.geometry}"
    return f"{kind}, {shape}, {str(spec.dtype).removeprefix('torch.')}, {spec.pattern}, {inputs}, {threads}, {device}"


def triton_version() -> str:
    """Return the version of the installed Triton, or "none"."""
    try:
        return importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        return "none"


@functools.cache
def machine_key() -> str:
    """Return a digest of the processor, its instruction set, torch, mpcompile and the kernels' sources."""
    parts = [cpu_name(), torch.backends.cpu.get_cpu_capability(), torch.__version__, __version__]
    parts += [os.environ.get(name, "") for name in ("MPCOMPILE_CPU_ISA", "ONEDNN_MAX_CPU_ISA")]
    if torch.version.cuda is not None:
        parts += [torch.version.cuda, triton_version()]
    key = hashlib.sha256("\n".join(parts).encode())
    here = Path(__file__)
    for path in [here, *sources(here.parent / "cpu"), *sources(here.parent / "nm_linear")]:
        key.update(path.relative_to(here.parent).as_posix().encode() + path.read_bytes())
    return key.hexdigest()[:16]


def sources(folder: Path) -> list[Path]:
    """Return the kernels' source files in a folder and all folders below it."""
    files = (Path(at, name) for at, _, names in os.walk(folder, followlinks=True) for name in names)
    return sorted(path for path in files if path.suffix in (".py", ".cpp", ".h"))


def cache_file() -> Path:
    """Return the path of this machine's timings."""
    return store.cache_folder() / f"timings-{machine_key()}.json"


def times(spec: LayerSpec, engines: Sequence[Engine]) -> dict[str, float] | None:
    """Return microseconds per call of each engine and each of :data:`DENSE`, by name.

    Times come from the cost model, from the cache, or from a measurement.

    Returns:
        None if nothing can be timed: input shape unknown, integers, or ``MPCOMPILE_TIMING=off``.
    """
    if spec.inputs is None or not spec.dtype.is_floating_point or spec.device.type == "meta":
        return None
    names, threads = [engine.name for engine in engines], torch.get_num_threads()
    modelled: dict[str, float] = {}
    if _MODEL is not None:
        answers = {name: _MODEL(name, spec, threads) for name in (*names, PREPACKED)}
        modelled = {name: us for name, us in answers.items() if us is not None}
        if modelled.keys() >= set(names):
            return modelled
    if os.environ.get("MPCOMPILE_TIMING") == "off":
        return None
    timed = _remembered(entry_key(spec, threads), names, lambda: measure(spec, engines, threads))
    return {name: us for name, us in timed.items() if name in names or name in DENSE} | modelled


def _remembered(key: str, names: Sequence[str], timed_now: Callable[[], dict[str, float]]) -> dict[str, float]:
    """Return an entry of the cache that has all ``names``, or time it and store it."""
    path = cache_file()
    place = (str(path), key)
    timed = _MEMORY.get(place) or _valid(store.read_json(path).get(key))
    if not timed or not timed.keys() >= set(names):  # all are timed together, under the same load of the machine
        # Rounded here, too: a choice gives the same reason in every process.
        timed = {name: round(us, 3) for name, us in timed_now().items()}
        store.write_json(path, {key: timed})
    _MEMORY[place] = timed
    return timed


def compare(key: str, candidates: Callable[[], dict[str, Sequence[Callable[[], Any]]]]) -> dict[str, float] | None:
    """Return microseconds per call of alternatives on the CPU that are no engines of layers.

    Args:
        key: everything that the times depend on besides machine and threads.
        candidates: returns name -> the same call on several copies of its inputs.

    Returns:
        None if nothing can be timed: with a cost model, or with ``MPCOMPILE_TIMING=off``.
    """
    if _MODEL is not None or os.environ.get("MPCOMPILE_TIMING") == "off":
        return None
    threads = torch.get_num_threads()

    def timed_now() -> dict[str, float]:
        with _quiet(torch.device("cpu"), threads):
            runs = {name: _rotating(calls) for name, calls in candidates().items()}
            medians = _race(list(runs.values()), wall_clock)
        return {name: median * 1e6 for name, median in zip(runs, medians, strict=True)}

    return _remembered(f"{key}, {threads}", [], timed_now)


def _valid(entry: Any) -> dict[str, float]:
    """Return an entry of the cache file; empty if it is malformed."""
    if not isinstance(entry, dict):
        return {}
    times = {name: us for name, value in entry.items() if (us := store.positive(value)) is not None}
    return times if len(times) == len(entry) else {}


@contextlib.contextmanager
def _quiet(device: torch.device, threads: int) -> Iterator[None]:
    """Set the conditions of inference: no gradients, no autocast, and ``threads`` threads."""
    before = torch.get_num_threads()
    if threads != before:
        torch.set_num_threads(threads)
    try:
        with torch.inference_mode(), torch.autocast(device.type, enabled=False):
            yield
    finally:
        if threads != before:
            torch.set_num_threads(before)


def measure(spec: LayerSpec, engines: Sequence[Engine], threads: int) -> dict[str, float]:
    """Time a layer of random values on every engine. Torch's random state does not change.

    Returns:
        name -> median microseconds per call.
    """
    with _quiet(spec.device, threads):
        runs = [(name, _rotating(calls)) for name, calls in _runs(bucketed(spec), engines)]
        clock = CudaClock(spec.device) if spec.device.type == "cuda" else wall_clock
        medians = _race([run for _, run in runs], clock)
    best: dict[str, float] = {}
    for (name, _), median in zip(runs, medians, strict=True):
        best[name] = min(best.get(name, math.inf), median * 1e6)
    return best


def wall_clock(run: Callable[[], Any], calls: int) -> float:
    """Return the seconds that ``calls`` calls in a row take."""
    start = time.perf_counter()
    for _ in range(calls):
        run()
    return time.perf_counter() - start


def _rotating(calls: Sequence[Callable[[], Any]]) -> Callable[[], Any]:
    """Return a function that cycles through several calls."""
    turn = itertools.cycle(calls)

    def call() -> Any:
        return next(turn)()

    return call


class CudaClock:
    """Measures the seconds that a GPU takes for several calls, replayed from a graph, or launched if not capturable."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._replays: dict[tuple[int, int], Callable[[], Any]] = {}

    def __call__(self, run: Callable[[], Any], calls: int) -> float:
        with torch.cuda.device(self.device):
            replay = self._replays.get((id(run), calls))
            if replay is None:
                replay = self._replays[id(run), calls] = self._captured(run, calls)
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            replay()
            end.record()
            end.synchronize()
            return float(start.elapsed_time(end)) / 1e3

    @staticmethod
    def _captured(run: Callable[[], Any], calls: int) -> Callable[[], Any]:
        def launch() -> None:
            for _ in range(calls):
                run()

        launch()  # compile kernels, and let libraries allocate
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph):
                launch()
        except RuntimeError:
            torch.cuda.synchronize()
            return launch
        graph.replay()
        return graph.replay


def _race(runs: Sequence[Callable[[], Any]], sample: Callable[[Callable[[], Any], int], float]) -> list[float]:
    """Return the median seconds per call of each run; ``sample(run, calls)`` returns the seconds of ``calls`` calls."""
    for run in runs:
        sample(run, 1)
    calls = [max(1, int(_SAMPLE_S / max(sample(run, 1), 1e-7))) for run in runs]
    seen: list[list[float]] = [[] for _ in runs]
    live, order = list(range(len(runs))), random.Random(0)
    while live:
        for i in order.sample(live, len(live)):
            seen[i].append(sample(runs[i], calls[i]) / calls[i])
            spent = sum(seen[i]) * calls[i]
            if (len(seen[i]) >= _ROUNDS and spent >= _ENOUGH_S) or (len(seen[i]) >= 3 and spent >= _TOO_LONG_S):
                live.remove(i)
        medians = [statistics.median(times) for times in seen]
        if len(seen[0]) >= 2:
            live = [i for i in live if medians[i] <= _HOPELESS * min(medians)]
    return medians


def _runs(spec: LayerSpec, engines: Sequence[Engine]) -> Iterator[tuple[str, list[Callable[[], Any]]]]:
    """Yield the name of each candidate, and its call on each of several copies of weight and input."""
    assert spec.inputs is not None  # as times() has checked
    generator = torch.Generator().manual_seed(0)
    k = math.prod(spec.shape[1:])
    n, m = spec.pattern
    order = torch.rand(spec.shape[0], k // m, m, generator=generator).argsort(-1)
    mask = from_rows((order < n).flatten(1), spec.shape).contiguous().to(spec.device)

    def values(shape: Sequence[int]) -> Tensor:
        return torch.randn(*shape, generator=generator).to(spec.device, spec.dtype)

    weight, bias, x = values(spec.shape), values(spec.shape[:1]), values(spec.inputs)
    if spec.geometry is not None:
        x = x.contiguous(memory_format=torch.channels_last)
    copies = max(1, min(_COPIES, _COPIES_BYTES // (weight.nbytes + x.nbytes)))
    inputs = [x.clone() for _ in range(copies)]
    for engine in engines:
        packed = engine.pack(weight, mask, spec)
        calls = [engine.call(spec, x, {k: v.clone() for k, v in packed.items()}, bias) for x in inputs]
        yield engine.name, [functools.partial(target, *args) for target, args in calls]
    for make in (_onednn, _mkl):
        calls_made = _prepacked(make, spec, inputs, weight * mask, bias)
        if calls_made:
            yield PREPACKED, calls_made


_Maker = Callable[[LayerSpec, Tensor, Tensor, Tensor], "Callable[[], Any] | None"]


def _prepacked(
    make: _Maker, spec: LayerSpec, inputs: Sequence[Tensor], weight: Tensor, bias: Tensor
) -> list[Callable[[], Any]]:
    """Return, for each input, the call that torch.compile with freezing makes for a dense layer; empty if none."""
    if spec.device.type != "cpu" or not torch.backends.mkldnn.is_available():
        return []
    try:
        calls = [run for x in inputs if (run := make(spec, x, weight, bias)) is not None]
        for run in calls[:1]:
            run()
    except (RuntimeError, AttributeError, NotImplementedError):
        return []  # not on this processor, not for this dtype, or not in this torch
    return calls


def _onednn(spec: LayerSpec, x: Tensor, weight: Tensor, bias: Tensor) -> Callable[[], Any]:
    ops: Any = torch.ops.mkldnn
    nn: Any = torch._C._nn
    tail: tuple[Any, ...] = ("none", [], "")
    if spec.geometry is None:
        packed = ops._reorder_linear_weight(weight, x.shape[0])
        return functools.partial(ops._linear_pointwise, x, packed, bias, *tail)
    stride, padding, dilation, groups = spec.geometry
    packed = nn.mkldnn_reorder_conv2d_weight(weight.to_mkldnn(), padding, stride, dilation, groups, list(x.shape))
    return functools.partial(ops._convolution_pointwise, x, packed, bias, padding, stride, dilation, groups, *tail)


def _mkl(spec: LayerSpec, x: Tensor, weight: Tensor, bias: Tensor) -> Callable[[], Any] | None:
    if spec.geometry is not None or spec.dtype != torch.float32 or not torch.backends.mkl.is_available():
        return None
    packed = torch.ops.mkl._mkl_reorder_linear_weight(weight, x.shape[0])
    return functools.partial(torch.ops.mkl._mkl_linear, x, packed, weight, bias, x.shape[0])
