"""Models in wrappers, other forms of a model, inputs by name: supported, or refused with a remedy."""

import functools
import warnings
from collections import OrderedDict

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.optim.swa_utils import AveragedModel

from mpcompile import Config, MPCompileError, lower, transform
from mpcompile.errors import InputError, TraceError
from tests.support.helpers import mlp, relative

HALF, DENSE = Config(pattern="2:4"), Config(pattern="dense")
X = torch.randn(4, 32)


def around(part):
    return nn.Sequential(OrderedDict(body=part, tail=nn.Linear(5, 5))).eval()


def quantised():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.ao.quantization.quantize_dynamic(around(mlp()), {"tail"})


def scripted():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.jit.script(mlp())


def traced():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.jit.trace(mlp(), X)


def on_meta():
    with torch.device("meta"):
        return mlp()


def sparse():
    model = nn.Sequential(nn.Linear(32, 8))
    model[0].weight = nn.Parameter(model[0].weight.detach().to_sparse())
    return model


FORMS = [
    (traced, "torch.nn.Module that model was"),
    (scripted, "torch.nn.Module that model was"),
    (lambda: around(traced()), r"^body: .*model\.body was"),
    (lambda: nn.DataParallel(mlp()), r"pass model\.module"),
    (lambda: around(nn.DataParallel(mlp())), r"^body: .*model\.body\.module"),
    (lambda: torch.compile(mlp()), r"pass model\._orig_mod"),
    (lambda: around(torch.compile(mlp())), r"^body: .*model\.body\._orig_mod"),
    (quantised, "^tail: .*quantised.*transform the model first"),
    (on_meta, r"^0.weight: .*'meta'.*load_state_dict"),
    (lambda: mlp, "function.*torch.nn.Module that holds"),
    (lambda: functools.partial(mlp()), "partial.*torch.nn.Module that holds"),
    (lambda: torch.nn.Linear, r"make one first: Linear\(\.\.\.\)"),
    (lambda: mlp().state_dict(), "load them into the model first"),
    (lambda: torch.export.export(mlp(), (X,)), r"program\.module\(\)"),
    (lambda: None, "not a model"),
    (sparse, "^0.weight: .*not an ordinary tensor"),
]


@pytest.mark.parametrize(("make", "cure"), FORMS)
def test_other_forms_are_refused_with_the_cure(make, cure):
    model = make()
    with pytest.raises(MPCompileError, match=f"(?i){cure}") as raised:
        transform(model, X, HALF)
    assert str(raised.value).isprintable() and len(str(raised.value)) < 600


def test_averaged_models_are_served():
    model = AveragedModel(mlp()).eval()
    gm = transform(model, X, DENSE)
    assert torch.equal(gm(X), model(X))
    assert transform(model, X, HALF).plan.masked == ["module.0", "module.2"]


class Compiled(nn.Module):
    """Parts of a model under torch.compile, in ways that keep the module itself reachable."""

    def __init__(self, how):
        super().__init__()
        self.body, self.tail = mlp(), nn.Linear(5, 5)
        if how == "in place":
            self.body.compile(backend="eager")
        elif how == "forward":
            self.body.forward = torch.compile(self.body.forward, backend="eager")
        self.act = torch.compile(F.relu, backend="eager") if how == "function" else F.relu

    def forward(self, x):
        return self.tail(self.act(self.body(x)))


@pytest.mark.parametrize("how", ["in place", "forward", "function"])
def test_compiled_parts_are_traced_as_written(how):
    model = Compiled(how).eval()
    gm = transform(model, X, HALF)
    assert gm.plan.masked == ["body.0", "body.2", "body.4"]
    assert relative(transform(model, X, DENSE)(X), model(X)) < 1e-6


class Complex(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Linear(32, 32)
        self.mix = nn.Linear(32, 32, dtype=torch.complex64)
        self.conv = nn.Conv2d(4, 4, 1, dtype=torch.complex64)
        self.free = nn.Parameter(torch.randn(32, 32, dtype=torch.complex64))
        self.head = nn.Linear(32, 8)

    def forward(self, x):
        h = self.mix(self.first(x).to(torch.complex64))
        h = self.conv(h.reshape(-1, 4, 8, 1)).reshape(-1, 32)
        return self.head(F.linear(h, self.free).real)


def test_complex_weights_stay_dense_and_listed():
    model = Complex().eval()
    gm = transform(model, X, HALF)
    assert gm.plan.masked == ["first"]
    for name in ("mix", "conv", "free"):
        assert "complex64" in gm.plan.layers[name].reason
    assert relative(lower(gm, X)(X), gm(X)) < 1e-4


class ByName(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = mlp()

    def forward(self, batch):
        return self.body(batch["image"]) + batch["shift"]


BATCH = {"image": torch.randn(16, 32), "shift": torch.randn(16, 5)}


@pytest.mark.parametrize(("score", "calibrate"), [("covariance", "pruned_to_dense"), ("ser", "dense")])
def test_a_forward_that_takes_a_dict_is_calibrated(score, calibrate):
    config = Config(pattern="2:4", score=score, permute=False, exclude=["body.4"])
    model, wrapped = ByName().eval(), nn.Sequential(OrderedDict(body=mlp())).eval()
    wrapped.body.load_state_dict(model.body.state_dict())
    for batches in ([(BATCH,)], [BATCH], [(BATCH, torch.zeros(16))], [{**BATCH, "label": torch.zeros(16)}]):
        gm = transform(model, (BATCH,), config, calibration=batches, calibrate=calibrate)
        assert "magnitude" not in " ".join(gm.plan.notes)
        assert {gm.plan.layers[name].notes["mask"]["score"] for name in gm.plan.masked} == {score}
    if score == "ser":  # its loss sees the shift
        return
    plain = transform(wrapped, BATCH["image"], config, calibration=[BATCH["image"]], calibrate=calibrate)
    assert all(torch.equal(gm.get_buffer(f"{n}.mask"), plain.get_buffer(f"{n}.mask")) for n in plain.plan.masked)
    assert torch.isfinite(gm(BATCH)).all()


class ByPair(ByName):
    def forward(self, pair):
        image, shift = pair[0], pair[1]
        return self.body(image) + shift


def test_a_forward_that_takes_a_pair_is_calibrated():
    pair = (BATCH["image"], BATCH["shift"])
    gm = transform(ByPair().eval(), (pair,), HALF, calibration=[(pair,)])
    assert "magnitude" not in " ".join(gm.plan.notes) and gm(pair).shape == (16, 5)


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        ({"image": BATCH["image"]}, "has a different structure from example_inputs.*image, shift"),
        ({"image": BATCH["image"][:, :8], "shift": BATCH["shift"]}, "wrong shape"),
        ({"image": BATCH["image"] / 0, "shift": BATCH["shift"]}, "not finite"),
        (BATCH["image"], "has a different structure"),
    ],
)
def test_batches_unlike_the_example_are_refused(batch, message):
    with pytest.raises(InputError, match=message):
        transform(ByName().eval(), (BATCH,), HALF, calibration=[(batch,)])


def test_a_dict_whose_keys_are_no_parameters_is_the_input():
    model = ByName().eval()
    gm = transform(model, BATCH, DENSE)
    assert torch.equal(gm(BATCH), model(BATCH))


def test_a_dict_that_forward_cannot_work_with():
    with pytest.raises(InputError, match=r"takes 'input', not y, z.*put it into a tuple"):
        transform(mlp().eval(), {"y": torch.randn(2, 32), "z": torch.randn(2, 32)}, HALF)


class Gathering(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = mlp()

    def forward(self, x, *more, gain=1.0, **rest):
        for other in (*more, *rest.values()):
            x = x + other
        return self.body(x) * gain


def test_inputs_of_any_number():
    model = Gathering().eval()
    assert torch.equal(transform(model, (X, X, X), DENSE)(X, X, X), model(X, X, X))
    assert torch.equal(transform(model, {"x": X, "y": X}, DENSE)(X, X), model(X, y=X))
    assert torch.equal(transform(model, X, DENSE)(X), model(X))


def test_lazy_parameters_are_named():
    with pytest.raises(TraceError, match=r"^1.weight: the model has lazy"):
        transform(nn.Sequential(nn.Linear(32, 32), nn.LazyLinear(4)), X, DENSE)
