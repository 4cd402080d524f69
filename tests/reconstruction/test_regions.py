"""Regions: every masked layer is in one, and each computes from its inputs alone what the whole graph computes."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx, nn

import mpcompile
from mpcompile.ir.view import layers
from mpcompile.reconstruction.regions import Region, find, subgraph
from tests.support.helpers import tiny_vit


def masked(model: nn.Module, *inputs: Any, **options: Any) -> fx.GraphModule:
    options = {"pattern": "2:4", "score": "magnitude", "permute": False, **options}
    return mpcompile.transform(model.eval(), inputs, config=mpcompile.Config(**options))


class Recorder(fx.Interpreter):
    """Record copies of some nodes' values."""

    def __init__(self, gm: fx.GraphModule, nodes: set[fx.Node]) -> None:
        super().__init__(gm)
        self.nodes, self.values = nodes, {}

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        if n in self.nodes:
            self.values[n] = value.clone() if isinstance(value, torch.Tensor) else value
        return value


def check(gm: fx.GraphModule, *inputs: Any, halves: bool = True) -> list[Region]:
    """Every masked layer is in a region; each region repeats the graph bit for bit, and gradients reach its weights."""
    regions = find(gm, halves=halves)
    recorder = Recorder(gm, {node for region in regions for node in (*region.inputs, region.output)})
    with torch.no_grad():
        recorder.run(*inputs)
    uses = [use for use in layers(gm) if use.pattern is not None]
    assert {use.node for use in uses} <= {node for region in regions for node in region.nodes}
    assert len({region.name for region in regions}) == len(regions)
    for region in regions:
        gm.zero_grad(set_to_none=True)
        values = [recorder.values[node] for node in region.inputs]
        before = [v.clone() if isinstance(v, torch.Tensor) else v for v in values]
        output = subgraph(gm, region)(*values)
        assert torch.equal(output, recorder.values[region.output]), region.name
        assert all(torch.equal(a, b) for a, b in zip(values, before, strict=True) if isinstance(a, torch.Tensor))
        output.square().sum().backward()
        trained = {id(p) for p in gm.parameters() if p.grad is not None and p.grad.any()}
        for use in uses:
            if use.node in region.nodes:
                whole = use.weight.whole
                weight = use.weight.tensor if whole is None else gm.get_parameter(str(whole.target))
                assert id(weight) in trained, (region.name, use.name)
    return regions


def test_halves_and_blocks_of_a_transformer():
    x = torch.randn(2, 3, 32, 32)
    gm = masked(tiny_vit(), x)
    halves = check(gm, x)
    assert [(r.name, r.kind) for r in halves] == [
        ("blocks.0.attn", "half"),
        ("blocks.0.mlp", "half"),
        ("blocks.1.attn", "half"),
        ("blocks.1.mlp", "half"),
    ]
    blocks = check(gm, x, halves=False)
    assert [(r.name, r.kind) for r in blocks] == [("blocks.0", "block"), ("blocks.1", "block")]
    assert blocks[1].inputs == (blocks[0].output,)
