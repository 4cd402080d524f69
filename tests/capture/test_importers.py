"""Import: train() and eval() as in the original, the original untouched, and clear refusals."""

import copy

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import fx, nn

from mpcompile import Config, MPCompileError, transform
from mpcompile.errors import GraphError, InputError, TraceError
from mpcompile.layers import ByMode
from tests.support.helpers import convolutional, images, mlp, relative, tiny_vit

DENSE = Config(pattern="dense", skip_dead_tokens=False)  # the same operations: results are equal bit for bit


@pytest.mark.parametrize("name", ["resnet18", "convnextv2_atto", "mobilenetv3_small_050"])
def test_cnn_is_bit_identical_in_both_modes(name):
    model, x = convolutional(name), images(4, 64)
    gm = transform(model, x, DENSE)
    assert torch.equal(gm(x), model(x))
    model.train(), gm.train()
    torch.manual_seed(0)
    theirs = model(x)
    torch.manual_seed(0)
    assert torch.equal(gm(x), theirs)
    moved = 0
    for key, value in model.state_dict().items():
        assert torch.equal(gm.state_dict()[key], value), key
        moved += key.endswith("running_mean") and bool(value.abs().sum() > 0)
    assert moved or name == "convnextv2_atto"


def test_batch_norm_statistics_move_in_train_and_not_in_eval():
    model, x = convolutional("resnet18"), images(4, 64)
    gm = transform(model, x, Config(score="magnitude"))
    before = {k: v.clone() for k, v in gm.state_dict().items() if k.endswith("running_mean")}
    gm(x)
    assert all(torch.equal(gm.state_dict()[k], v) for k, v in before.items())
    gm.train()(x)
    assert len(before) == 20
    assert not any(torch.equal(gm.state_dict()[k], v) for k, v in before.items())


def test_vit_with_dropout_everywhere_follows_the_mode():
    kwargs = {"attn_drop_rate": 0.3, "proj_drop_rate": 0.2, "drop_path_rate": 0.4, "drop_rate": 0.1}
    model, x = tiny_vit(**kwargs), images()
    gm = transform(model, x, DENSE)
    assert any(isinstance(m, ByMode) for m in gm.modules())  # attention's dropout_p
    assert torch.equal(gm(x), model(x)) and torch.equal(gm(x), gm(x))
    model.train(), gm.train()
    torch.manual_seed(5)
    theirs = model(x)
    torch.manual_seed(5)
    assert torch.equal(gm(x), theirs)
    assert not torch.equal(gm(x), gm(x))


def test_transform_while_training_keeps_the_mode_and_may_switch():
    model, x = tiny_vit(attn_drop_rate=0.3).train(), images()
    gm = transform(model, x, DENSE)
    assert gm.training and gm.get_submodule("pos_drop").training
    assert torch.equal(gm.eval()(x), model.eval()(x))


def test_modules_frozen_in_eval_stay_so():
    model, x = convolutional("resnet18").train(), images(4, 64)
    model.layer1.eval()
    gm = transform(model, x, DENSE)
    assert not gm.get_submodule("layer1.0.bn1").training and gm.get_submodule("layer2.0.bn1").training
    assert not model.layer1[0].bn1.training and model.layer2[0].bn1.training


class TwoPaths(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc, self.extra, self.head = nn.Linear(16, 16), nn.Linear(16, 4), nn.Linear(16, 4)

    def forward(self, x):
        x = self.fc(x).relu()
        return (self.head(x), self.extra(x)) if self.training else self.head(x)


def test_paths_that_differ_lock_the_mode():
    model, x = TwoPaths().eval(), torch.randn(2, 16)
    gm = transform(model, x)
    assert torch.equal(transform(model, x, DENSE)(x), model(x))
    assert any("take different paths" in note for note in gm.plan.notes)
    with pytest.raises(GraphError, match="different paths in train"):
        gm.train()
    gm.eval()


def test_functional_dropout_follows_the_mode():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc, self.head = nn.Linear(16, 16), nn.Linear(16, 4)

        def forward(self, x):
            return self.head(F.dropout(self.fc(x), 0.5, training=self.training))

    model, x = Net(), torch.randn(64, 16)
    gm = transform(model, x, DENSE)
    torch.manual_seed(0)
    theirs = model(x)
    torch.manual_seed(0)
    assert torch.equal(gm(x), theirs)
    assert torch.equal(gm.eval()(x), model.eval()(x))


def test_the_model_is_not_changed_and_names_stay():
    model, x = tiny_vit(), images()
    before = copy.deepcopy(model.state_dict())
    gm = transform(model, x, Config(tome_r=3, score="magnitude"))
    with torch.no_grad():
        for parameter in gm.parameters():
            parameter.zero_()
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert dict(gm.named_parameters()).keys() == dict(model.named_parameters()).keys()


def test_dense_state_dict_loads_and_keeps_the_masks():
    model, x = tiny_vit(), images()
    gm = transform(model, x, Config(score="magnitude"))
    expected = gm(x)
    gm.load_state_dict(model.state_dict())  # strict
    assert torch.equal(gm(x), expected)


def test_deep_copies_are_independent_and_carry_the_plan():
    gm = transform(tiny_vit(), images(), Config(tome_r=3, score="magnitude"))
    twin = copy.deepcopy(gm)
    assert torch.equal(twin(images()), gm(images()))
    assert twin.plan == gm.plan and twin.plan is not gm.plan
    with torch.no_grad():
        twin.get_submodule("head").weight.zero_()
    assert bool(gm.get_submodule("head").weight.any())


def test_gradients_of_masked_weights_are_zero():
    for model, x in ((tiny_vit(), images()), (convolutional("resnet18"), images(2, 64))):
        gm = transform(model, x, Config(score="magnitude")).train()
        gm(x).square().mean().backward()
        for name in gm.plan.masked:
            layer = gm.get_submodule(name)
            assert bool((layer.weight.grad[~layer.mask] == 0).all())
            assert bool((layer.weight.grad[layer.mask] != 0).any())


@pytest.mark.parametrize("functional", [False, True])
def test_functional_forms_are_masked_like_modules(functional):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.fc, self.head = nn.Conv2d(3, 8, 1), nn.Linear(8, 8), nn.Linear(8, 2)
            self.kernel = nn.Parameter(torch.randn(8, 8, 3, 3))

        def forward(self, x):
            x = F.conv2d(self.conv(x).relu(), self.kernel, None, 1, padding=1).mean((2, 3)).relu()
            x = F.linear(x, weight=self.fc.weight, bias=self.fc.bias) if functional else self.fc(x)
            return self.head(x.relu())

    torch.manual_seed(0)
    model, x = Net(), images(2, 8)
    gm = transform(model, x)
    assert gm.plan.masked == ["kernel", "fc"]
    mask = gm.get_submodule("fc").mask
    assert bool((gm.get_submodule("fc").weight[~mask] == 0).all())
    assert bool((gm.kernel[~gm.kernel_mask] == 0).all())
    masked = copy.deepcopy(model)
    with torch.no_grad():
        masked.fc.weight.mul_(mask)
        masked.kernel.mul_(gm.kernel_mask)
    assert relative(gm(x), masked(x)) < 1e-6
    gm(x).sum().backward()
    assert bool((gm.kernel.grad[~gm.kernel_mask] == 0).all())


def test_graphs_with_shapes_need_no_inputs():
    x = torch.randn(3, 32)
    exported = torch.export.export(mlp(), (x,)).module(check_guards=False)
    gm = transform(exported)
    assert gm.plan.masked == ["0", "2"]
    assert relative(gm(x), transform(mlp(), x)(x)) < 1e-6
    with pytest.raises(InputError, match="carries no shapes"):
        transform(fx.symbolic_trace(mlp()))
    assert transform(fx.symbolic_trace(mlp()), x).plan.masked == ["0", "2"]


def test_user_graph_is_not_changed():
    traced, x = fx.symbolic_trace(mlp()), torch.randn(3, 32)
    code, expected = traced.code, traced(x)
    gm = transform(traced, x)
    with torch.no_grad():
        gm.get_submodule("0").weight.zero_()
    assert traced.code == code and torch.equal(traced(x), expected)


def test_dynamo_graph_without_its_inputs_is_refused():
    def backend(graph, inputs):
        with pytest.raises(InputError, match="takes its weights as inputs"):
            transform(graph)
        gm = transform(graph, inputs)
        assert gm.plan.masked == ["0", "2"]
        return gm

    model, x = mlp(), torch.randn(3, 32)
    y = torch.compile(model, backend=backend)(x)
    assert relative(y, transform(model, x)(x)) < 1e-6


def test_keyword_inputs():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc, self.head = nn.Linear(16, 16), nn.Linear(16, 2)

        def forward(self, a, b=None, scale=2.0):
            return self.head(self.fc(a if b is None else a + b) * scale)

    a, b = torch.randn(2, 16), torch.randn(2, 16)
    model = Net()
    assert torch.equal(transform(model, {"a": a, "b": b}, DENSE)(a, b), model(a, b))
    gm = transform(model, {"a": a}, DENSE)
    assert torch.equal(gm(a), model(a))
    assert any("scale=2.0" in note for note in gm.plan.notes)
    with pytest.raises(InputError, match="do not fit forward"):
        transform(model, {"c": a}, DENSE)


class Branching(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(4, 4)

    def forward(self, x):
        return self.fc(x) if x.sum() > 0 else x


@pytest.mark.parametrize(
    ("model", "inputs", "message"),
    [
        (Branching(), torch.randn(2, 4), "cannot be traced"),
        (nn.Sequential(), torch.randn(2, 4), "no parameters"),
        (nn.ReLU(), torch.randn(2, 4), "no parameters"),
        (nn.Sequential(nn.LazyLinear(4)), torch.randn(2, 4), "lazy"),
        (nn.Linear(4, 4), None, "shapes in Linear are not known"),
        (nn.Linear(4, 4), torch.randn(2, 5), "shapes cannot be propagated"),
        (nn.Linear(4, 4), (torch.randn(2, 4), torch.randn(2, 4)), "example"),
        (nn.Linear(4, 4), "image", "wrong type"),
        ("model", torch.randn(2, 4), "not a model"),
    ],
)
def test_refusals(model, inputs, message):
    with pytest.raises(MPCompileError, match=message):
        transform(model, inputs, DENSE)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_non_finite_weights_are_refused_by_name(value):
    model = tiny_vit()
    with torch.no_grad():
        model.blocks[1].mlp.fc1.weight[0, :3] = value
    with pytest.raises(InputError, match=r"blocks.1.mlp.fc1.weight: the weight is not finite.*3 of 4096"):
        transform(model, images())


class Bounded(nn.Module):
    def __init__(self, upper):
        super().__init__()
        self.layer = nn.Linear(4, 4)
        self.register_buffer("upper", torch.tensor(upper))

    def forward(self, x):
        return torch.clamp(self.layer(x), max=self.upper)


def test_a_bound_may_be_infinite_but_not_nan():
    model, x = Bounded(float("inf")), torch.randn(2, 4)
    assert torch.equal(transform(model, x, DENSE)(x), model(x))
    with pytest.raises(InputError, match=r"^upper: the weight is not finite"):
        transform(Bounded(float("nan")), x, DENSE)


def test_config_of_the_wrong_type():
    with pytest.raises(MPCompileError, match="config has the wrong type"):
        transform(mlp(), torch.randn(2, 32), {"pattern": "2:4"})


def test_trace_error_names_the_way_out():
    with pytest.raises(TraceError, match="backend='mpsparse'"):
        transform(Branching(), torch.randn(2, 4))


def test_relative_position_and_windows_import_too():
    model = timm.create_model("beit_base_patch16_224", depth=2).eval()
    x = images(1, 224)
    gm = transform(model, x, Config(score="magnitude"))
    assert gm.plan.layers["blocks.0.attn.qkv"].pattern == "2:4"  # its bias is computed, its weight is used by F.linear


def test_layers_in_a_row_of_every_form():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c, self.head = (nn.Linear(8, 8) for _ in range(4))

        def forward(self, x):
            x = F.linear(F.linear(x, self.a.weight), self.b.weight, self.b.bias)
            return self.head(self.c(x))

    x = torch.randn(2, 8)
    gm = transform(Net(), x)
    assert gm.plan.masked == ["a", "b", "c"]
    gm.graph.lint()
    a, b, c, head = (getattr(gm, name) for name in ("a", "b", "c", "head"))
    hidden = F.linear(F.linear(x, a.weight * a.mask), b.weight * b.mask, b.bias)
    assert relative(gm(x), head(F.linear(hidden, c.weight * c.mask, c.bias))) < 1e-6


def test_attention_pooling_imports():
    model = tiny_vit(global_pool="map", class_token=False)
    assert torch.equal(transform(model, images(), DENSE)(images()), model(images()))
    assert transform(model, images(), Config(score="magnitude")).plan.layers["blocks.0.mlp.fc1"].pattern == "2:4"


def test_a_submodule_that_would_hide_the_plan_is_refused():
    model = mlp()
    model.plan = nn.Linear(2, 2)
    with pytest.raises(TraceError, match="attribute 'plan'"):
        transform(model, torch.randn(2, 32))
