"""Structured inputs and outputs in artifacts: a class comes back where it is at hand, else one with the same fields."""

import collections
import copy
import dataclasses
import json
import logging
import pickle
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from transformers.modeling_outputs import BaseModelOutput, ImageClassifierOutput

from mpcompile import Config, load, lower, save, transform
from mpcompile.artifact import records
from mpcompile.artifact.records import Outputs
from mpcompile.errors import ArtifactError
from tests.support.forging import forge, parts

X = torch.randn(2, 8)
Pair = collections.namedtuple("Pair", "logits features")


class Typed(NamedTuple):
    logits: Tensor
    scale: float


class Checked(collections.namedtuple("Checked", "logits features")):
    def __new__(cls, *values):
        raise AssertionError("a file may not choose code that runs")


@dataclasses.dataclass
class Registered:
    logits: Tensor
    features: Tensor | None = None


torch.export.register_dataclass(Registered)


@dataclasses.dataclass
class Unregistered:
    logits: Tensor
    features: Tensor | None = None


LOCAL = collections.namedtuple("Local", "a b")
LOCAL.__qualname__ = "function.<locals>.Local"


class Net(nn.Module):
    """Returns what ``make`` makes of logits and features."""

    def __init__(self, make):
        super().__init__()
        self.first, self.fc, self.head, self.make = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 4), make

    def forward(self, pixel_values):
        features = self.fc(self.first(pixel_values).relu())
        return self.make(self.head(features), features)


MAKERS = {
    "namedtuple": Pair,
    "typed": lambda a, b: Typed(a, 2.0),
    "registered": Registered,
    "without": lambda a, b: Registered(a),
    "output": lambda a, b: ImageClassifierOutput(logits=a, hidden_states=(a, b)),
    "in a list": lambda a, b: [BaseModelOutput(last_hidden_state=a), Pair(b, (a, None))],
    "ordered": lambda a, b: collections.OrderedDict([("out", a), ("0", b)]),
    "nested": lambda a, b: {"a": (a, [None, {"b": b, "c": 3}]), "d": Pair(a, None)},
    "returned": lambda a, b: torch.max(a, 1),
    "local": LOCAL,
}


def exported(make):
    return torch.export.export(Net(make).eval(), (), {"pixel_values": X}).module()


def same(ours, theirs, equal=torch.equal):
    """Whether two trees have the same classes and tensors."""
    leaves = zip(pytree.tree_leaves(ours), pytree.tree_leaves(theirs), strict=True)
    values = all(equal(a, b) if isinstance(a, Tensor) else a == b for a, b in leaves)
    return values and pytree.tree_structure(ours) == pytree.tree_structure(theirs)


def again(gm, folder):
    save(gm, folder / "file")
    return load(folder / "file")


@pytest.mark.parametrize("name", [name for name in MAKERS if name != "local"])
def test_exported_graphs(name, tmp_path):
    source = exported(MAKERS[name])
    gm = transform(source, {"pixel_values": X}, Config("2:4"))
    for form in (again(gm, tmp_path), copy.deepcopy(gm), pickle.loads(pickle.dumps(gm))):
        assert same(form(pixel_values=X), gm(pixel_values=X))
    lowered = lower(gm, {"pixel_values": X}, Config(engine="reference"))
    assert same(lowered(pixel_values=X), gm(pixel_values=X), torch.allclose)
    assert same(again(lowered, tmp_path)(pixel_values=X), lowered(pixel_values=X))


@pytest.mark.parametrize("name", ["namedtuple", "typed", "registered", "without", "nested", "returned"])
def test_symbolic_graphs(name, tmp_path):
    gm = transform(Net(MAKERS[name]).eval(), X, Config("2:4"))
    for form in (again(gm, tmp_path), copy.deepcopy(gm), pickle.loads(pickle.dumps(gm))):
        assert same(form(X), gm(X))


@pytest.mark.parametrize("source", ["exported", "symbolic"])
def test_a_class_that_is_local_to_a_function(source, tmp_path):
    gm = transform(exported(LOCAL) if source == "exported" else Net(LOCAL).eval(), {"pixel_values": X}, Config("2:4"))
    for form in (again(gm, tmp_path), pickle.loads(pickle.dumps(gm))):
        found = form(pixel_values=X)
        assert type(found).__name__ == "Local" and found._fields == ("a", "b")
        assert torch.equal(found.a, gm(pixel_values=X).a)


def test_a_dataclass_that_is_not_registered_becomes_a_mapping(tmp_path, caplog):
    gm = transform(Net(Unregistered).eval(), X, Config("2:4"))
    with caplog.at_level(logging.WARNING, "mpcompile"):
        loaded = again(gm, tmp_path)
    found = loaded(X)
    assert isinstance(found, Outputs) and torch.equal(found.logits, gm(X).logits)
    assert list(found) == ["logits", "features"] and torch.equal(found[1], found["features"])
    assert sum("register_dataclass" in line for line in caplog.messages) == 1
    assert same(again(loaded, tmp_path)(X), found)


def test_no_namedtuple_with_code_of_its_own(tmp_path):
    name = f"{Checked.__module__}.Checked"
    assert records.tuple_class(name, Checked._fields) is not Checked
    assert records.tuple_class(f"{Pair.__module__}.Pair", Pair._fields) is Pair
    assert records.tuple_class(f"{Pair.__module__}.Pair", ("other",)) is not Pair
    assert records.tuple_class("no.such.Pair", ("a",)).__name__ == "Pair"


def test_inputs_of_classes(tmp_path):
    class Sum(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(8, 4)

        def forward(self, batch, more):
            return self.fc(batch.logits + batch.features) + more["a"][0]

    inputs = (Pair(X, X), collections.OrderedDict(a=(torch.ones(1),)))
    gm = transform(torch.export.export(Sum(), inputs).module(), inputs, Config("dense"))
    for form in (again(gm, tmp_path), pickle.loads(pickle.dumps(gm))):
        assert torch.equal(form(*inputs), gm(*inputs))


WITHOUT = """
import sys
class Missing:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("transformers", "tests"):
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Missing())
import copy, logging, pickle, torch, mpcompile
lines = []
logging.getLogger("mpcompile").addHandler(type("H", (logging.Handler,), {"emit": lambda s, r: lines.append(r.msg)})())
x = torch.load(sys.argv[2])
gm = mpcompile.load(sys.argv[1])
mpcompile.load(sys.argv[1])
assert len(lines) == 1 and "transformers is not installed" in lines[0], lines
out = gm(pixel_values=x)
assert list(out) == ["logits", "hidden_states"] and out.loss is None and out[0] is out["logits"] is out.logits
assert type(out).__name__ == "ImageClassifierOutput" and out.to_tuple()[1][1] is out.hidden_states[1] is out[1:][0][1]
assert isinstance(out, dict) and not hasattr(out, "missing")
for form in (pickle.loads(pickle.dumps(gm)), copy.deepcopy(gm), torch.compile(gm, backend="aot_eager", fullgraph=True)):
    assert type(form(pixel_values=x)) is type(out)
assert type(pickle.loads(pickle.dumps(out))) is type(copy.copy(out)) is type(out)
assert torch.export.export(gm, (), {"pixel_values": x}).module()(pixel_values=x).logits.shape == (2, 4)
mpcompile.save(gm, sys.argv[3])
torch.save(out.logits, sys.argv[4])
"""


def test_without_transformers_an_output_is_a_mapping(tmp_path):
    gm = transform(exported(MAKERS["output"]), {"pixel_values": X}, Config("2:4"))
    save(gm, tmp_path / "file")
    torch.save(X, tmp_path / "x")
    names = [str(tmp_path / name) for name in ("file", "x", "again", "logits")]
    done = subprocess.run([sys.executable, "-c", WITHOUT, *names], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert torch.equal(torch.load(tmp_path / "logits"), gm(pixel_values=X).logits)
    assert type(load(tmp_path / "again")(pixel_values=X)) is ImageClassifierOutput  # it keeps the name of the original


# --- Hostile files ---


def forged(folder, out):
    """A file whose outputs have another structure."""
    save(transform(exported(Pair), {"pixel_values": X}, Config("2:4")), folder / "file")
    header, data = parts(folder / "file")
    graph = json.loads(header["__metadata__"]["graph"])
    graph["signature"]["out"] = out
    header["__metadata__"]["graph"] = json.dumps(graph)
    return forge(folder / "forged", header, data)


def record(origin, fields=("logits", "features"), everything=None):
    names = list(fields if everything is None else everything)
    return {"record": {"class": origin, "fields": dict.fromkeys(fields, 0), "all": names}}


def named(origin, fields=("a", "b")):
    return {"namedtuple": {"class": origin, "fields": dict.fromkeys(fields, 0)}}


DEEP = 0
for _ in range(40):
    DEEP = {"tuple": [DEEP]}
EVIL = [
    *[kind(name) for kind in (record, named) for name in ("a b", "os.system()", "x\n.y", "", ".", "a..b", 3, None)],
    *[kind("a.B", names) for kind in (record, named) for names in (("a b", "c"), ("if", "c"), ("a", "a=1"))],
    named("a.B", ("_x", "y")),
    record("a.B", ("a", "b"), ("a",)),
    record("a.B", ("a", "b"), ("a", "a", "b")),
    {"record": {"class": "a.B", "fields": {"a": 0, "b": 0}}},
    {"namedtuple": {"class": "a.B", "fields": ["a", "b"]}},
    {"returned": {"name": "__class__", "items": [0, 0]}},
    {"returned": {"name": "max", "items": [0]}},
    *[{tag: {"a": 0}} for tag in ("code", "tuple", "returned")],
    *[{"tuple": leaves} for leaves in ([0], [0, 0, 0], ["x", 0], [1, 0], [None, 0], [True, 0])],
    {"tuple": [0, 0], "dict": {}},
    DEEP,
]


@pytest.mark.parametrize("evil", EVIL, ids=range(len(EVIL)))
def test_hostile_structures(evil, tmp_path):
    with pytest.raises(ArtifactError, match="cannot be loaded"):
        load(forged(tmp_path, evil))


HARMLESS = ("os.system", "subprocess.Popen", "antigravity.Pair", "transformers.utils.import_utils.importlib")
HARMLESS += ("transformers.models.evil.modeling_evil.Out", "transformers.modeling_outputs.OrderedDict")


@pytest.mark.parametrize("kind", [record, named])
@pytest.mark.parametrize(
    "origin", [*HARMLESS, "transformers.models.evil.modeling_evil.Out", "transformers.file_utils.X"]
)
def test_a_file_imports_nothing(kind, origin, tmp_path):
    path = forged(tmp_path, kind(origin))
    before = set(sys.modules)
    found = load(path)(pixel_values=X)
    assert type(found).__module__ == records.__name__ and type(found).__name__ == origin.rpartition(".")[2]
    assert {name.split(".")[0] for name in set(sys.modules) - before} <= {"transformers"}


def test_a_key_that_occurs_twice(tmp_path):
    path = forged(tmp_path, {"tuple": [0, 0]})
    header, data = parts(path)
    text = header["__metadata__"]["graph"]
    header["__metadata__"]["graph"] = text.replace('"out": ', '"out": null, "out": ', 1)
    assert header["__metadata__"]["graph"] != text
    with pytest.raises(ArtifactError, match="the key 'out' twice"):
        load(forge(tmp_path / "twice", header, data))


def test_a_call_of_a_class_with_other_fields(tmp_path):
    save(transform(Net(Pair).eval(), X, Config("2:4")), tmp_path / "file")
    header, data = parts(tmp_path / "file")
    graph = json.loads(header["__metadata__"]["graph"])
    (made,) = [node for node in graph["nodes"] if isinstance(node["target"], dict)]
    for args, kwargs in ((made["args"][:1], {}), (made["args"], {"more": 1}), ([], {"logits": 1, "other": 2})):
        made["args"], made["kwargs"] = args, kwargs
        header["__metadata__"]["graph"] = json.dumps(graph)
        with pytest.raises(ArtifactError, match="is made of other fields"):
            load(forge(Path(tmp_path, "forged"), header, data))
