"""Files that are damaged, of another kind, or malicious: always an ArtifactError, and nothing is executed."""

import copy
import functools
import json
import operator
import os
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import fx, nn
from torch.nn import functional as F

from mpcompile import load, save
from mpcompile.errors import ArtifactError
from mpcompile.ir.module import IRModule
from mpcompile.kernels.nm_format import Pattern
from mpcompile.layers import MaskedLinear
from mpcompile.plan import LayerPlan, Plan
from tests.support.forging import forge, parts


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file to damage."""
    graph = fx.Graph()
    x = graph.call_module("fc", (graph.placeholder("x"),))
    shape = graph.call_function(getattr, (x, "shape"))
    size = graph.call_function(operator.getitem, (shape, 0))
    y = graph.call_method("reshape", (x, size, -1), {})
    y = graph.call_function(F.pad, (y, [0, 1]), {"value": float("inf")})
    y = graph.call_function(torch.ops.aten.mul.Tensor, (y, graph.get_attr("group.scale")))
    graph.output((graph.call_module("norm", (y,)),))
    root = nn.Module()
    root.fc = MaskedLinear(torch.randn(4, 8), None, torch.ones(4, 8, dtype=torch.bool), Pattern(2, 4))
    root.norm = nn.BatchNorm1d(5)
    root.group = nn.Module()
    root.group.scale = nn.Parameter(torch.rand(5), requires_grad=False)
    path = tmp_path_factory.mktemp("small") / "file"
    gm = IRModule(root, graph)
    gm.group.register_buffer("flags", torch.tensor([True, False]))
    gm.plan = Plan(layers={"fc": LayerPlan("linear", (4, 8), "2:4", None, 0.5)}, notes=["a note"])
    save(gm, path)
    assert load(path)(torch.ones(2, 8))[0].shape == (2, 5)
    return path


def test_the_forger_reproduces_an_unchanged_file(small, tmp_path):
    header, data = parts(small)
    assert forge(tmp_path / "file", header, data).read_bytes() == small.read_bytes()


def test_no_file(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for name, message in (
        ("none", "No such file"),
        ("", "folder without model"),
        ("pipe", "not a file"),
        ("a/b", "the folder"),
    ):
        with pytest.raises(ArtifactError, match=f"cannot be loaded.*{message}"):
            load(tmp_path / name)


def test_files_of_other_kinds(tmp_path):
    save_file({"w": torch.ones(2)}, tmp_path / "weights", metadata={"format": "pt"})
    save_file({"w": torch.ones(2)}, tmp_path / "bare")
    torch.save({"w": torch.ones(2)}, tmp_path / "pickle")
    (tmp_path / "empty").touch()
    (tmp_path / "text").write_text("a text of some length that is no header")
    for name in ("weights", "bare"):
        with pytest.raises(ArtifactError, match=r"another kind.*load_state_dict"):
            load(tmp_path / name)
    for name in ("pickle", "empty", "text"):
        with pytest.raises(ArtifactError, match="not a safetensors file"):
            load(tmp_path / name)


def test_newer_format(small, tmp_path):
    header, data = parts(small)
    header["__metadata__"] |= {"format_version": "4", "mpcompile": "9.9"}
    with pytest.raises(ArtifactError, match=r"expected format version 3 .*, found '4', of mpcompile '9.9'. Load it"):
        load(forge(tmp_path / "file", header, data))


def test_every_flipped_byte_and_every_truncation_is_detected(small, tmp_path):
    """Flipped: each byte of the frame, every 7th of the rest. Truncations: lengths at the boundaries and every 97th."""
    raw = small.read_bytes()
    begin = 8 + int.from_bytes(raw[:8], "little")
    path = tmp_path / "file"
    for place in {*range(80), *range(0, len(raw), 7), *range(begin - 9, begin + 9), len(raw) - 1}:
        for flip in (1, 0x20 ^ 0x0A, 0x80):
            path.write_bytes(raw[:place] + bytes([raw[place] ^ flip]) + raw[place + 1 :])
            with pytest.raises(ArtifactError):
                load(path)
    for length in {*range(0, len(raw), 97), 7, 8, 9, begin - 1, begin, begin + 1, len(raw) - 1}:
        path.write_bytes(raw[:length])
        with pytest.raises(ArtifactError):
            load(path)
    for more in (b"\0", raw):
        path.write_bytes(raw + more)
        with pytest.raises(ArtifactError):
            load(path)


def test_a_boolean_is_0_or_1(small, tmp_path):
    header, data = parts(small)
    start, end = header["group.flags"]["data_offsets"]
    with pytest.raises(ArtifactError, match=r"group\.flags holds booleans"):
        load(forge(tmp_path / "file", header, data[:start] + b"\2\0" + data[end:]))


# --- Malicious files ---


def node(op, target, *args, name="evil", **kwargs):
    return {"op": op, "name": name, "target": target, "args": list(args), "kwargs": kwargs}


X, CODE = {"node": "x"}, "x=open('pwned','w')"
EVIL_NODES = [
    *[node("call_function", target, "touch pwned") for target in ("os.system", "builtins.eval", "builtins.exec")],
    *[node("call_function", target, X) for target in ("torch.load", "torch.save", "torch.hub.load", "torch.compile")],
    *[node("call_function", f"operator.{name}", "x") for name in ("attrgetter", "methodcaller", "call", "setitem")],
    *[node("call_function", f"aten.{name}", "pwned") for name in ("from_file.default", "save.default", "set_.source")],
    *[node("call_function", name, X) for name in ("mpcompile.__class__.mro", "aten.add", "profiler.x.y", "", None, [])],
    *[node("call_function", "builtins.getattr", X, name) for name in ("__class__", "__globals__", "data", X, 1, None)],
    node("call_function", "builtins.getattr", X, "none", "default"),
    node("call_function", "builtins.getattr", "text", "shape"),
    *[node("call_method", name, X) for name in ("__reduce_ex__", "numpy", "storage", "apply_", "add.x", CODE, "set_")],
    node("call_method", "split", "text"),
    node("call_method", "add"),
    *[node("call_module", path, X) for path in ("forward", "to_folder", "fc.forward", "group", "", "fc.weight", CODE)],
    *[node("get_attr", path) for path in ("__class__", "fc", "fc.pattern", "group.__dict__", f"group.{CODE}", None)],
    *[node("placeholder", name) for name in (f"a={CODE}", "self", "torch", "a: int", "***a", "1a", "x", "", None)],
    node("placeholder", "y", X),
    node("output", "output", X),
    node("exec", "x"),
    *[
        node("call_function", "torch.add", X, name=name)
        for name in ("self", "torch", "a b", "x", "if", CODE, "print", 3)
    ],
    *[node("call_function", "torch.add", X, **{name: 1}) for name in (f"a=1, {CODE}", "lambda", "a.b", "")],
    *[node("call_function", "torch.add", arg) for arg in ({"node": "later"}, {"code": CODE}, {"dtype": "nn"}, {})],
    *[
        node("call_function", "torch.add", {tag: CODE})
        for tag in ("device", "float", "memory_format", "layout", "slice")
    ],
    node("call_function", "torch.add", *[functools.reduce(lambda a, _: [a], range(60), 1)]),
]


@pytest.mark.parametrize("evil", EVIL_NODES, ids=lambda e: f"{e['op']}-{e['target']}"[:40])
def test_hostile_nodes(evil, small, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    header, data = parts(small)
    graph = json.loads(header["__metadata__"]["graph"])
    graph["nodes"].insert(1, evil)
    header["__metadata__"]["graph"] = json.dumps(graph)
    with pytest.raises(ArtifactError, match="cannot be loaded"):
        load(forge(tmp_path / "file", header, data))
    assert not (tmp_path / "pwned").exists()


def edit(key, *path, to):
    """Set one value in one of the metadata texts."""

    def apply(header):
        text = json.loads(header["__metadata__"][key])
        functools.reduce(operator.getitem, path[:-1], text)[path[-1]] = to
        header["__metadata__"][key] = json.dumps(text)

    return apply


GROUP = {"class": "", "args": {}, "training": False, "parameters": {}, "buffers": {}, "transient": []}
SIGNED = {"names": ["x"], "in": {"tuple": [{"tuple": [0]}, {"dict": {}}]}, "out": None}


def guard(inputs=None, symbols=None, conditions=()):
    """Add a check of inputs to the tree; without arguments, a legal one."""
    sizes = {"tuple": [2, "s0"]}
    entry = {"tuple": ["tensor", "x", {"dtype": "float32"}, sizes]}
    arguments = {
        "inputs": {"tuple": [entry] if inputs is None else inputs},
        "symbols": {"dict": {"s0": {"tuple": [0, 1, 1, 0]}} if symbols is None else symbols},
        "conditions": {"tuple": list(conditions)},
    }
    return edit("modules", "guard", to={**GROUP, "class": "mpcompile.layers.InputGuard", "args": arguments})


EVIL_GUARDS = [
    *[guard(inputs=[{"tuple": entry}]) for entry in (["tensor", "x"], ["code", "x", 1], ["value", 1, 2], [CODE], [])],
    *[guard(inputs=[{"tuple": ["value", "x", v]}]) for v in ({"dtype": "int8"}, {"tuple": []}, [CODE])],
    *[guard(inputs=[{"tuple": ["tensor", "x", {"dtype": "int8"}, {"tuple": [s]}]}]) for s in ("s9", None, 1.5, [1])],
    *[guard(symbols={"s0": {"tuple": v}}) for v in ([1, 1, 1, 0], [0, 2, 1, 0], [0, None, 1, 0], [0, 1, 0, 0], [0])],
    *[guard(conditions=[{"tuple": [name, "s0", 1]}]) for name in ("pow", "__call__", 1, None)],
    *[guard(conditions=[c]) for c in ("s1", True, {"tuple": ["add", "s0"]}, {"tuple": ["add", "s0", CODE]})],
]
EVIL_TEXTS = [
    *EVIL_GUARDS,
    *[edit("graph", "class", to=name) for name in (f"A:\n {CODE}\nclass B", "1", "", None, "self")],
    edit("graph", "nodes", to=[]),
    edit("graph", "nodes", -1, "op", to="placeholder"),
    edit("graph", "locked", to="yes"),
    edit("graph", "locked", to=1),
    *[edit("graph", "signature", to={**SIGNED, "names": [name]}) for name in (f"x={CODE}", "self", "a b", 1)],
    edit("graph", "signature", to={**SIGNED, "in": {"tuple": [{"tuple": []}, {"dict": {f"x':{CODE},'y": 0}}]}}),
    edit("graph", "signature", to={**SIGNED, "in": {"tuple": [0, 0]}}),
    *[edit("modules", name, to=GROUP) for name in ("forward", "to_folder", "plan", "_modules", CODE, "no.parent")],
    *[edit("modules", name, to=GROUP) for name in ('a"b', "a'b", "a\\b", "a\nb", "\ufb01", "a" * 2000)],
    *[edit("modules", "new", to={"same": name}) for name in ("", "new", "later", None, [])],
    edit("modules", "group.own", to={"same": "group"}),
    edit("modules", "norm.part", to=GROUP),
    *[
        edit("modules", "norm", "class", to=name)
        for name in (
            "subprocess.Popen",
            "torch.nn.Sequential",
            "torch.nn.Module",
            "torch.nn.BatchNorm2d.forward",
            1,
            "x",
        )
    ],
    edit("modules", "norm", "args", "device", to="cuda"),
    edit("modules", "norm", "args", "num_features", to=10**30),
    edit("modules", "norm", "args", "num_features", to=6),
    edit("modules", "norm", "args", "num_features", to={"node": "x"}),
    edit("modules", "norm", "training", to=2),
    edit("modules", "norm", "parameters", to={}),
    edit("modules", "norm", "parameters", "weight", to="group.scale"),
    edit("modules", "norm", "buffers", "running_mean", to="none"),
    edit("modules", "norm", "parameters", "forward", to="group.scale"),
    edit("modules", "group", "parameters", "training", to="group.scale"),
    edit("modules", "group", "parameters", f"a-{CODE}", to="group.scale"),
    edit("modules", "fc", "args", "m", to=3),
    edit("modules", "fc", "args", "n", to=5),
    edit("modules", "fc", "args", "n", to="2:4\n"),
    edit("modules", "fc", "buffers", "mask", to="group.flags"),
    *[edit("modules", "norm", to={**GROUP, "class": "torch.nn.LSTM", "args": {"num_layers": n}}) for n in (10**9, "9")],
    *[edit("tensors", "group.scale", "kind", to=kind) for kind in ("code", None, 1)],
    edit("tensors", "group.flags", "kind", to="parameter"),
    *[edit("tensors", "fc.weight", "strides", to=s) for s in ([10**12, 1], [0, 0], [1], [-1, 4], ["a", 1], None)],
    edit("tensors", "other", to={"kind": "buffer"}),
    edit("plan", "layers", to=[]),
    edit("plan", "surprise", to=1),
    lambda header: header["__metadata__"].update(graph="{"),
    lambda header: header["__metadata__"].update(graph="[" * 100_000),
    lambda header: header["__metadata__"].update(plan="[" * 100_000),
    lambda header: header["__metadata__"].update(extra="1"),
    lambda header: header["__metadata__"].pop("plan"),
    lambda header: header["__metadata__"].update(plan=1),
    lambda header: header.update({"a-b": header.pop("group.scale")}),
    lambda header: header["fc.weight"].update(shape=[8, 4]),
    lambda header: header["fc.weight"].update(shape=[-4, -8]),
    lambda header: header["fc.weight"].update(shape=[2**62, 2**62, 0]),
    lambda header: header["fc.weight"].update(dtype="F65"),
    lambda header: header["fc.weight"].update(data_offsets=[0, 1 << 60]),
    lambda header: header["fc.weight"].update(data_offsets=[8]),
]


@pytest.mark.parametrize("harm", EVIL_TEXTS, ids=range(len(EVIL_TEXTS)))
def test_hostile_texts(harm, small, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    header, data = parts(small)
    harm(header)
    with pytest.raises(ArtifactError, match="cannot be loaded"):
        load(forge(tmp_path / "file", header, data))
    assert not (tmp_path / "pwned").exists()


def test_a_legal_guard_is_loaded(small, tmp_path):
    header, data = parts(small)
    guard()(header)
    assert load(forge(tmp_path / "file", header, data)).guard.symbols == {"s0": (0, 1, 1, 0)}


SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | st.just("x")
JUNK = st.recursive(SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3))


def places(value, path=()):
    """Every path into nested lists and dicts."""
    yield path
    for key in value if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ():
        yield from places(value[key], (*path, key))


@settings(max_examples=400, deadline=10_000, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_fuzzed_headers(small, tmp_path, data):
    """Values in the texts or the header are replaced, removed or swapped; the checksum is valid."""
    header, body = parts(small)
    texts = {key: json.loads(header["__metadata__"][key]) for key in ("graph", "modules", "tensors", "plan")}
    whole = {**texts, "header": {k: v for k, v in header.items() if k != "__metadata__"}}
    everywhere = [path for path in places(whole) if len(path) > 1]
    for _ in range(data.draw(st.integers(1, 3))):
        path = data.draw(st.sampled_from(everywhere))
        other = data.draw(st.sampled_from(everywhere))
        try:
            owner = functools.reduce(operator.getitem, path[:-1], whole)
            swap = copy.deepcopy(functools.reduce(operator.getitem, other, whole))
            change = data.draw(st.sampled_from(["junk", "remove", "swap"]))
            if change == "remove":
                del owner[path[-1]]
            else:
                owner[path[-1]] = data.draw(JUNK) if change == "junk" else swap
        except (KeyError, IndexError, TypeError):
            continue  # an earlier change removed the place
    metadata = header["__metadata__"] | {key: json.dumps(whole[key]) for key in texts}
    try:
        gm = load(forge(tmp_path / "file", {"__metadata__": metadata, **whole["header"]}, body))
    except ArtifactError:
        return
    assert isinstance(gm, IRModule)


@settings(max_examples=200, deadline=10_000, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.binary(max_size=300), st.integers(0, 2000), st.integers(0, 40))
def test_fuzzed_bytes(small, tmp_path, junk, place, removed):
    raw = small.read_bytes()
    changed = raw[:place] + junk + raw[place + removed :]
    (tmp_path / "file").write_bytes(changed)
    if changed != raw:
        with pytest.raises(ArtifactError):
            load(tmp_path / "file")
