"""Artifacts: everything in the IR comes back bit for bit, even in another process, or a refusal gives the reason."""

import copy
import importlib
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import fx, nn
from torch.nn import functional as F

from mpcompile import Config, Pipeline, load, save, transform
from mpcompile.artifact.leaves import LAYERS
from mpcompile.capture.importers import import_model
from mpcompile.errors import InputError
from mpcompile.ir.module import IRModule
from mpcompile.layers import MaskedConv2d, MaskedLinear
from mpcompile.passes.mask import Mask
from tests.support.helpers import convolutional, images, mlp, tiny_vit

ROOT = Path(__file__).resolve().parents[2]
MODELS = {  # constructor, size of its images, what to do
    "vit": (tiny_vit, 32, Config(pattern="2:4", tome_r=1), None),
    "resnet18": (lambda: convolutional("resnet18"), 64, Config(pattern="8:16"), Pipeline([Mask()])),
    "convnextv2_atto": (lambda: convolutional("convnextv2_atto"), 64, Config(pattern="2:4"), Pipeline([Mask()])),
    "mlp": (mlp, None, Config(pattern="2:4"), None),
}


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory):
    """name -> (transformed module, input, file)."""
    folder = tmp_path_factory.mktemp("artifacts")
    result = {}
    for name, (build, size, config, pipeline) in MODELS.items():
        x = images(2, size) if size else torch.randn(2, 32, generator=torch.Generator().manual_seed(1))
        gm = transform(build(), x, config, pipeline=pipeline)
        path = folder / f"{name}.safetensors"
        save(gm, path)
        result[name] = (gm, x, path)
    return result


def hand_made(modules: dict[str, nn.Module], graph: fx.Graph) -> IRModule:
    """An IR of given layers."""
    root = nn.Module()
    for name, module in modules.items():
        root.add_module(name, module)
    return IRModule(root, graph)


def again(gm: IRModule, folder: Path) -> IRModule:
    """Save and load; saving the result gives the same file."""
    save(gm, folder / "first")
    loaded = load(folder / "first")
    save(loaded, folder / "second")
    assert (folder / "first").read_bytes() == (folder / "second").read_bytes()
    return loaded


def same_graph(a: IRModule, b: IRModule) -> bool:
    def rows(gm):
        return [(n.op, n.name, n.target, repr(n.args), repr(n.kwargs)) for n in gm.graph.nodes]

    return rows(a) == rows(b)


def assert_same(a: IRModule, b: IRModule) -> None:
    assert same_graph(a, b)
    assert type(a).__name__ == type(b).__name__ and a.locked_mode == b.locked_mode
    modules = dict(b.named_modules(remove_duplicate=False))
    for name, module in a.named_modules(remove_duplicate=False):
        assert module.training == modules[name].training and (module is a or type(module) is type(modules[name]))
    for kind in ("named_parameters", "named_buffers"):
        pairs = zip(getattr(a, kind)(remove_duplicate=False), getattr(b, kind)(remove_duplicate=False), strict=True)
        for (name, x), (other, y) in pairs:
            assert (name, x.dtype, x.requires_grad, type(x)) == (other, y.dtype, y.requires_grad, type(y))
            assert x.shape == y.shape and x.stride() == y.stride()
            assert torch.equal(x.detach().reshape(-1).view(torch.uint8), y.detach().reshape(-1).view(torch.uint8))
    assert list(a.state_dict()) == list(b.state_dict())


@pytest.mark.parametrize("name", MODELS)
def test_round_trip(name, saved, tmp_path):
    gm, x, path = saved[name]
    loaded = load(path)
    assert isinstance(loaded, IRModule)
    assert_same(gm, loaded)
    assert loaded.plan == gm.plan and loaded.plan.masked
    assert any(isinstance(m, (MaskedLinear, MaskedConv2d)) for m in loaded.modules())
    assert torch.equal(loaded(x), gm(x))
    save(loaded, tmp_path / "again")
    assert (tmp_path / "again").read_bytes() == path.read_bytes()


def test_fresh_process_gives_equal_logits(saved, tmp_path):
    save_file({name: gm(x).detach() for name, (gm, x, _) in saved.items()}, tmp_path / "logits")
    save_file({name: x for name, (_, x, _) in saved.items()}, tmp_path / "inputs")
    code = (
        "import sys, torch, mpcompile\nfrom safetensors.torch import load_file\n"
        "inputs, logits = load_file(sys.argv[1]), load_file(sys.argv[2])\n"
        "for path in sys.argv[3:]:\n"
        "    name = path.rpartition('/')[2].partition('.')[0]\n"
        "    print(name, torch.equal(mpcompile.load(path)(inputs[name]), logits[name]))\n"
    )
    paths = [str(path) for _, _, path in saved.values()]
    command = [sys.executable, "-c", code, str(tmp_path / "inputs"), str(tmp_path / "logits"), *paths]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [word for name in saved for word in (name, "True")]


def test_loading_needs_nothing_that_only_training_needs(saved):
    absent = ["sklearn", "matplotlib", "onnx", "tensorboard", "wandb", "datasets", "timm", "torchvision", "yaml"]
    code = (
        f"import sys; sys.modules.update(dict.fromkeys({absent}))\n"
        f"import torch, mpcompile; print(mpcompile.load({str(saved['vit'][2])!r})(torch.ones(1, 3, 32, 32)).shape)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "torch.Size([1, 10])" in done.stdout


def test_any_safetensors_reader_opens_the_file(saved):
    gm, _, path = saved["vit"]
    tensors = load_file(path)
    expected = dict([*gm.named_parameters(), *gm.named_buffers()])
    packed = {name for name in expected if f"{name}.values" in tensors}
    assert packed == {f"{layer}.weight" for layer in gm.plan.masked}
    masks = {f"{layer}.mask" for layer in gm.plan.masked}
    parts = {f"{name}.{part}" for name in packed for part in ("values", "mask")}
    assert tensors.keys() == (expected.keys() - packed - masks) | parts
    assert all(torch.equal(tensors[name], expected[name]) for name in tensors.keys() - parts)
    for name in packed:
        assert torch.equal(tensors[f"{name}.values"].flatten(), expected[name][expected[name] != 0])
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    assert metadata["format_version"] == "3" and metadata["torch"] == torch.__version__
    assert json.loads(metadata["plan"]) == json.loads(gm.plan.to_json())


@pytest.mark.parametrize("name", ["vit", "resnet18"])
def test_loaded_module_trains_like_the_original(name, saved):
    gm, x, path = saved[name]
    pair = [copy.deepcopy(gm).train(), load(path).train()]
    losses = []
    for module in pair:
        optimizer = torch.optim.SGD(module.parameters(), lr=0.1, momentum=0.9)
        for _ in range(2):
            loss = F.cross_entropy(module(x), torch.tensor([1, 2]))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        losses.append(loss.item())
    assert losses[0] == losses[1]
    moved = 0
    for (key, a), b in zip(pair[0].state_dict().items(), pair[1].state_dict().values(), strict=True):
        assert torch.equal(a, b), key
        moved += not torch.equal(b, gm.state_dict()[key])
    assert moved > 20 and (name == "vit" or not torch.equal(pair[1].bn1.running_mean, gm.bn1.running_mean))
    masked = next(m for m in pair[1].modules() if isinstance(m, (MaskedLinear, MaskedConv2d)))
    assert not masked.weight.grad[~masked.mask].any() and masked.weight.grad[masked.mask].any()


def test_loaded_module_can_be_copied(saved):
    _, x, path = saved["vit"]
    loaded = load(path)
    twin = copy.deepcopy(loaded)
    assert torch.equal(twin(x), loaded(x)) and twin.plan == loaded.plan
    with torch.no_grad():
        twin.head.weight.zero_()
    assert loaded.head.weight.any()


def test_flags_differ_from_layer_to_layer(tmp_path):
    gm = transform(
        nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Linear(8, 8)), torch.ones(4, 8)
    )
    gm.train()
    gm.get_submodule("1").eval()
    for parameter in gm.get_submodule("0").parameters():
        parameter.requires_grad_(False)
    loaded = again(gm, tmp_path)
    assert_same(gm, loaded)
    assert [m.training for m in loaded.children()] == [True, False, True, True]
    outputs = []
    for module in (gm, loaded):
        torch.manual_seed(0)
        outputs.append(module(torch.ones(4, 8)))
    assert torch.equal(*outputs) and not torch.equal(outputs[1], loaded(torch.ones(4, 8)))


@pytest.mark.parametrize("mode", [True, False, None])
def test_the_one_mode_of_a_graph_is_kept(mode, tmp_path):
    gm = import_model(mlp(), torch.ones(1, 32)).gm
    gm.train(bool(mode))
    gm.locked_mode = mode
    assert again(gm, tmp_path).locked_mode is mode


def test_ties_orders_and_dtypes(tmp_path):
    """Tied tensors and layers stay tied and are stored once; strides, dtypes, shapes and buffers are preserved."""
    a, b, c = nn.Linear(4, 4), nn.Linear(4, 4), nn.Conv2d(3, 5, 3).to(memory_format=torch.channels_last)
    b.weight = a.weight
    group = nn.Module()
    group.register_buffer("kept", torch.tensor([[True, False]]))
    group.register_buffer("gone", torch.tensor(float("nan"), dtype=torch.bfloat16), persistent=False)
    group.register_buffer("none", None)
    group.register_parameter("p", nn.Parameter(torch.empty(0, 3, dtype=torch.float16), requires_grad=False))
    group.register_parameter("q", None)
    group.register_buffer("turned", torch.arange(6.0).reshape(2, 3).t())
    group.register_buffer("strided", torch.arange(6)[::2].expand(2, 3))
    group.add_module("hole", None)
    graph = fx.Graph()
    x = graph.call_module("b", (graph.call_module("a", (graph.placeholder("x"),)),))
    graph.output(graph.call_module("same", (x,)))
    gm = hand_made({"a": a, "b": b, "c": c, "same": a, "group": group}, graph)
    for name, module in {"c": c, "group": group, "same": a}.items():  # fx keeps the modules that the graph uses
        gm._modules[name] = module
    save(gm, tmp_path / "file")
    loaded = load(tmp_path / "file")
    assert loaded.b.weight is loaded.a.weight and loaded.same is loaded.a
    assert loaded.c.weight.is_contiguous(memory_format=torch.channels_last)
    assert loaded.group._non_persistent_buffers_set == {"gone"} and loaded.group.hole is None
    assert torch.equal(loaded.group.strided, group.strided)
    loaded.group.strided = group.strided  # overlapping memory is stored expanded
    assert_same(gm, loaded)
    assert sorted(k for k in load_file(tmp_path / "file") if k.endswith("weight")) == ["a.weight", "c.weight"]
    assert torch.equal(loaded(torch.ones(1, 4)), gm(torch.ones(1, 4)))


POSITIONAL = (  # required constructor arguments; the first pattern that matches the class's name counts
    ("Linear", (4, 3)),
    ("Conv", (4, 6, 3)),
    ("BatchNorm|InstanceNorm|LayerNorm|RMSNorm", (4,)),
    ("GroupNorm", (2, 4)),
    ("Embedding", (5, 4)),
    ("Multihead", (4, 2)),
    ("LSTM|GRU|RNN", (4, 3)),
    ("Threshold|StochasticDepth", (0.25, "row")),
    ("LPPool", (2.0, 3)),
    ("Unflatten", (1, (2, 2))),
    ("Fold", ((4, 5), 3)),
    ("Constant", (1, 0.5)),
    ("Max|Avg|Adaptive|Unfold|Upsampl|Local", (3,)),
    ("Pixel|Channel|Reflection|Replication|Zero|Circular", (2,)),
    ("", ()),
)
CASES = {  # settings other than the defaults, so that the stored arguments have to contain them
    "torch.nn.Linear": [{"bias": False}],
    "torch.nn.Conv2d": [{"bias": False, "padding": "same", "padding_mode": "reflect", "dilation": 2, "groups": 2}],
    "torch.nn.BatchNorm2d": [{"affine": False}, {"track_running_stats": False}, {"momentum": None, "eps": 1e-3}],
    "torch.nn.LayerNorm": [{"bias": False}, {"elementwise_affine": False}],
    "torch.nn.GroupNorm": [{"affine": False}],
    "torch.nn.MultiheadAttention": [{"bias": False}, {"add_bias_kv": True, "kdim": 3, "vdim": 2, "batch_first": True}],
    "torch.nn.LSTM": [{"num_layers": 2, "bidirectional": True, "bias": False}, {"proj_size": 2}],
    "torch.nn.Upsample": [{"size": None, "scale_factor": 2.0, "mode": "bilinear", "align_corners": True}],
    "timm.layers.BatchNormAct2d": [{"act_layer": "silu"}, {"act_layer": "hard_mish", "affine": False}],
}


def constructed() -> dict[str, nn.Module]:
    """Every layer class that a file may contain, some in several forms."""
    found = {}
    for home in ("torch.nn", "timm.layers", "timm.layers.activations_me", "torchvision.ops"):
        module = importlib.import_module(home)
        for cls in LAYERS[home]:
            given = next(values for pattern, values in POSITIONAL if re.match(pattern, cls))
            for number, case in enumerate([{}, *CASES.get(f"{home}.{cls}", [])]):
                if "size" in case:  # given by name here
                    given = ()
                found[f"{home}.{cls}.{number}"] = getattr(module, cls)(*given, **case)
    return found


def test_every_layer_class(tmp_path):
    """One file with all of them: class, settings, tensors and parts come back."""
    layers = {name.replace(".", "_"): module for name, module in constructed().items()}
    assert len({type(m) for m in layers.values()}) == sum(map(len, LAYERS.values())) - 5  # ours, and a part of one
    graph = fx.Graph()
    x = graph.placeholder("x")
    for name in layers:
        graph.call_module(name, (x,))
    graph.output(x)
    gm = hand_made(layers, graph)
    state = torch.random.get_rng_state()
    loaded = again(gm, tmp_path)
    assert torch.equal(torch.random.get_rng_state(), state), "constructors drew random numbers"
    assert_same(gm, loaded)
    assert repr(gm) == repr(loaded)
    x = torch.randn(2, 5, 4)
    for name in ("torch_nn_LSTM_1", "torch_nn_GRU_0", "torch_nn_RNN_0"):
        assert torch.equal(gm.get_submodule(name)(x)[0], loaded.get_submodule(name)(x)[0])
    attend = [m.get_submodule("torch_nn_MultiheadAttention_0").eval()(x, x, x)[0] for m in (gm, loaded)]
    assert torch.equal(*attend)


class Signature(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(4, 4)

    def forward(self, x, pair, *, scale):
        return {"out": self.fc(x) * scale["s"], "rest": [pair[0], (pair[1], None)]}


def test_exported_programs(tmp_path):
    arguments, keywords = (torch.randn(2, 4), [torch.ones(2), torch.zeros(2)]), {"scale": {"s": torch.tensor(3.0)}}
    exported = torch.export.export(Signature(), arguments, keywords).module()
    loaded = again(import_model(exported, (*arguments, *keywords.values())).gm, tmp_path)
    ours, theirs = loaded(*arguments, **keywords), exported(*arguments, **keywords)
    assert torch.equal(ours["out"], theirs["out"]) and ours["rest"][1][1] is None and type(ours["rest"]) is list
    with pytest.raises(InputError, match=r"input x .*batch 2"):
        loaded(torch.randn(3, 4), *arguments[1:], **keywords)
    x = images(2)
    gm = transform(torch.export.export(tiny_vit(), (x,)).module(), x, Config(tome_r=1))
    assert torch.equal(again(gm, tmp_path)(x), gm(x))


class Arguments(nn.Module):
    def forward(self, x, scale=2.0, *rest, **more):
        y = x[None, ..., :2, 0:1:1].to(torch.float64) * float("inf") + x.new_full((1,), float("nan"), device="cpu")
        z = torch.zeros(x.shape[-1], dtype=torch.int32).contiguous(memory_format=torch.contiguous_format)
        return {"y": y, "z": (z, [True, None, -0.0, 1e-300, "a'\"\\\n"], torch.Size([2]), scale)}


def test_every_kind_of_argument(tmp_path):
    root = Arguments()
    gm = IRModule(root, fx.Tracer().trace(root))
    loaded = again(gm, tmp_path)
    assert same_graph(gm, loaded)
    x = torch.ones(1, 3, 3)
    ours, theirs = loaded(x), gm(x)
    assert torch.equal(ours["y"].isnan(), theirs["y"].isnan()) and ours["z"][0].dtype == torch.int32
    assert ours["z"][1:] == theirs["z"][1:] and type(ours["z"][2]) is type(theirs["z"][2])


class Normalised(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc, self.head = nn.Linear(16, 16), nn.Linear(16, 8)

    def forward(self, x):
        return F.normalize(self.head(self.fc(x).relu()), dim=-1)


def test_an_output_that_is_not_given(tmp_path):
    """The trace records every argument of F.normalize: among them ``out=None``."""
    gm = transform(Normalised(), torch.randn(2, 16), Config(pattern="2:4"))
    assert any("out" in node.kwargs for node in gm.graph.nodes)
    x = torch.randn(3, 16)
    assert torch.equal(again(gm, tmp_path)(x), gm(x))


class Positions(nn.Module):
    """Reads features at positions, as DINOv3 and CLIP's text tower do."""

    def __init__(self):
        super().__init__()
        self.fc, self.head = nn.Linear(16, 16), nn.Linear(16, 8)

    def forward(self, x):
        rows, columns = torch.meshgrid(torch.linspace(-1, 1, 4), torch.linspace(-1, 1, 4), indexing="ij")
        grid = torch.stack([columns, rows], -1).expand(len(x), 4, 4, 2)
        x = F.grid_sample(self.fc(x).mT.unflatten(-1, (4, 4)), grid, align_corners=True).flatten(2).mT
        return self.head(x[torch.arange(len(x)), x.sum(-1).argmax(-1)])


def test_exported_indexing(tmp_path):
    x = torch.randn(2, 16, 16)
    exported = torch.export.export(Positions(), (x,)).module(check_guards=False)
    gm = transform(exported, x, Config(pattern="2:4"))
    called = {str(node.target) for node in gm.graph.nodes}
    assert {"aten.index.Tensor", "aten.meshgrid.indexing", "aten.grid_sampler.default"} <= called
    assert torch.equal(again(gm, tmp_path)(x), gm(x))


class Best(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc, self.head = nn.Linear(16, 16), nn.Linear(16, 8)

    def forward(self, x):
        best = self.head(self.fc(x).relu()).topk(3)
        return best.indices, torch.sort(best.values, -1, descending=False).values


def test_results_that_are_read_by_name(tmp_path):
    gm = transform(Best(), torch.randn(2, 16), Config(pattern="2:4"))
    x = torch.randn(3, 16)
    for ours, theirs in zip(again(gm, tmp_path)(x), gm(x), strict=True):
        assert torch.equal(ours, theirs)
