"""Regions: every masked layer is in one, and each computes from its inputs alone what the whole graph computes."""

from __future__ import annotations

from typing import Any

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, fx, nn

import mpcompile
from mpcompile.ir.view import layers
from mpcompile.kernels import ops
from mpcompile.kernels.nm_format import Pattern
from mpcompile.layers import MaskedLinear
from mpcompile.reconstruction.regions import Region, find, subgraph
from tests.support.helpers import tiny_vit


def masked(model: nn.Module, *inputs: Any, **options: Any) -> fx.GraphModule:
    options = {"pattern": "2:4", "score": "magnitude", "permute": False, "exclude": (), **options}
    return mpcompile.transform(model, inputs, config=mpcompile.Config(**options))


class Recorder(fx.Interpreter):
    """Record copies of some nodes' values."""

    def __init__(self, gm: fx.GraphModule, nodes: set[fx.Node]) -> None:
        super().__init__(gm)
        self.nodes, self.values = nodes, {}

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        if n in self.nodes:
            self.values[n] = value.clone() if isinstance(value, Tensor) else value
        return value


def check(gm: fx.GraphModule, *inputs: Any, halves: bool = True, gradients: bool = True) -> dict[str, Region]:
    """Every masked layer is in a region; each region repeats the graph bit for bit, and gradients reach its weights."""
    regions = find(gm, halves=halves)
    recorder = Recorder(gm, {node for region in regions for node in (*region.inputs, region.output)})
    with torch.no_grad():
        recorder.run(*(v.clone() for v in inputs))
    uses = [use for use in layers(gm) if use.pattern is not None]
    assert {use.node for use in uses} <= {node for region in regions for node in region.nodes}
    assert not any(node.target is ops.token_merge for region in regions for node in region.nodes)
    for region in regions:
        gm.zero_grad(set_to_none=True)
        values = [recorder.values[node] for node in region.inputs]
        before = [v.clone() for v in values if isinstance(v, Tensor)]
        output = subgraph(gm, region)(*values)
        assert torch.equal(output, recorder.values[region.output]), region.name
        assert all(map(torch.equal, before, (v for v in values if isinstance(v, Tensor)))), region.name
        if not gradients:
            continue
        output.float().square().sum().backward()
        trained = {id(p) for p in gm.parameters() if p.grad is not None and p.grad.any()}
        for use in uses:
            if use.node in region.nodes:
                whole = use.weight.whole
                weight = use.weight.tensor if whole is None else gm.get_parameter(str(whole.target))
                assert id(weight) in trained, (region.name, use.name)
    named = {region.name: region for region in regions}
    assert len(named) == len(regions)
    return named


def kinds(regions: dict[str, Region]) -> dict[str, str]:
    return {name: region.kind for name, region in regions.items()}


HALVES = {f"blocks.{i}.{part}": "half" for i in (0, 1) for part in ("attn", "mlp")}


def test_halves_and_blocks_of_a_transformer():
    x = torch.randn(2, 3, 32, 32)
    gm = masked(tiny_vit(), x, exclude=("head", "patch_embed.proj"))
    assert kinds(check(gm, x)) == HALVES
    blocks = check(gm, x, halves=False)
    assert kinds(blocks) == {"blocks.0": "block", "blocks.1": "block"}
    assert blocks["blocks.1"].inputs == (blocks["blocks.0"].output,)
    # The last block computes the queries of the class token alone, by rows of a weight that stays one layer.
    assert blocks["blocks.1"].layers[:2] == ("blocks.1.attn.qkv", "blocks.1.attn.proj")
    assert subgraph(gm, blocks["blocks.0"])(torch.ones(5, 17, 32)).shape == (5, 17, 32)  # sizes are computed inside


def test_regions_end_before_token_merges():
    x = torch.randn(2, 3, 32, 32)
    gm = masked(tiny_vit(depth=3), x, exclude=("head", "patch_embed.proj"), tome_r=2, tome_method="saliency")
    assert sum(node.target is ops.token_merge for node in gm.graph.nodes) == 2
    for halves in (True, False):  # a merge stands between the halves of the first blocks
        regions = check(gm, x, halves=halves)
        assert {n: k for n, k in kinds(regions).items() if not n.startswith("blocks.2")} == HALVES
        assert len(regions["blocks.1.attn"].inputs) == 2  # the stream, and how many tokens each stands for
    assert kinds(regions)["blocks.2"] == "block"


class Residual(nn.Module):
    """A ResNet block with statements: in-place activations and an in-place addition."""

    def __init__(self, inner: int, outer: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(inner, outer, 3, padding=1), nn.BatchNorm2d(outer)
        self.conv2, self.bn2 = nn.Conv2d(outer, outer, 3, padding=1), nn.BatchNorm2d(outer)
        self.shortcut = nn.Identity() if inner == outer else nn.Conv2d(inner, outer, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.bn2(self.conv2(torch.relu_(self.bn1(self.conv1(x)))))
        h += self.shortcut(x)
        h[:, 0] = 1.0
        return torch.relu_(h)


class Expand(nn.Sequential):
    def __init__(self, inner: int, outer: int) -> None:
        super().__init__(nn.Conv2d(inner, outer, 1), nn.BatchNorm2d(outer), nn.ReLU6(), nn.Conv2d(outer, outer, 1))


class UNet(nn.Module):
    """Blocks with and without a residual addition below a skip connection."""

    def __init__(self, concatenate: bool) -> None:
        super().__init__()
        self.stem = nn.Conv2d(4, 8, 3, padding=1)
        self.down = nn.ModuleList([Expand(8, 16), Expand(16, 16)])
        self.blocks = nn.Sequential(Residual(16, 8), Residual(8, 8))
        self.up = nn.Conv2d(16 if concatenate else 8, 8, 3, padding=1)
        self.concatenate = concatenate

    def forward(self, x: Tensor) -> Tensor:
        skip = self.stem(x)
        h = self.down[1](self.down[0](nn.functional.max_pool2d(skip, 2)))
        h = nn.functional.interpolate(self.blocks(h), scale_factor=2)
        return self.up(torch.cat([skip, h], 1) if self.concatenate else skip + h).relu()


def test_convolutional_blocks_below_a_skip_connection():
    x = torch.randn(2, 4, 8, 8)
    for concatenate in (True, False):
        regions = check(masked(UNet(concatenate).eval(), x), x)
        wanted = {"stem": "layer", "down.0": "block", "down.1": "block", "blocks.0": "block", "blocks.1": "block"}
        assert kinds(regions) == {**wanted, "up": "layer"}
        assert regions["blocks.0"].layers == tuple(f"blocks.0.{n}" for n in ("conv1", "conv2", "shortcut"))
        assert [r.output.name for r in regions.values()][-3:] == ["relu__1", "relu__3", "relu"]  # behind activations


class Cross(nn.Module):
    """A post-norm decoder layer without self-attention."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.proj = (nn.Linear(32, 32) for _ in range(4))
        self.mlp = nn.Sequential(nn.Linear(32, 48), nn.GELU(), nn.Linear(48, 32))
        self.norm1, self.norm2 = nn.LayerNorm(32), nn.LayerNorm(32)

    def forward(self, x: Tensor, memory: Tensor) -> Tensor:
        h = nn.functional.scaled_dot_product_attention(self.q(x), self.k(memory), self.v(memory))
        x = self.norm1(x + self.proj(h))
        return self.norm2(x + self.mlp(x))


class Decoder(nn.Module):
    """Two towers: the second attends to the first, by a layer that is run twice."""

    def __init__(self) -> None:
        super().__init__()
        self.tower = tiny_vit(num_classes=0, global_pool="")
        self.layers = nn.ModuleList([Cross(), Cross()])

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        memory = self.tower(x)
        for layer in (self.layers[0], self.layers[1], self.layers[1]):
            y = layer(y, memory)
        return y


def test_a_region_holds_the_keys_of_its_cross_attention_and_one_run_of_a_layer():
    x, y = torch.randn(2, 3, 32, 32), torch.randn(2, 5, 32)
    gm = masked(Decoder().eval(), x, y)
    halves = check(gm, x, y)
    assert [r.kind for r in halves.values()].count("half") == 4 + 6
    assert halves["layers.0.q"].layers == tuple(f"layers.0.{n}" for n in ("q", "k", "v", "proj"))
    assert all(len(halves[name].inputs) == 2 for name in ("layers.0.q", "layers.1.q", "layers.1.q_2"))
    blocks = [name for name, region in check(gm, x, y, halves=False).items() if region.kind == "block"]
    assert blocks == ["tower.blocks.0", "tower.blocks.1", "layers.0", "layers.1", "layers.1_2"]


class Watched(nn.Module):
    """A residual block whose inside is also returned, under autocast."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(16, 32), nn.Linear(32, 16)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        with torch.autocast("cpu", torch.bfloat16):
            h = self.up(x).relu()
            y = self.down(h)
        return x + y, h


def test_layers_stand_alone_where_their_inside_is_read_elsewhere():
    x = torch.randn(4, 16)
    exported = torch.export.export(Watched(), (x,)).module()
    regions = check(masked(exported, x), x)  # the subgraphs enter autocast, too
    assert kinds(regions) == {"up": "layer", "down": "layer"}
    plain = nn.Sequential(nn.Linear(16, 16), nn.LayerNorm(16), nn.GELU(), nn.Linear(16, 8)).eval()
    assert kinds(check(masked(plain, x), x)) == {"0": "layer", "3": "layer"}


@st.composite
def networks(draw: st.DrawFn) -> fx.GraphModule:
    """Any network of masked layers, sums, products and activations, in place or not, with one to three outputs."""
    root, graph = nn.Module(), fx.Graph()
    torch.manual_seed(draw(st.integers(0, 99)))
    values = [graph.placeholder("x"), graph.placeholder("y")]
    pick = lambda: values[-1 - draw(st.integers(0, min(4, len(values) - 1)))]  # noqa: E731
    for number in range(draw(st.integers(3, 16))):
        kind = draw(st.sampled_from(["layer", "layer", "add", "add", "mul", "tanh", "tanh_"]))
        if kind == "layer":
            mask = torch.tensor([True, False]).repeat(8, 4)
            setattr(root, f"fc{number}", MaskedLinear.from_linear(nn.Linear(8, 8), mask, Pattern(1, 2)))
            values.append(graph.call_module(f"fc{number}", (pick(),)))
        elif kind in ("add", "mul"):
            values.append(graph.call_function(getattr(torch, kind), (pick(), pick())))
        else:
            source = pick()
            if kind == "tanh_":  # later readers read its result, as in graphs that mpcompile has captured
                values.remove(source)
            values.append(graph.call_method(kind, (source,)))
    graph.output([values[-1], *(pick() for _ in range(draw(st.integers(0, 2))))])
    gm = fx.GraphModule(root, graph)
    gm.graph.eliminate_dead_code()
    gm.recompile()
    return gm


@given(gm=networks(), halves=st.booleans())
@settings(max_examples=60, deadline=None, derandomize=True)
def test_regions_of_any_network(gm, halves):
    differentiable = not any(node.target == "tanh_" for node in gm.graph.nodes)  # which may overwrite what it needs
    regions = check(gm, torch.randn(2, 8), torch.randn(2, 8), halves=halves, gradients=differentiable)
    nodes = [node for region in regions.values() for node in region.nodes]
    assert len(set(nodes)) == len(nodes)
    for region in regions.values():
        inside = set(region.nodes)
        assert all(set(node.users) <= inside for node in region.nodes if node is not region.output)
