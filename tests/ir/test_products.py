"""Products with weights in every form that graphs write them in: masked, or named in the Plan with a reason."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mpcompile import Config, transform
from mpcompile.capture.importers import import_model
from mpcompile.ir.view import layers, unsupported

X = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))


class Forms(nn.Module):
    """One weight for each form of a product."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem, self.even = nn.Conv2d(3, 32, 4, 4), nn.Conv2d(32, 32, 2, padding="same")
        self.same, self.valid = nn.Conv2d(32, 32, 3, padding="same"), nn.Conv2d(32, 32, 1, padding="valid")
        self.line, self.transposed = nn.Conv1d(32, 32, 1), nn.ConvTranspose2d(32, 32, 2, 2)
        self.fc, self.bare, self.head = nn.Linear(32, 32), nn.Linear(32, 32, bias=False), nn.Linear(32, 8)
        self.position, self.table = nn.Parameter(torch.zeros(1, 16, 32)), nn.Embedding(8, 32)
        self.standardised, self.gain = nn.Parameter(torch.randn(32, 32, 1, 1)), nn.Parameter(torch.ones(32, 1, 1, 1))
        self.batched, self.bias = nn.Parameter(torch.randn(4, 32, 32)), nn.Parameter(torch.randn(32))
        for name in ("turned", "direct", "method", "summed", "cast", "product", "sum", "relative"):
            setattr(self, name, nn.Parameter(torch.randn(32, 32)))

    def forward(self, x: Tensor) -> Tensor:
        x = self.valid(self.same(self.stem(x)))
        x = F.avg_pool2d(self.transposed(x + self.even(x)), 2)
        x = F.conv2d(x, F.normalize(self.standardised, dim=1) * self.gain)
        x = self.line(x.flatten(2)).mT + self.position
        x = self.bare(self.fc(x)) @ self.turned.T
        x = (x @ self.direct).matmul(self.method)
        x = torch.einsum("bnc,dc->bnd", x, self.summed)
        q = x.reshape(-1, 4, 32).transpose(0, 1)
        x = x + torch.baddbmm(q, q, self.batched).transpose(0, 1).reshape(x.shape)
        flat = torch.mm(x.reshape(-1, 32), self.product.t())
        x = torch.addmm(self.bias, flat, self.sum.transpose(0, 1)).reshape(x.shape)
        x = F.linear(x, self.cast.to(x.dtype) * 1.0)
        x = (x @ self.relative.transpose(-1, -2)).softmax(-1)
        return self.head(x.mean(1) + self.table(torch.tensor([1])))


def weights(model: nn.Module) -> set[str]:
    """Return the names of the weights that products use."""
    idle = {"position", "gain", "table"}
    names = {name.removesuffix(".weight") for name, p in model.named_parameters() if p.dim() >= 2}
    return names - idle


def exported(decomposed: bool) -> nn.Module:
    program = torch.export.export(Forms().eval(), (X,))
    return (program.run_decompositions() if decomposed else program).module()


@pytest.mark.parametrize("graph", ["traced", "exported", "decomposed"])
def test_every_weight_is_masked_or_named(graph: str) -> None:
    model = Forms().eval() if graph == "traced" else exported(graph == "decomposed")
    plan = transform(model, X, Config(pattern="2:4", score="magnitude")).plan
    rows = {name: layer.reason for name, layer in plan.layers.items()}
    assert weights(Forms()) <= rows.keys() and "gain" not in rows and "position" not in rows
    assert {"same", "valid", "bare", "product", "sum"} <= set(plan.masked)
    assert all(rows[name] for name in rows.keys() - set(plan.masked))
    if graph == "traced":
        assert plan.layers["even"].reason == "padding='same'"
        assert plan.layers["turned"].reason == "used by matmul, behind T"
        assert plan.layers["standardised"].reason == "used by conv2d, behind mul"


def test_weights_of_a_compiled_graph() -> None:
    found: set[str] = set()

    def backend(gm: Any, inputs: Any) -> Any:
        imported = import_model(gm, inputs, share=True)
        found.update(layer.name for layer in layers(imported.gm, imported.lifted))
        found.update(unsupported(imported.gm, imported.lifted))
        return gm.forward

    torch._dynamo.reset()
    torch.compile(Forms().eval(), backend=backend)(X)
    assert weights(Forms()) <= found


@pytest.mark.parametrize("decomposed", [False, True])
def test_one_form_computes_the_same(decomposed: bool) -> None:
    model = exported(decomposed)
    gm = transform(model, X, Config(pattern="dense"))
    assert torch.equal(gm(X), model(X))


def test_a_scaled_sum_stays() -> None:
    """``addmm`` with beta or alpha is no linear layer."""

    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc, self.head = nn.Linear(32, 32), nn.Linear(32, 8)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(torch.addmm(self.fc.bias, x, self.fc.weight.t(), beta=0.5))

    model, x = Scaled().eval(), torch.randn(4, 32)
    gm = transform(model, x, Config(pattern="dense"))
    assert gm.plan.layers["fc"].reason == "used by addmm, behind t"
    assert torch.equal(gm(x), model(x))


def test_attention_masks_are_no_weights() -> None:
    class Biased(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.qkv, self.head = nn.Linear(32, 96), nn.Linear(32, 8)
            self.bias = nn.Parameter(torch.zeros(4, 4))

        def forward(self, x: Tensor) -> Tensor:
            q, k, v = self.qkv(x).chunk(3, -1)
            return self.head(F.scaled_dot_product_attention(q, k, v, self.bias.unsqueeze(0)))

    gm = transform(Biased().eval(), torch.randn(2, 4, 32), Config(score="magnitude"))
    assert list(gm.plan.layers) == ["qkv", "head"]
