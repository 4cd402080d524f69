"""Infinite values that are masks, and those that are broken weights."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mpcompile import Config, transform
from mpcompile.capture.importers import import_model
from mpcompile.errors import InputError

X = torch.randn(2, 16, 64, generator=torch.Generator().manual_seed(0))
HIDDEN = torch.full((16, 16), float("-inf")).triu(1)


class Text(nn.Module):
    """Causal attention, whose mask is held in one of several ways."""

    def __init__(self, held: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.head, self.norm = nn.Linear(64, 64), nn.Linear(64, 64), nn.Linear(64, 8), nn.LayerNorm(64)
        if held == "attribute":
            self.hidden = HIDDEN
        elif held == "parameter":
            self.hidden = nn.Parameter(HIDDEN, requires_grad=False)
        else:
            self.register_buffer("hidden", HIDDEN, persistent=held == "persistent")

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(self.a(x))
        return self.head((y @ y.mT + self.hidden).softmax(-1) @ self.b(x))


def dynamo(model: nn.Module) -> None:
    """Import a model as dynamo gives it to a backend; an error of the import is raised as it is."""
    errors: list[Exception] = []

    def backend(gm: Any, inputs: Any) -> Any:
        try:
            import_model(gm, inputs, share=True)
        except InputError as error:
            errors.append(error)
        return gm.forward

    torch._dynamo.reset()
    torch.compile(model, backend=backend)(X)
    if errors:
        raise errors[0]


@pytest.mark.parametrize("held", ["transient", "persistent", "attribute", "parameter"])
def test_masks_are_no_broken_weights(held: str) -> None:
    model = Text(held).eval()
    for graph in (model, torch.export.export(model, (X,)).module()):
        gm = transform(graph, X, Config(score="magnitude"))
        assert gm.plan.masked == ["a", "b"] and bool(gm(X).isfinite().all())
    dynamo(model)


@pytest.mark.parametrize(
    ("name", "value"), [("a.weight", "nan"), ("a.bias", "inf"), ("norm.weight", "inf"), ("norm.bias", "nan")]
)
def test_broken_weights_are_named(name: str, value: str) -> None:
    model = Text("transient").eval()
    with torch.no_grad():
        model.get_parameter(name).flatten()[0] = float(value)
    for graph in (model, torch.export.export(model, (X,)).module()):
        with pytest.raises(InputError, match=f"{name}: the weight is not finite"):
            import_model(graph, X)
    with pytest.raises(InputError, match=f"{name}: the weight is not finite"):
        dynamo(model)
