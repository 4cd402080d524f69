"""Every operator that a saved graph may call, with wrongly sized tensors and any numbers: no process crashes.

Each operator runs in a child process. Its inputs are between two protected pages, so that reading or writing one
element beyond a tensor raises a signal.
"""

from __future__ import annotations

import ctypes
import faulthandler
import functools
import mmap
import operator
import os
import random
import resource
import signal
import sys
import tempfile
from pathlib import Path

import pytest
import torch
from torch import fx, nn

from mpcompile import load, save
from mpcompile.artifact import guards, opset
from mpcompile.errors import ArtifactError, InputError
from mpcompile.ir.module import IRModule
from mpcompile.plan import Plan

ATEN = torch.ops.aten
DRAWS = int(os.environ.get("MPCOMPILE_TEST_DRAWS", "12"))  # calls of each operator
SECONDS, MEMORY = 60, 1 << 30  # of a batch; the memory is on top of what the process uses
PAGE = mmap.PAGESIZE
SHAPES = (
    (),
    (0,),
    (1,),
    (3,),
    (7,),
    (2, 3),
    (0, 3),
    (4, 4),
    (2, 3, 4),
    (2, 3, 4, 5),
    (1, 4, 8, 8),
    (2, 0, 4, 4),
    (4, 4, 3, 3),
)
SMALL = (0, 1, 2, 3, -1, 4, 8, -7)
NUMBERS = (*SMALL, 100, 2**31 - 1, 2**31, -(2**31), 2**32 + 1, 2**40, 2**62, 2**63 - 1, -(2**63))
FLOATS = (0.0, 0.5, 1.0, -1.0, 1e-5, 1e-10, 1e30, float("nan"), float("inf"))
TEXTS = ("none", "mean", "sum", "bilinear", "nearest", "floor", "amax", "prod", "")

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs fork and mprotect")


@functools.cache
def _libc():
    libc = ctypes.CDLL(None)
    libc.mmap.restype = ctypes.c_void_p
    libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
    libc.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    return libc


def guarded(tensor):
    """A copy of the tensor at the end of its own memory, between two protected pages."""
    if not tensor.nbytes:
        return tensor
    pages = -(-tensor.nbytes // PAGE)
    base = _libc().mmap(None, (pages + 2) * PAGE, mmap.PROT_READ | mmap.PROT_WRITE, 0x22, -1, 0)
    end = base + (pages + 1) * PAGE
    assert _libc().mprotect(base, PAGE, 0) == _libc().mprotect(end, PAGE, 0) == 0
    place = (ctypes.c_char * tensor.nbytes).from_address(end - tensor.nbytes)
    return torch.frombuffer(place, dtype=tensor.dtype).view(tensor.shape).copy_(tensor)


def pool():
    generator = torch.Generator().manual_seed(0)
    plain = [torch.randn(shape, generator=generator) for shape in SHAPES]
    found = [guarded(t) for t in plain] + [guarded((t * 4).long()) for t in plain]
    found += [guarded(t.double()) for t in plain[::4]] + [guarded(t.bfloat16()) for t in plain[1::4]]
    found += [guarded(t > 0) for t in plain[::3]] + [guarded((t * 50).to(torch.uint8)) for t in plain[::3]]
    found += [
        guarded(torch.randn(1)).expand(5),
        guarded(torch.randn(1, 1)).expand(3, 4),
        guarded(torch.randn(4, 4)).t(),
    ]
    return [*found, guarded(torch.tensor([-1, 2**62])), guarded(torch.tensor([-(2**63)])), guarded(torch.tensor([-1]))]


def drawn(kind, draw, tensors):
    """A value of a schema's type."""
    name = kind.kind()
    if name == "OptionalType":
        return None if draw.random() < 0.4 else drawn(kind.getElementType(), draw, tensors)
    if name == "ListType":
        return [drawn(kind.getElementType(), draw, tensors) for _ in range(draw.choice((0, 1, 2, 2, 2, 3, 4)))]
    choices = {"TensorType": tensors, "BoolType": (True, False), "FloatType": FLOATS, "StringType": TEXTS}
    if name in choices:
        return draw.choice(choices[name])
    if name in ("IntType", "NumberType"):
        return draw.choice(SMALL if draw.random() < 0.7 else NUMBERS)
    return torch.device("cpu") if name == "DeviceObjType" else None


def arguments(schema, draw, tensors):
    args, kwargs = [], {}
    for argument in schema.arguments:
        enumerator = str(argument.real_type) in ("ScalarType", "MemoryFormat", "Layout")
        if argument.has_default_value() and draw.random() < 0.5:
            if not argument.kwarg_only:
                break
            continue
        value = torch.float32 if enumerator else drawn(argument.type, draw, tensors)
        if str(argument.real_type) == "Optional[ScalarType]":
            value = draw.choice((None, torch.float64, torch.int64))
        elif str(argument.real_type).startswith(("Optional[MemoryFormat", "Optional[Layout")):
            value = None
        if argument.kwarg_only:
            kwargs[argument.name] = value
        else:
            args.append(value)
    return args, kwargs


@functools.cache
def overloads():
    """Name in a file -> the function that a graph calls, and its schema."""
    found = {}
    for packet in sorted(opset.ATEN | {f"{name}_" for name in opset.ATEN}):
        for overload in getattr(getattr(ATEN, packet, None), "overloads", list)():
            name = f"aten.{packet}.{overload}"
            function = opset.function_of(name)
            if function is not None:
                found[name] = function, guards.original(function)._schema
    for name in opset.functions():  # torch's functions take the arguments of the operator of their name
        packet = getattr(ATEN, name.rpartition(".")[2], None)
        if name.startswith("torch.") and packet is not None:
            tensor_first = [getattr(packet, o) for o in packet.overloads() if f"aten.{packet.__name__}.{o}" in found]
            for schema in [op._schema for op in tensor_first][:3]:
                found[f"{name} as {schema.overload_name or 'default'}"] = opset.function_of(name), schema
    return found


def died(run, seconds=SECONDS):
    """Run in a child; return the signal that ended it, or None, and its last message. A timeout is not a failure."""
    with tempfile.TemporaryFile() as file:
        child = os.fork()
        if child == 0:
            held = int(Path("/proc/self/statm").read_text().split()[0]) * PAGE
            resource.setrlimit(resource.RLIMIT_AS, (held + MEMORY, held + MEMORY))
            resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
            null = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, 1)
            os.dup2(null, 2)
            faulthandler.disable()
            signal.alarm(seconds)
            try:
                run(lambda text: os.pwrite(file.fileno(), text.encode().ljust(400)[:400], 0))
            finally:
                os._exit(0)
        _, status = os.waitpid(child, 0)
        printed = os.pread(file.fileno(), 400, 0).decode(errors="replace").strip()
    number = os.WTERMSIG(status) if os.WIFSIGNALED(status) else None
    return (None if number in (None, signal.SIGALRM) else signal.Signals(number).name), printed


def shown(value):
    if isinstance(value, torch.Tensor):
        return f"{str(value.dtype).removeprefix('torch.')}{tuple(value.shape)}"
    return [shown(v) for v in value] if isinstance(value, (list, tuple)) else value


def sweep(names, draws, seed=0):
    """Calls of operators, until the process ends."""

    def run(say):
        torch.set_num_threads(1)
        tensors = pool()
        for name in names:
            function, schema = overloads()[name]
            draw = random.Random(f"{seed} {name}")
            for _ in range(draws):
                args, kwargs = arguments(schema, draw, tensors)
                say(f"{name} {shown(args)} {[(key, shown(value)) for key, value in kwargs.items()]}")
                try:
                    opset.call_of(function, args, kwargs)(*args, **kwargs)
                except Exception:
                    continue

    return run


def test_no_operator_leaves_its_tensors():
    names = list(overloads())
    assert len(names) > 700
    for start in range(0, len(names), 200):
        signal_, printed = died(sweep(names[start : start + 200], DRAWS))
        assert signal_ is None, f"{signal_} in {printed}"


def test_the_sweep_finds_what_it_looks_for():
    """Without its guard, batch normalisation writes outside its tensors."""
    names = ["aten.native_batch_norm.default"]
    function, schema = overloads()[names[0]]
    assert died(sweep(names, 2000))[0] is None
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(overloads(), names[0], (guards.original(function), schema))
        assert died(sweep(names, 2000))[0] == "SIGSEGV"


def x(*shape):
    return guarded(torch.randn(*shape))


WIDE = 1 << 16
WRONG = {
    "statistics of one channel": (
        ATEN.native_batch_norm.default,
        lambda: (x(2, WIDE, 4), None, None, x(1), x(1), True, 0.5, 1e-5),
    ),
    "weight of one channel": (
        torch.native_batch_norm,
        lambda: (x(2, WIDE, 4), x(1), x(1), None, None, True, 0.5, 1e-5),
    ),
    "no statistics": (ATEN.native_batch_norm.default, lambda: (x(2, 3, 4), None, None, None, None, False, 0.5, 1e-5)),
    "legit": (ATEN._native_batch_norm_legit.default, lambda: (x(2, WIDE, 4), None, None, x(1), x(1), True, 0.5, 1e-5)),
    "legit, no statistics": (
        ATEN._native_batch_norm_legit.no_stats,
        lambda: (x(2, WIDE, 4), x(1), x(1), True, 0.5, 1e-5),
    ),
    "no training": (
        ATEN._native_batch_norm_legit_no_training.default,
        lambda: (x(2, WIDE, 4), x(1), x(1), x(1), x(1), 0.5, 1e-5),
    ),
    "keys of one image": (
        ATEN._scaled_dot_product_flash_attention_for_cpu.default,
        lambda: (x(64, 8, 64, 16), x(1, 8, 64, 16), x(1, 8, 64, 16)),
    ),
    "values of other tokens": (
        ATEN._scaled_dot_product_flash_attention_for_cpu.default,
        lambda: (x(2, 8, 64, 16), x(2, 8, 64, 16), x(2, 8, 1, 16)),
    ),
    "a huge dilation": (torch.nn.functional.unfold, lambda: (x(1, 4, 8, 8), 8, 2**62, 3)),
    "a huge stride": (ATEN.col2im.default, lambda: (x(1, 9, 4), [4, 4], [3, 3], [1, 1], [0, 0], [2**62, 1])),
    "tiny scales": (ATEN._upsample_bilinear2d_aa.default, lambda: (x(1, 2, 4, 4), [9, 9], False, 1e-10, 1e-10)),
    "scales whose inverse no integer holds": (
        ATEN.upsample_nearest2d.default,
        lambda: (torch.ones(1, 2, 3, 3, dtype=torch.uint8), [5, 5], 1e-30, 1e-30),
    ),
    "a scale that is no number": (ATEN.upsample_linear1d.default, lambda: (x(1, 2, 3), [5], False, float("nan"))),
    "scales of another size": (ATEN._upsample_bicubic2d_aa.default, lambda: (x(1, 2, 4, 4), [9, 9], False, 0.01, 0.01)),
}


@pytest.mark.parametrize("name", WRONG)
def test_arguments_that_torch_does_not_check_are_refused(name):
    function, make = WRONG[name]
    with pytest.raises(InputError, match="cannot take these tensors"):
        guards.GUARDED[function](*make())


def graph(build, **buffers):
    """An IR whose output is the node that ``build`` returns for a graph and its input."""
    root, drawn_graph = nn.Module(), fx.Graph()
    for name, tensor in buffers.items():
        root.register_buffer(name, tensor)
    drawn_graph.output(build(drawn_graph, drawn_graph.placeholder("x")))
    gm = IRModule(root, drawn_graph)
    gm.plan = Plan()
    return gm


def test_a_guarded_operator_round_trips(tmp_path):
    tail = (False, 0.1, 1e-5)
    norm = ATEN._native_batch_norm_legit_no_training.default

    def build(g, x):
        mean, var = g.get_attr("mean"), g.get_attr("var")
        both = g.call_function(torch.native_batch_norm, (x, None, None, mean, var, *tail))
        again = g.call_function(norm, (x, None, None, mean, var, 0.1, 1e-5))
        return g.call_function(torch.add, tuple(g.call_function(operator.getitem, (out, 0)) for out in (both, again)))

    gm = graph(build, mean=torch.zeros(3), var=torch.ones(3))
    for path in (tmp_path / "once", tmp_path / "twice"):
        save(gm, path)
        gm = load(path)
    batch = torch.randn(2, 3, 4)
    torch.testing.assert_close(gm(batch), 2 * batch, rtol=1e-4, atol=1e-4)
    assert torch.compile(gm, backend="eager", fullgraph=True)(batch).shape == batch.shape
    with pytest.raises(InputError, match="running_mean of 5 values"):
        gm(torch.randn(2, 5, 4))


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("other", ["tensor", "number"])
def test_the_lowest_integer_divides_by_minus_one(dtype, other, tmp_path):
    def build(g, x):
        return g.call_function(
            torch.div, (x, g.get_attr("by") if other == "tensor" else -1), {"rounding_mode": "trunc"}
        )

    gm = graph(build, by=torch.tensor([-1, -1, 2, -3], dtype=dtype))
    save(gm, tmp_path / "file")
    low = torch.iinfo(dtype).min
    loaded, values = load(tmp_path / "file"), torch.tensor([low, 7, -7, 8], dtype=dtype)
    assert died(lambda say: loaded(values)) == (None, "")
    found = loaded(values)
    assert found.tolist() == ([low, -7, -3, -2] if other == "tensor" else [low, -7, 7, -8]) and found.dtype is dtype


@pytest.mark.parametrize("method", [True, False])
def test_the_median_of_an_expanded_tensor_stays_inside(method, tmp_path):
    def build(g, x):
        pair = g.call_method("median", (x, 0)) if method else g.call_function(torch.median, (x, 0))
        return g.call_function(operator.getitem, (pair, 0))

    save(graph(build), tmp_path / "file")
    loaded, row = load(tmp_path / "file"), x(1, 4)
    assert died(lambda say: loaded(row.expand(3, 4))) == (None, "")
    assert torch.equal(loaded(row.expand(3, 4)), row[0])


REFUSED = {
    "an output": (ATEN.add.out, lambda x: (x, x), lambda x: {"out": x}),
    "an output by name": (torch.add, lambda x: (x, x), lambda x: {"out": x}),
    "numbers alone": (ATEN.remainder.int, lambda x: (1, 0), lambda x: {}),
    "a list alone": (ATEN.mul.left_t, lambda x: ([1], 2**40), lambda x: {}),
    "a number for a dtype": (ATEN.to.dtype, lambda x: (x, -2), lambda x: {}),
    "a number for an order": (ATEN.clone.default, lambda x: (x,), lambda x: {"memory_format": 77}),
    "TorchScript's": (ATEN.to.prim_dtype, lambda x: (x, 77), lambda x: {}),
    "an inner operator": (torch.ops.mpcompile.nm_gemm_general.default, lambda x: (x,), lambda x: {}),
}


@pytest.mark.parametrize("name", REFUSED)
def test_calls_that_no_file_may_contain(name, tmp_path):
    function, args, kwargs = REFUSED[name]
    with pytest.raises(ArtifactError, match="cannot be saved"):
        save(graph(lambda g, x: g.call_function(function, args(x), kwargs(x))), tmp_path / "file")


@pytest.mark.parametrize("method", ["div", "div_", "divide"])
def test_methods_only_round_down(method, tmp_path):
    def build(mode):
        return graph(lambda g, x: g.call_method(method, (x, 2), {"rounding_mode": mode}))

    save(build("floor"), tmp_path / "file")
    with pytest.raises(ArtifactError, match="not allowed"):
        save(build("trunc"), tmp_path / "file")


def test_a_layer_has_no_huge_numbers(tmp_path):
    root = nn.Module()
    root.patches = nn.Unfold(8, 2**62, 3)
    g = fx.Graph()
    g.output(g.call_module("patches", (g.placeholder("x"),)))
    gm = IRModule(root, g)
    gm.plan = Plan()
    with pytest.raises(ArtifactError, match="a number that no layer has"):
        save(gm, tmp_path / "file")


def test_a_layer_has_parameters_of_one_dtype(tmp_path):
    root = nn.Module()
    root.rnn = nn.LSTM(4, 4)
    root.rnn.weight_hh_l0 = nn.Parameter(torch.zeros(16, 4, dtype=torch.bfloat16))
    g = fx.Graph()
    g.output(g.call_module("rnn", (g.placeholder("x"),)))
    gm = IRModule(root, g)
    gm.plan = Plan()
    with pytest.raises(ArtifactError, match="several dtypes"):
        save(gm, tmp_path / "file")
