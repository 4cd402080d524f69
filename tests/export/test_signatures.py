"""Exports keep the names of inputs and outputs, and their structure: pt2, aoti, ONNX, and the command."""

import json
import subprocess
import sys
from collections import UserDict, namedtuple

import onnx
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import mpcompile
from mpcompile import Config, cli, transform
from mpcompile.errors import ConfigError, GraphError, InputError
from mpcompile.export import program, run_exported, save_aoti, save_onnx, save_pt2
from mpcompile.export.examples import describe_inputs, example_of_artifact
from tests.support.helpers import relative

Found = namedtuple("Found", "logits features")
SHAPES = {
    "tensor": lambda y, n: y,
    "tuple": lambda y, n: (y, [n, y]),
    "dict": lambda y, n: {"logits": y, "id": n, "loss": None, "classes": 4},
    "namedtuple": lambda y, n: Found(y, (n, y)),
}
NAMES = {
    "tensor": ["logits"],
    "tuple": ["0", "1.0", "1.1"],
    "dict": ["logits", "output.id"],
    "namedtuple": ["logits", "features.0", "features.1"],
}


class Net(nn.Module):
    """Two tensors and a number go in; ``shape`` says what comes out."""

    def __init__(self, shape):
        super().__init__()
        self.hidden, self.head, self.shape = nn.Linear(16, 16), nn.Linear(16, 4), SHAPES[shape]

    def forward(self, image, id, scale=2):
        return self.shape(self.head(self.hidden(image.mean((2, 3))).relu()) * scale, id)


class Batched(Net):
    def forward(self, batch):
        return super().forward(batch["image"], batch["id"])


def batch_of(size, seed=0):
    image = torch.randn(size, 16, 4, 4, generator=torch.Generator().manual_seed(seed))
    return {"image": image, "id": torch.arange(size) + seed}


def transformed(model, kind, example, free=True):
    """The model as a traced or exported graph with masks."""
    torch.manual_seed(0)
    config = Config(pattern="2:4", score="magnitude")
    if kind == "traced":
        return transform(model.eval(), example, config)
    axes = {"image": {0: torch.export.Dim.DYNAMIC}, "id": {0: torch.export.Dim.DYNAMIC}}
    args, kwargs = (example, {}) if isinstance(example, tuple) else ((), dict(example))
    shapes = ((axes,) if args else {**axes, **dict.fromkeys(kwargs.keys() - axes.keys())}) if free else None
    return transform(torch.export.export(model.eval(), args, kwargs, dynamic_shapes=shapes).module(), example, config)


def same(found, wanted):
    """Structures and constants are equal, and tensors close."""
    assert type(found) is type(wanted)
    if isinstance(wanted, torch.Tensor):
        return torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)
    if isinstance(wanted, dict):
        assert list(found) == list(wanted)
        return [same(found[key], wanted[key]) for key in wanted]
    if isinstance(wanted, (tuple, list)):
        return [same(a, b) for a, b in zip(found, wanted, strict=True)]
    assert found == wanted
    return None


kinds = pytest.mark.parametrize("kind", ["traced", "exported"])


@kinds
@pytest.mark.parametrize("shape", SHAPES)
def test_a_program_is_called_by_keyword_and_returns_the_structure(kind, shape, tmp_path):
    gm = transformed(Net(shape), kind, {**batch_of(2), "scale": 3})
    save_pt2(gm, {**batch_of(2), "scale": 3}, tmp_path / "m.pt2", engine="dense", dynamic_batch=True)
    again = torch.export.load(tmp_path / "m.pt2").module()
    with torch.no_grad():
        for size in (2, 5):
            given = {"scale": 3, **batch_of(size, seed=size)}
            same(again(**given), gm(**given))


@kinds
@pytest.mark.parametrize("shape", SHAPES)
def test_onnx_has_the_names_of_parameters_and_keys(kind, shape, tmp_path):
    gm = transformed(Net(shape), kind, {**batch_of(2), "scale": 3})
    save_onnx(gm, UserDict(batch_of(2), scale=3, labels=torch.arange(2)), tmp_path / "m.onnx", dynamic_batch=True)
    graph = onnx.load(tmp_path / "m.onnx").graph
    assert [value.name for value in graph.input] == ["image", "id"]
    assert [value.name for value in graph.output] == NAMES[shape]
    assert all(value.type.tensor_type.shape.dim[0].dim_param for value in graph.input)
    given = batch_of(5, seed=1)
    found = run_exported(tmp_path / "m.onnx", "onnx", given)
    with torch.no_grad():
        wanted = [leaf for leaf in torch.utils._pytree.tree_leaves(gm(**given, scale=3)) if torch.is_tensor(leaf)]
    for value, expected in zip(found.values() if isinstance(found, dict) else [found], wanted, strict=True):
        torch.testing.assert_close(value, expected, rtol=1e-4, atol=1e-5)


@kinds
def test_the_one_input_may_be_a_dict(kind, tmp_path):
    batch = batch_of(2)
    gm = transformed(Batched("dict"), kind, (batch,))
    save_pt2(gm, (batch,), tmp_path / "m.pt2", engine="reference", dynamic_batch=True)
    save_onnx(gm, ({"id": batch["id"], "image": batch["image"]},), tmp_path / "m.onnx")
    with torch.no_grad():
        same(torch.export.load(tmp_path / "m.pt2").module()(batch_of(3)), gm(batch_of(3)))
        for given in ((batch,), batch):
            same(run_exported(tmp_path / "m.pt2", "pt2", given), gm(batch))
            found = run_exported(tmp_path / "m.onnx", "onnx", given)
            assert list(found) == ["logits", "id"] and relative(found["logits"], gm(batch)["logits"]) < 1e-4
    assert [value.name for value in onnx.load(tmp_path / "m.onnx").graph.input] == ["batch.image", "batch.id"]


def test_inputs_of_the_same_tensor_stay_two():
    class Sum(nn.Module):
        def __init__(self):
            super().__init__()
            self.hidden, self.head = nn.Linear(16, 16), nn.Linear(16, 4)

        def forward(self, a, b):
            return self.head(self.hidden(a - b).relu())

    x = torch.randn(2, 16)
    gm = transform(Sum().eval(), (x, x.clone()), Config(pattern="2:4", score="magnitude"))
    exported = program(gm, (x, x), engine="dense").module()
    with torch.no_grad():
        torch.testing.assert_close(exported(x, 2 * x), gm(x, 2 * x))


def test_outputs_of_transformers_are_loaded_as_themselves_without_mpcompile(tmp_path):
    from transformers import ViTConfig, ViTForImageClassification

    config = ViTConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64, image_size=32, patch_size=8
    )
    x = {"pixel_values": torch.randn(2, 3, 32, 32)}
    graph = torch.export.export(ViTForImageClassification(config).eval(), (), x).module()
    gm = transform(graph, x, Config(pattern="2:4", score="magnitude"))
    save_pt2(gm, x, tmp_path / "m.pt2", engine="dense")
    save_file(x, tmp_path / "x")
    code = (
        "import sys, torch, transformers.modeling_outputs\n"
        "from safetensors.torch import load_file, save_file\n"
        "found = torch.export.load('m.pt2').module()(**load_file('x'))\n"
        "assert type(found).__name__ == 'ImageClassifierOutput' and 'mpcompile' not in sys.modules\n"
        "save_file({'logits': found.logits.detach()}, 'y')\n"
    )
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True)
    with torch.no_grad():
        assert relative(load_file(tmp_path / "y")["logits"], gm(**x).logits) < 1e-5


def test_a_graph_of_one_batch_size_says_so(tmp_path):
    gm = transformed(Net("dict"), "exported", batch_of(2), free=False)
    for save in (save_pt2, save_onnx):
        with pytest.raises(GraphError, match=r"cannot be left free.*found a graph for batches of 2"):
            save(gm, batch_of(2), tmp_path / "m", dynamic_batch=True)
    with pytest.raises(InputError, match="input 'id' is missing"):
        save_pt2(gm, {"image": batch_of(2)["image"]}, tmp_path / "m")
    assert not list(tmp_path.iterdir())


def test_a_class_that_a_file_cannot_name_is_refused(tmp_path):
    class Own:
        def __init__(self, logits):
            self.logits = logits

    torch.utils._pytree.register_pytree_node(Own, lambda o: ([o.logits], None), lambda leaves, _: Own(*leaves))
    gm = transformed(Net("tensor"), "traced", batch_of(2))
    output = gm.graph.output_node()
    with gm.graph.inserting_before(output):
        output.args = (gm.graph.call_function(Own, output.args),)
    gm.recompile()
    with pytest.raises(GraphError, match=r"file cannot name the outputs' class.*register"):
        save_pt2(gm, batch_of(2), tmp_path / "m.pt2", engine="dense")


def test_a_package_checks_each_of_its_inputs(tmp_path):
    gm = transformed(Net("dict"), "traced", batch_of(2))
    save_aoti(gm, batch_of(2), tmp_path / "m.pt2", engine="dense", dynamic_batch=True)
    model = torch._inductor.aoti_load_package(str(tmp_path / "m.pt2"))
    with torch.no_grad():
        for found, size in (
            (model(**batch_of(3)), 3),
            (run_exported(tmp_path / "m.pt2", "aoti", batch_of(2)), 2),
        ):  # AOTInductor makes tensors of numbers
            same(found, {**gm(**batch_of(size)), "classes": torch.tensor(4)})
    for wrong, message in (
        ({"id": torch.arange(2.0)}, r"input 1: expected int64 \(.*\) on cpu, found float32"),
        ({"id": torch.arange(3)}, r"input 1: expected int64 \(.*\) on cpu, found \(3\)"),
        ({"image": batch_of(2)["image"][:, :8]}, "input 0: expected float32"),
    ):
        with pytest.raises(RuntimeError, match=message):
            model(**{**batch_of(2), **wrong})


# --- The command ---


@pytest.fixture(params=["traced", "exported"])
def artifact(request, tmp_path):
    model, example = (Net, batch_of(2)) if request.param == "exported" else (Batched, (batch_of(2),))
    gm = transformed(model("tuple"), request.param, example)
    gm.plan.provenance["inputs"] = json.loads(json.dumps(describe_inputs(gm)))
    mpcompile.save(gm, tmp_path / "m.mpc")
    return tmp_path / "m.mpc"


@pytest.mark.parametrize("kind", ["pt2", "onnx"])
def test_the_command_makes_the_inputs_that_the_artifact_records(artifact, kind, capsys):
    out = artifact.with_suffix(f".{kind}")
    command = ["export", str(artifact), "--format", kind, "--engine", "dense", "--dynamic-batch", "--batch", "3"]
    assert cli.main([*command, "--out", str(out), "--json", "-", "--quiet"]) == 0
    assert json.loads(capsys.readouterr().out)["difference"] < 1e-4
    gm = mpcompile.load(artifact)
    example = example_of_artifact(gm, gm.plan.provenance["inputs"], None, 5)
    assert run_exported(out, kind, example)


@pytest.mark.parametrize(
    "record",
    [
        None,
        "inputs",
        [{"name": "image"}],
        [{"name": "image", "dtype": "float32", "shape": [1 << 40]}],
        [{"name": "image", "dtype": "code", "shape": [2]}],
        [{"name": 7, "dtype": "int64", "shape": [2]}],
    ],
)
def test_records_of_inputs_are_not_trusted(record):
    gm = transformed(Net("tensor"), "traced", batch_of(2))
    with pytest.raises(ConfigError, match="does not record its inputs"):
        example_of_artifact(gm, record, (3, 8, 8), 2)


def test_onnx_refuses_in_the_words_of_the_converter(tmp_path):
    class Attention(nn.Module):
        """Attends over five axes, as Hiera does."""

        def __init__(self):
            super().__init__()
            self.hidden, self.head = nn.Linear(16, 16), nn.Linear(16, 4)

        def forward(self, x):
            y = self.hidden(x).unflatten(0, (1, 1, -1))
            return self.head(nn.functional.scaled_dot_product_attention(y, y, y).flatten(0, 2))

    x = torch.randn(2, 3, 16)
    gm = mpcompile.transform(Attention(), x, Config(pattern="2:4"))
    with pytest.raises(GraphError, match="cannot be converted to ONNX: only 4D query"):
        save_onnx(gm, x, tmp_path / "m.onnx")
