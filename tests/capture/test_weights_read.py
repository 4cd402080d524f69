"""Forwards that read the form of a weight, or make a tensor like it, beside computing with it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import mpcompile
from mpcompile import Config, lower, transform

X = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))

READS: dict[str, Callable[[nn.Module, Tensor], Tensor]] = {
    "dtype": lambda m, x: x.to(m.a.weight.dtype),
    "dtype of a bias": lambda m, x: x.to(m.b.bias.dtype),
    "device": lambda m, x: x.to(m.a.weight.device),
    "first parameter": lambda m, x: x.to(next(m.parameters()).dtype),
    "sizes": lambda m, x: x.reshape(x.shape[0], -1, m.b.weight.shape[1]) * m.b.weight.size(0),
    "type of the weight": lambda m, x: x.type_as(m.b.weight),
    "tensor like it": lambda m, x: x + m.b.weight.new_zeros(64),
}


class Reading(nn.Module):
    def __init__(self, read: Callable[[nn.Module, Tensor], Tensor]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem, self.a, self.b, self.head = (
            nn.Conv2d(3, 64, 4, 4),
            nn.Linear(64, 64),
            nn.Linear(64, 64),
            nn.Linear(64, 8),
        )
        self.read = [read]

    def forward(self, x: Tensor) -> Tensor:
        y = self.read[0](self, self.stem(x).flatten(2).mT)
        return self.head(self.b(self.a(y).relu())).mean(1)


@pytest.mark.parametrize("name", READS)
@pytest.mark.parametrize("exported", [False, True])
def test_masked_lowered_saved_and_trained(name: str, exported: bool, tmp_path: Path) -> None:
    model: nn.Module = Reading(READS[name]).eval()
    if exported:
        batch = ({0: torch.export.Dim("batch", min=2)},)
        model = torch.export.export(model, (X,), dynamic_shapes=batch).module()
    gm = transform(model, X, Config(), [X])
    assert sorted(gm.plan.masked) == ["a", "b"]
    expected = gm(X)
    lowered = lower(gm, X, Config(engine="reference"))
    assert torch.allclose(lowered(X), expected, atol=1e-5)
    for key, built in (("masked", gm), ("lowered", lowered)):
        mpcompile.save(built, tmp_path / key)
        assert torch.equal(mpcompile.load(tmp_path / key)(X), built(X))
    gm(X).sum().backward()
    assert gm.get_parameter("a.weight").grad is not None
