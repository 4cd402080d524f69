"""Axes: which axes of which weights hold the same channels, for any graph that make_fx can trace.

One walk over the traced graph gives the axes of every tensor as atoms (atoms.py). Operators unify atoms (the channels
that a layer writes are those that the next one reads), split them (a reshape to heads), or freeze them (a slice picks
places), by the rules of rules.py. Unfrozen atoms may be permuted everywhere at once without changing the network.
An operator without a rule freezes everything it touches and is reported by name.

Taking a tensor apart along a small axis (q, k and v) gives every part atoms of its own: the atom that they share
becomes *sliced*, and its children are tied together again only by tensors that hold it without the axis.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx.experimental.proxy_tensor import make_fx

from mpcompile._moved import renamed
from mpcompile.capture.signature import call_of
from mpcompile.ir.numerics import training_flags
from mpcompile.passes.channels.atoms import Atoms, Axis, Dims
from mpcompile.passes.channels.rules import Axes, find_rule

__all__ = ["Atoms", "Axis", "ChannelAnalysis", "Dims", "analyse"]

__getattr__ = renamed(__name__, {"Analysis": "passes.channels.axes.ChannelAnalysis"})


@dataclass
class ChannelAnalysis:
    """The axes of a graph's tensors.

    Attributes:
        atoms: the atoms that the axes consist of.
        dims: parameter or buffer name -> its axes.
        tensors: the axes of every tensor, activations included.
        unknown: operators without a rule.
    """

    atoms: Atoms
    dims: dict[str, Dims] = field(default_factory=dict)
    tensors: list[Dims] = field(default_factory=list)
    unknown: set[str] = field(default_factory=set)

    def settle(self) -> None:
        """Tie the children of sliced atoms together again where a tensor holds the atom without its selector."""
        atoms = self.atoms
        changed = True
        while changed:
            changed = False
            for dims in self.tensors:
                flat = atoms.expand(a for axis in dims for a in axis)
                for a in flat:
                    if a in atoms.slices and atoms.find(atoms.slices[a][0]) not in flat:
                        first, *others = atoms.slices[a][1]
                        for other in others:
                            if atoms.expand([first]) != atoms.expand([other]):
                                atoms.unify([first], [other])
                                changed = True


def _operator(target: Any) -> str:
    """Return the name of an aten operator without overload and trailing underscore; for any other, its full name."""
    name = getattr(target, "__name__", str(target)).split(".")[0]
    if hasattr(target, "overloadpacket"):
        aten = str(target).startswith("aten.")
        name = str(target.overloadpacket).rsplit(".", 1)[-1] if aten else str(target)
    return name.removesuffix("_") if not name.startswith("_") else name


class _Walk:
    """One walk over an aten graph.

    Args:
        names: names of the parameters and buffers, which are the first placeholders; the others are inputs.
    """

    def __init__(self, graph: fx.Graph, names: Sequence[str]) -> None:
        self.axes = Axes()
        self.result = ChannelAnalysis(self.axes.atoms)
        self._name_placeholders(graph, names)
        for node in graph.nodes:
            if node.op == "call_function":
                self.axes.of[node] = self._call(node)
            elif node.op == "get_attr":
                self.axes.of[node] = []
            elif node.op == "output":
                self._freeze_inputs(node)
        for value in self.axes.of.values():
            several = bool(value and value[0] and isinstance(value[0][0], list))  # as unbind yields
            self.result.tensors += value if several else [value]
        self.result.settle()

    def _name_placeholders(self, graph: fx.Graph, names: Sequence[str]) -> None:
        placeholders = [n for n in graph.nodes if n.op == "placeholder"]
        for node, name in zip(placeholders, [*names, *[None] * len(placeholders)], strict=False):
            dims = self.axes.fresh(node)
            self.axes.of[node] = dims
            if name is None:
                self.axes.freeze(dims)
            else:
                self.result.dims[name] = dims

    def _call(self, node: Any) -> Any:
        """Return the axes of a call's result."""
        name = _operator(node.target)
        if name == "getitem":
            value = self.axes.of[node.args[0]]
            return value[node.args[1]] if value and isinstance(value[0], list) else []
        out = self.axes.fresh(node)
        rule = find_rule(name, node)
        dims = None if rule is None else rule(self.axes, node, out)
        if dims is not None:
            return dims
        value = node.meta.get("val")
        several = isinstance(value, (tuple, list))
        if not out and not several and not node.all_input_nodes:
            return out
        if rule is None:
            self.result.unknown.add(name)
        self._freeze_inputs(node)
        self.axes.freeze(out)
        if several:
            return [[[self.axes.atoms.new(int(s), True)] for s in v.shape] for v in value if isinstance(v, Tensor)]
        return out

    def _freeze_inputs(self, node: fx.Node) -> None:
        for source in node.all_input_nodes:
            self.axes.freeze(self.axes.of[source])


def analyse(gm: fx.GraphModule, inputs: Sequence[Any]) -> ChannelAnalysis:
    """Return the axes of all parameters and buffers of a graph module, in eval mode.

    Args:
        inputs: example inputs, one per placeholder; only their shapes matter.

    Example:
        >>> from mpcompile.capture.importers import import_model
        >>> net = torch.nn.Sequential(torch.nn.Linear(8, 6), torch.nn.ReLU(), torch.nn.Linear(6, 4))
        >>> analysis = analyse(import_model(net, torch.randn(2, 8)).gm, [torch.randn(2, 8)])
        >>> written, read = analysis.dims["0.weight"][0], analysis.dims["2.weight"][1]
        >>> analysis.atoms.expand(written) == analysis.atoms.expand(read)
        True
    """
    state = {**dict(gm.named_parameters()), **dict(gm.named_buffers())}

    def call(tensors: dict[str, Tensor], *values: Any) -> Any:
        return torch.func.functional_call(gm, tensors, *call_of(gm, values))

    with torch.no_grad(), training_flags(gm, False):
        graph = make_fx(call, tracing_mode="fake", pre_dispatch=True, _allow_non_fake_inputs=True)(state, *inputs).graph
    return _Walk(graph, list(state)).result
