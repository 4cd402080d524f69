"""Functions that ``torch.fx.wrap`` keeps whole, and the weights that they take."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models import SwinTransformer

import mpcompile
from mpcompile import Config, transform
from mpcompile.capture import importers
from tests.support.helpers import images

X = torch.randn(4, 32, generator=torch.Generator().manual_seed(0))


@torch.fx.wrap
def scaled(x: Tensor, weight: Tensor, bias: Tensor, options: dict[str, float]) -> Tensor:
    return F.linear(x, weight, bias).relu() * options["scale"]


@torch.fx.wrap
def by_width(x: Tensor, weight: Tensor, bias: Tensor, options: dict[str, float]) -> Tensor:
    """A branch that depends on a shape, which symbolic tracing cannot follow."""
    y = F.linear(x, weight, bias)
    return y * options["scale"] if x.shape[-1] > 16 else y


@torch.fx.wrap
def pair(x: Tensor, weight: Tensor, bias: Tensor, options: dict[str, float]) -> tuple[Tensor, float]:
    return F.linear(x, weight, bias), options["scale"]


@torch.fx.wrap
def shifted(x: Tensor) -> Tensor:
    """A function without weights stays as it is."""
    return x + 1 if x.shape[0] else x


class Wrapped(nn.Module):
    def __init__(self, function: Callable[..., Tensor]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.head, self.function = nn.Linear(32, 32), nn.Linear(32, 32), nn.Linear(32, 8), [function]

    def forward(self, x: Tensor) -> Tensor:
        y = _FUNCTIONS[self.function[0].__name__](self, self.b(x))
        return self.head(y)


# fx.wrap patches the globals of this file, so that the functions have to be called by their names.
_FUNCTIONS: dict[str, Callable[[Wrapped, Tensor], Tensor]] = {
    "scaled": lambda m, x: scaled(x, m.a.weight, m.a.bias, {"scale": 2.0}),
    "by_width": lambda m, x: by_width(x, m.a.weight, m.a.bias, {"scale": 2.0}),
    "pair": lambda m, x: pair(x, m.a.weight, m.a.bias, {"scale": 2.0})[0],
}


@pytest.mark.parametrize("function", [scaled, by_width, pair])
def test_weights_are_masked(function: Callable[..., Tensor]) -> None:
    model = Wrapped(function).eval()
    gm = transform(model, X, Config(score="magnitude"))
    assert sorted(gm.plan.masked) == ["a", "b"]
    assert torch.equal(transform(model, X, Config(pattern="dense"))(X), model(X))


def test_a_traced_function_leaves_the_batch_free() -> None:
    gm = transform(Wrapped(scaled).eval(), X, Config(pattern="dense"))
    assert gm(X[:1]).shape == (1, 8)
    assert gm.plan.captured == "symbolic tracing"


def test_a_function_that_no_capture_can_enter_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importers, "_CAPTURES", {})
    model = Wrapped(by_width).eval()
    gm = transform(model, X, Config(score="magnitude"))
    assert gm.plan.masked == ["b"]
    assert gm.plan.layers["a"].reason == "used by by_width, which the graph holds as a whole"
    assert torch.equal(transform(model, X, Config(pattern="dense"))(X), model(X))


class Decoded(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.head = nn.Linear(32, 32), nn.Linear(32, 8)

    def forward(self, x: Tensor) -> Tensor:
        return shifted(self.head(self.a(x).relu()))


def test_a_function_without_weights_stays() -> None:
    gm = transform(Decoded().eval(), X, Config(score="magnitude"))
    assert [n.target for n in gm.graph.nodes if n.target is shifted]
    assert gm.plan.masked == ["a"] and gm.plan.layers["head"].reason == "head"


def test_windows_of_swin(tmp_path: Path) -> None:
    """The attention of torchvision's Swin: masked, lowered and saved."""
    options = {"patch_size": [4, 4], "embed_dim": 32, "depths": [2], "num_heads": [2], "window_size": [4, 4]}
    model, x = SwinTransformer(**options, num_classes=10).eval(), images(2, 32)
    gm = transform(model, x, Config(score="magnitude"))
    layers = {name for name, m in model.named_modules() if isinstance(m, (nn.Linear, nn.Conv2d))}
    assert layers == set(gm.plan.layers)
    assert layers - set(gm.plan.masked) == {"features.0.0", "head"}
    mpcompile.save(gm, tmp_path / "swin.mpc")
    assert torch.equal(mpcompile.load(tmp_path / "swin.mpc")(x), gm(x))
    lowered = mpcompile.lower(gm, x, Config(engine="reference"))
    assert torch.allclose(lowered(x), gm(x), atol=1e-5)
