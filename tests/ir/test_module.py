"""The result of transform is an ordinary module: state dicts, copies, pickle, averages, names of its parts."""

import copy
import io
import pickle
import subprocess
import sys

import pytest
import timm
import torch
import torch.nn.functional as F
from timm.utils import ModelEmaV2, ModelEmaV3
from torch import fx, nn
from torch.nn.utils import parametrizations, prune
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from mpcompile import Config, load, lower, save, transform
from mpcompile.capture.importers import import_model
from mpcompile.errors import MPCompileError, TraceError
from mpcompile.export import dense_state
from tests.support.helpers import convolutional, images, mlp, relative, tiny_vit

HALF = Config(pattern="2:4")
X = torch.randn(3, 32)


def swin():
    return timm.create_model("swin_tiny_patch4_window7_224", img_size=64, depths=(1, 1, 1, 1), num_classes=4).eval()


class Shared(nn.Module):
    """One layer and one block under two names, a head that forward does not use, buffers of both kinds."""

    def __init__(self):
        super().__init__()
        self.a = nn.Linear(32, 32)
        self.b = self.a
        self.block = nn.Sequential(nn.Linear(32, 32), nn.ReLU())
        self.again = self.block
        self.aux, self.extra = nn.ModuleDict({"head": nn.Linear(32, 4)}), nn.Parameter(torch.randn(3))
        self.c = nn.Linear(32, 8)
        self.register_buffer("shift", torch.randn(32))
        self.register_buffer("unused", torch.randn(2))
        self.register_buffer("hidden", torch.randn(32), persistent=False)
        self.plain = torch.randn(32)

    def forward(self, x):
        x = self.again(self.block(self.b(torch.relu(self.a(x))))) + self.shift + self.hidden + self.plain
        return self.c(x + torch.tensor([0.5]))


class Functional(nn.Module):
    """Weights used by functions, tied, beside a buffer with the name of one of ours."""

    def __init__(self):
        super().__init__()
        self.first, self.head = nn.Linear(32, 32), nn.Linear(32, 8)
        self.weight = nn.Parameter(torch.randn(32, 32))
        self.tied = self.weight

    def forward(self, x):
        x = F.linear(F.linear(x, self.weight).relu(), self.tied).relu()
        return self.head(F.linear(x, self.first.weight, self.first.bias).relu())


class Parametrized(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.Linear(32, 64), parametrizations.weight_norm(nn.Linear(64, 64)), nn.Linear(64, 8)

    def forward(self, x):
        return self.c(self.b(self.a(x).relu()).relu())


MODELS = [
    (swin, images(1, 64)),
    (Shared, X),
    (Functional, X),
    (Parametrized, X),
    (tiny_vit, images()),
    (lambda: convolutional("resnet18"), images(2, 64)),
    (lambda: AveragedModel(mlp()), X),
]


@pytest.mark.parametrize(("make", "x"), MODELS)
def test_state_dicts_have_the_names_of_the_model(make, x, tmp_path):
    model = make().eval()
    gm = transform(model, x, HALF)
    state = dense_state(gm)
    assert state.keys() == model.state_dict().keys()
    twin = copy.deepcopy(model)
    twin.load_state_dict(state)
    with torch.no_grad():
        assert relative(twin(x), gm(x)) < 1e-5
    gm.load_state_dict(model.state_dict())
    nn.ModuleDict({"net": gm}).load_state_dict({f"net.{k}": v for k, v in model.state_dict().items()})
    assert gm.state_dict().keys() >= model.state_dict().keys()
    assert {k for k, _ in gm.named_parameters()} == {k for k, _ in model.named_parameters()}
    others = [copy.deepcopy(gm), copy.copy(gm)]
    if make is not Parametrized:  # torch does not pickle it
        others.append(pickle.loads(pickle.dumps(gm)))
    for other in others:
        assert other.state_dict().keys() == gm.state_dict().keys()
        assert dense_state(other).keys() == state.keys()
    graph = transform(fx.GraphModule(gm, copy.deepcopy(gm.graph)), x, HALF)  # as a graph of somebody's
    assert torch.equal(graph(x), gm(x))


def test_state_dicts_of_files_have_the_names_too(tmp_path):
    model = Shared().eval()
    gm = transform(model, X, HALF)
    save(gm, tmp_path / "m.mpc")
    loaded = load(tmp_path / "m.mpc")
    assert torch.equal(loaded(X), gm(X))
    model.load_state_dict(dense_state(loaded))
    lowered = lower(gm, X)
    assert relative(lowered(X), gm(X)) < 1e-4
    assert not any(name.startswith(("aux", "block")) and "weight" in name for name in lowered.state_dict())


def test_shared_layers_are_one_layer():
    gm = transform(Shared().eval(), X, HALF)
    assert gm.get_submodule("a") is gm.get_submodule("b")
    assert gm.plan.masked == ["a", "block.0"]


def whole(twin, gm, x):
    """True if a copy equals the module."""
    assert isinstance(twin, type(gm).__mro__[1]) and type(twin).__name__ == type(gm).__name__
    assert twin.plan == gm.plan and twin.locked_mode == gm.locked_mode and twin.training == gm.training
    assert [m.training for m in twin.modules()] == [m.training for m in gm.modules()]
    assert twin.code == gm.code and twin.state_dict().keys() == gm.state_dict().keys()
    flags = {k: p.requires_grad for k, p in gm.named_parameters()}
    assert flags == {k: p.requires_grad for k, p in twin.named_parameters()}
    torch.manual_seed(0)
    expected = gm(x)
    torch.manual_seed(0)
    assert torch.equal(twin(x), expected)


def through_torch(gm):
    file = io.BytesIO()
    torch.save(gm, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


COPIES = [copy.deepcopy, copy.copy, lambda gm: pickle.loads(pickle.dumps(gm)), through_torch]


@pytest.mark.parametrize("copied", COPIES)
@pytest.mark.parametrize("mode", [False, True])
def test_copies_are_whole(copied, mode):
    for model, x in ((tiny_vit(attn_drop_rate=0.3), images()), (convolutional("resnet18"), images(2, 64))):
        gm = transform(model, x, HALF).train(mode)
        gm.get_parameter(next(name for name, _ in gm.named_parameters())).requires_grad_(False)
        twin = copied(gm)
        whole(twin, gm, x)
        assert dict(twin.named_buffers()).keys() == dict(gm.named_buffers()).keys()
        if copied is not copy.copy:
            with torch.no_grad():
                next(twin.parameters()).add_(1)
            assert not torch.equal(next(twin.parameters()), next(gm.parameters()))
    lowered = lower(gm.eval(), x)
    twin = copied(lowered)
    assert torch.equal(twin(x), lowered(x)) and twin.plan == lowered.plan


def test_pickle_gives_the_same_class_and_changes_none():
    gm = transform(mlp(), X, HALF)
    code = gm.code
    other, twin = copy.deepcopy(gm), pickle.loads(pickle.dumps(gm))
    assert type(twin) is type(gm) and type(twin) is not type(other)
    lowered = lower(twin, X)
    twin.graph.output_node().args = (next(iter(twin.graph.nodes)),)
    twin.recompile()
    assert torch.equal(twin(X), X)
    assert gm.code == code and gm(X).shape == (3, 5) and type(lowered) is not type(gm)


def test_pickle_reaches_another_process(tmp_path):
    gm = transform(tiny_vit(), images(), HALF)
    (tmp_path / "gm.pkl").write_bytes(pickle.dumps((gm, images(), gm(images()).detach())))
    script = "import pickle, sys, torch; gm, x, y = pickle.load(open(sys.argv[1], 'rb')); "
    script += "assert torch.allclose(gm(x), y, atol=1e-5) and gm.plan.masked and type(gm).__name__ == sys.argv[2]"
    line = [sys.executable, "-c", script, str(tmp_path / "gm.pkl"), type(gm).__name__]
    subprocess.run(line, check=True, timeout=300)


def test_exported_programs_with_names_for_inputs_and_outputs():
    class Pair(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(32, 64), nn.Linear(64, 8)

        def forward(self, x, *, gain):
            return {"y": self.b(self.a(x["image"]).relu()) * gain}

    arguments, keywords = ({"image": X},), {"gain": torch.tensor(2.0)}
    exported = torch.export.export(Pair().eval(), arguments, keywords).module(check_guards=False)
    gm = import_model(exported, (X, keywords["gain"])).gm
    twin = pickle.loads(pickle.dumps(gm))
    assert torch.equal(twin(*arguments, **keywords)["y"], exported(*arguments, **keywords)["y"])


@pytest.mark.parametrize("buffers", [False, True])
@pytest.mark.parametrize("rule", [{}, {"multi_avg_fn": get_ema_multi_avg_fn(0.9)}])
def test_averaged_models(buffers, rule):
    gm = transform(convolutional("resnet18"), images(2, 64), HALF)
    average = AveragedModel(gm, use_buffers=buffers, **rule)
    for _ in range(3):
        with torch.no_grad():
            next(gm.parameters()).add_(0.1)
        average.update_parameters(gm)
    assert average.module.plan == gm.plan
    masks = {k: v for k, v in average.module.state_dict().items() if k.endswith("mask")}
    assert masks and all(torch.equal(v, gm.state_dict()[k]) for k, v in masks.items())
    average(images(2, 64))
    average.load_state_dict(average.state_dict())


@pytest.mark.parametrize("cls", [ModelEmaV2, ModelEmaV3])
def test_averages_of_timm(cls):
    gm = transform(convolutional("resnet18"), images(2, 64), HALF)
    ema = cls(gm, decay=0.5)
    with torch.no_grad():
        next(gm.parameters()).add_(1)
    ema.update(gm)
    assert ema.module.plan == gm.plan and not torch.equal(next(ema.module.parameters()), next(gm.parameters()))


NAMES = [
    ("block1-0", "-1", "two words"),
    ("global", "class", "None"),
    ("self", "torch", "getattr"),
    ("é", "日本", "1,5"),
    ("key", "mask", "input"),
    ("with}{brace", "#", "a;b"),
]


def named(names):
    model = nn.Sequential()
    model.add_module(names[0], nn.Linear(32, 64))
    model.add_module(names[1], nn.Sequential(nn.ReLU(), nn.Linear(64, 64)))
    model.add_module(names[2], nn.Linear(64, 8))
    return model.eval()


@pytest.mark.parametrize("names", NAMES)
def test_names_that_pytorch_allows(names, tmp_path):
    gm = transform(named(names), X, HALF).eval()
    for twin in (copy.deepcopy(gm), copy.copy(gm), pickle.loads(pickle.dumps(gm))):
        assert torch.equal(twin(X), gm(X))
    lowered = lower(gm, X)
    for made in (gm, lowered):
        save(made, tmp_path / "m.mpc")
        assert torch.equal(load(tmp_path / "m.mpc")(X), made(X))
    assert relative(lowered(X), gm(X)) < 1e-5


@pytest.mark.parametrize("name", ['a"b', "a'b", "a\\b", "a\nb", "\x1b[31m"])
def test_names_that_could_end_a_text_are_refused_by_files_alone(name, tmp_path):
    gm = transform(named((name, "b", "c")), X, HALF)
    assert gm(X).shape == (3, 8)
    with pytest.raises(MPCompileError, match="cannot name a layer") as raised:
        save(gm, tmp_path / "m.mpc")
    assert str(raised.value).isprintable()


@pytest.mark.parametrize("name", ["graph", "packed", "code", "plan", "meta", "_folded", "locked_mode", "recompile"])
def test_names_that_the_result_needs(name):
    class Colliding(nn.Module):
        def __init__(self):
            super().__init__()
            setattr(self, name, nn.Linear(32, 64))
            self.b = nn.Linear(64, 8)

        def forward(self, x):
            return self.b(torch.relu(self._modules[name](x)))

    with pytest.raises(TraceError, match=f"attribute '{name}'"):
        transform(Colliding(), X, HALF)


def test_a_copy_after_a_call_that_computed_a_weight():
    model = nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 8)).eval()
    prune.l1_unstructured(model[2], "weight", 0.3)
    x = torch.randn(2, 32)
    gm = transform(model, x, Config(pattern="2:4"))
    gm(x).sum().backward()
    assert torch.equal(copy.deepcopy(gm)(x), gm(x))
