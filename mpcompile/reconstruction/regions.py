"""Regions: the parts of a masked graph that are trained one at a time, each towards one tensor of the dense graph.

A residual addition marks a region, in transformers, CNNs and U-Nets alike: everything on the paths from the latest
value that all its operands are computed from to the addition, and the activation or norm that follows. Nothing inside
is read elsewhere, so that the one output tells all that the region does. Masked layers outside such regions are grouped
by the repeated modules that they are in, or stand alone.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from mpcompile.errors import GraphError
from mpcompile.ir.effects import switches, written
from mpcompile.ir.module import IRModule, Lifted
from mpcompile.ir.parts import common_path
from mpcompile.ir.view import as_stored
from mpcompile.reconstruction.flow import memory
from mpcompile.reconstruction.search import Part, Search


@dataclass(frozen=True)
class Region:
    """A part of a graph that is trained towards the dense graph's value of one node.

    Attributes:
        name: module path of the block or layer, unique among the regions of a graph.
        kind: ``"block"``, ``"half"`` (one of several residual additions in a block) or ``"layer"``.
        nodes: the nodes inside in graph order, with the constants and sizes that they are computed from.
        inputs: the nodes outside that they read, in graph order: tensors, or numbers such as sizes.
        output: the node, a tensor of floats, whose value is matched; nothing outside reads the value of another one.
        layers: names of the masked layers inside, in graph order.
    """

    name: str
    kind: str
    nodes: tuple[fx.Node, ...]
    inputs: tuple[fx.Node, ...]
    output: fx.Node
    layers: tuple[str, ...]


def find(gm: fx.GraphModule, halves: bool = True, lifted: Lifted | None = None) -> list[Region]:
    """Return the regions of a graph that hold masked layers, in graph order.

    No value is in two of them. Token merges are in none, nor are layers that compute from constants and sizes alone and
    outside every region, such as the projection of position embeddings.

    Args:
        gm: a graph from :func:`mpcompile.transform`.
        halves: False to join the residual additions in a row that one block holds, such as attention and MLP.
        lifted: parameters that are inputs of the graph; they become inputs of the regions.

    Example:
        >>> model = nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 4))
        >>> gm = mpcompile.transform(model, (torch.randn(2, 16),), config=mpcompile.Config(exclude=()))
        >>> [(region.name, region.kind) for region in find(gm)]
        [('0', 'layer'), ('2', 'layer')]
    """
    search = Search(gm, lifted)
    regions: list[Region] = []
    for part in search.run(halves):
        nodes, inputs = search.enclosed(part.bits)
        uses = [search.uses[node] for node in nodes if node in search.uses and search.uses[node].pattern is not None]
        names = tuple(dict.fromkeys(as_stored(gm, use, lifted).name for use in uses))
        name = _unique(_name(part, names), [region.name for region in regions])
        regions.append(Region(name, part.kind, tuple(nodes), tuple(inputs), part.output, names))
    return regions


def _name(part: Part, names: tuple[str, ...]) -> str:
    """Return the path of a block, or the path that the masked layers of a half or layer share."""
    if part.kind == "block" and part.block is not None:
        return part.block
    shared = common_path(names)
    return names[0] if shared in ("", part.block) else shared


def _unique(name: str, taken: Iterable[str]) -> str:
    """Return a name that is not taken: that of a layer that is used again has a number."""
    names, number, result = set(taken), 2, name
    while result in names:
        result, number = f"{name}_{number}", number + 1
    return result


def subgraph(gm: fx.GraphModule, region: Region) -> fx.GraphModule:
    """Return a graph that computes a region's output from its inputs, and shares parameters and modules with ``gm``.

    It takes the values of ``region.inputs`` in their order, and does not write into them. Autocast is entered where the
    whole graph enters it; gradients are recorded even where that turns them off.

    Args:
        gm: the graph that the region was found in, or one with nodes of the same names, such as its dense twin.

    Raises:
        GraphError: the graph lacks a node of the region.

    Example:
        >>> gm = mpcompile.transform(nn.Linear(16, 16), (torch.randn(2, 16),), config=mpcompile.Config(exclude=()))
        >>> (region,) = find(gm)
        >>> subgraph(gm, region)(torch.randn(3, 16)).shape
        torch.Size([3, 16])
    """
    graph, nodes = fx.Graph(), _same_nodes(gm, region)
    inside, inputs = [nodes[n.name] for n in region.nodes], [nodes[n.name] for n in region.inputs]
    copies: dict[fx.Node, fx.Node] = {}
    for source in inputs:
        copies[source] = graph.placeholder(source.name)
        copies[source].meta = dict(source.meta)
    overwritten = {memory(gm, target) for node in inside for target in written(gm, node)}
    for source in inputs:
        if source in overwritten:
            copies[source] = graph.call_function(torch.clone, (copies[source],))
    computed = set(inside)
    entered: list[Any] = []
    for node in gm.graph.nodes:
        name = getattr(node.target, "__name__", "") if switches(node) else ""
        if node in computed or "autocast" in name:
            copies[node] = graph.node_copy(node, lambda n: copies[n])
        if name == "_enter_autocast":
            entered.append(node)
        elif name == "_exit_autocast":
            entered.remove(node.args[0])
        if node is inside[-1]:
            break
    for node in reversed(entered):
        graph.call_function(torch.amp.autocast_mode._exit_autocast, (copies[node],))
    graph.output(copies[nodes[region.output.name]])
    return IRModule(gm, graph)


def _same_nodes(gm: fx.GraphModule, region: Region) -> dict[str, fx.Node]:
    """Return the nodes of a graph by name, after a check that those of the region are among them."""
    nodes = {node.name: node for node in gm.graph.nodes}
    missing = [node.name for node in (*region.nodes, *region.inputs) if node.name not in nodes]
    if missing:
        raise GraphError(
            "the graph lacks a node of the region",
            layer=region.name,
            expected="the graph that the region was found in, or its twin with other weights",
            found=f"no node {missing[0]}",
            hint="find the regions of this graph with mpcompile.reconstruction.regions.find",
        )
    return nodes
