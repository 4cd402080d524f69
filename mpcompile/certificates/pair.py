"""A pair of networks: a dense and a sparse model as one float64 aten graph with two sets of tensors.

Certificates compare two networks that differ in their weights alone. Both modules are traced, masks are multiplied
into the weights, and the two graphs are matched node by node; the first difference in structure is reported.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx.experimental.proxy_tensor import make_fx

from mpcompile._moved import renamed
from mpcompile.certificates.enclosures.rules import operator_name
from mpcompile.data.outputs import class_scores
from mpcompile.errors import GraphError, InputError, first_line
from mpcompile.ir.numerics import training_flags
from mpcompile.ir.parts import rows_name, rows_within, whole_of
from mpcompile.ir.spec import family_of
from mpcompile.kernels import schema

__getattr__ = renamed(
    __name__,
    {"Pair": "certificates.pair.NetworkPair", "replay_orders": "certificates.orders.replay_orders"},
)
SAME = 1e-9  # relative difference of two float64 runs of the same function
_LIBRARY = frozenset({"cudnn_enable", "cudnn_enabled"})  # arguments that name the library of an operator


@dataclass
class Network:
    """A traced module.

    Attributes:
        graph: aten graph of the module.
        tensors: the tensor of each placeholder of a parameter or buffer.
        names: the dotted name of each of these.
        inputs: the placeholders of the model's inputs, in order.
    """

    graph: fx.Graph
    tensors: dict[fx.Node, Tensor]
    names: dict[fx.Node, str]
    inputs: list[fx.Node]


@dataclass
class Step:
    """One replacement of weights: a layer, together with the normalisation that follows it if that changes too.

    Attributes:
        nodes: nodes of the dense graph, each the only reader of the one before it. The value of the last one changes.
        name: the layer's dotted name.
        weights: the placeholders of the changed weights with two axes or more.
    """

    nodes: list[fx.Node]
    name: str
    weights: list[fx.Node]

    @property
    def node(self) -> fx.Node:
        """The node whose value moves along the segment."""
        return self.nodes[-1]


@dataclass
class NetworkPair:
    """Two networks on one graph.

    Attributes:
        graph: the graph of the dense model.
        inputs, names: see :class:`Network`.
        dense, sparse: the tensors of the parameter placeholders of ``graph``.
        steps: the layers whose tensors differ, in the graph's order.
    """

    graph: fx.Graph
    inputs: list[fx.Node]
    names: dict[fx.Node, str]
    dense: dict[fx.Node, Tensor]
    sparse: dict[fx.Node, Tensor]
    steps: list[Step]

    @property
    def output(self) -> fx.Node:
        """The node of the logits: the first tensor that the graph returns."""
        return _first(next(n for n in reversed(self.graph.nodes) if n.op == "output").args[0])


class StructureChange(Exception):
    """Two graphs differ in more than weights; the message names the first difference."""


def _first(value: Any) -> fx.Node:
    while not isinstance(value, fx.Node):
        value = value[0] if isinstance(value, (tuple, list)) else next(iter(value.values()))
    return value


def double(module: nn.Module) -> nn.Module:
    """Copy a module to the CPU in float64, in eval mode.

    Raises:
        InputError: the module cannot be copied.
    """
    try:
        copied = copy.deepcopy(module)
    except Exception as error:
        raise InputError(f"{type(module).__name__} cannot be copied: {error}") from error
    copied = copied.cpu().double()
    for part in copied.modules():
        part.training = False
    return copied


def trace(module: nn.Module, inputs: Sequence[Tensor]) -> Network:
    """Trace a float64 module into an aten graph, for inputs of these shapes.

    Raises:
        GraphError: the module cannot be traced, or is lowered.
    """
    state = {**dict(module.named_parameters()), **dict(module.named_buffers())}

    def call(tensors: dict[str, Tensor], *values: Any) -> Any:
        output = torch.func.functional_call(module, tensors, values)
        scores = class_scores(output)
        return output if scores is None else scores

    try:
        with torch.no_grad(), training_flags(module, False):
            tracing = make_fx(call, tracing_mode="fake", pre_dispatch=True, _allow_non_fake_inputs=True)
            graph = tracing(state, *inputs).graph
    except Exception as error:
        raise GraphError(
            f"{type(module).__name__} cannot be traced in float64: {first_line(error)}",
            expected="a module without data-dependent control flow that runs in float64",
        ) from error
    placeholders = [n for n in graph.nodes if n.op == "placeholder"]
    parameters = dict(zip(placeholders, state, strict=False))
    network = Network(
        graph, {n: state[k].detach() for n, k in parameters.items()}, parameters, placeholders[len(state) :]
    )
    _functionalise(graph)
    _read_rows(network)
    _multiply_masks(network)
    return network


def _functionalise(graph: fx.Graph) -> None:
    """Replace operators that write into their argument by those that do not; later readers get the result.

    This is wrong where another node reads the same memory through a view; :func:`check_values` detects that.
    """
    for node in list(graph.nodes):
        name = getattr(node.target, "_opname", "")
        if node.op != "call_function" or not name.endswith("_") or name.startswith("_"):
            continue
        packet = getattr(torch.ops.aten, name[:-1], None)
        target = getattr(packet, node.target._overloadname, None)
        source = node.args[0]
        if target is None or not isinstance(source, fx.Node):
            continue
        node.target = target
        for user in [user for user in source.users if user > node]:
            user.replace_input_with(source, node)
    graph.lint()


def _read_rows(network: Network) -> None:
    """Replace rows of a tensor, which a part of a layer reads, by a placeholder of their own."""
    graph, known = network.graph, dict(network.tensors)
    for node in list(graph.nodes):
        whole = whole_of(node) if node.op == "call_function" else None
        rows = rows_within(node, len(known[whole])) if whole in known and known[whole].dim() else None
        if whole is None or rows is None:
            continue
        with graph.inserting_before(whole):
            part = graph.placeholder(node.name)
        part.meta = dict(node.meta)
        network.tensors[part], network.names[part] = known[whole][rows], rows_name(network.names[whole], rows)
        node.replace_all_uses_with(part)
        graph.erase_node(node)


def _multiply_masks(network: Network) -> None:
    """Replace masked operators by dense ones on weight * mask."""
    for node in network.graph.nodes:
        family = family_of(node)
        if family in ("packed", "native"):
            raise GraphError(
                "the module is lowered: its weights are packed for kernels",
                expected="the module that mpcompile.transform returned",
                found=operator_name(node.target),
                hint="certify the module before mpcompile.lower",
            )
        if family != "masked":
            continue
        args = schema.bind(node)
        network.tensors[args.weight] = network.tensors[args.weight] * network.tensors[args.mask]
        if isinstance(args, schema.MaskedLinearArgs):
            node.target, node.args = torch.ops.aten.linear.default, (args.x, args.weight, args.bias)
        else:
            geometry = (args.stride, args.padding, args.dilation, args.groups)
            node.target, node.args = torch.ops.aten.conv2d.default, (args.x, args.weight, args.bias, *geometry)


def _calls(graph: fx.Graph) -> list[fx.Node]:
    return [n for n in graph.nodes if n.op not in ("placeholder", "output")]


def match(dense: Network, sparse: Network) -> NetworkPair:
    """Match two traced modules node by node, and put both on the dense one's graph.

    Raises:
        StructureChange: they differ in an operator, its options, or a shape.
    """
    twin: dict[fx.Node, fx.Node] = dict(zip(sparse.inputs, dense.inputs, strict=True))
    values: dict[fx.Node, Tensor] = {}

    def same(a: Any, b: Any, where: fx.Node) -> bool:
        if isinstance(a, fx.Node) and isinstance(b, fx.Node):
            if a in sparse.tensors and b in dense.tensors and sparse.tensors[a].shape == dense.tensors[b].shape:
                values[b] = sparse.tensors[a]
                return twin.setdefault(a, b) is b
            return twin.get(a) is b
        if isinstance(a, (tuple, list)) and isinstance(b, (tuple, list)):
            return len(a) == len(b) and all(same(x, y, where) for x, y in zip(a, b, strict=True))
        if isinstance(a, dict) and isinstance(b, dict):
            return a.keys() == b.keys() and all(same(a[k], b[k], where) for k in a)
        return bool(a == b)

    ours, theirs = _calls(sparse.graph), _calls(dense.graph)
    for s, d in zip(ours, theirs, strict=False):
        equal = (s.op, s.target) == (d.op, d.target) and same(_arguments(s), _arguments(d), d)
        if not equal or _shape(s) != _shape(d):
            raise StructureChange(_difference(s, d, sparse, dense))
        twin[s] = d
    if len(ours) != len(theirs):
        longer, network, kind = (ours, sparse, "sparse") if len(ours) > len(theirs) else (theirs, dense, "dense")
        extra = _label(longer[min(len(ours), len(theirs))], network)
        raise StructureChange(f"the {kind} model continues after the other ends: {extra}")
    outputs = [next(n for n in reversed(net.graph.nodes) if n.op == "output") for net in (sparse, dense)]
    if not same(outputs[0].args, outputs[1].args, outputs[1]):
        raise StructureChange("the models return different nodes")
    new = {**dense.tensors, **values}
    return NetworkPair(dense.graph, dense.inputs, dense.names, dense.tensors, new, list(_steps(dense, new)))


def _arguments(node: fx.Node) -> list[Any]:
    """All arguments of a node that its values depend on, with defaults filled in if the operator has a schema."""
    schema = getattr(node.target, "_schema", None)
    if schema is None:
        return [*node.args, node.kwargs]
    given = {**{a.name: v for a, v in zip(schema.arguments, node.args, strict=False)}, **node.kwargs}
    return [given.get(a.name, a.default_value) for a in schema.arguments if a.name not in _LIBRARY]


def _shape(node: fx.Node) -> Any:
    value = node.meta.get("val")
    return tuple(value.shape) if isinstance(value, Tensor) else None


def _label(node: fx.Node, network: Network) -> str:
    """An operator, with the layer whose weights it reads."""
    owners = [network.names[n] for n in node.all_input_nodes if n in network.names]
    return operator_name(node.target) + (f" of {owners[0].rpartition('.')[0]}" if owners else "")


def _difference(s: fx.Node, d: fx.Node, sparse: Network, dense: Network) -> str:
    ours, theirs = _label(s, sparse), _label(d, dense)
    if ours == theirs:
        return f"{ours} has other arguments: {_shape(s)} sparse, {_shape(d)} dense"
    return f"the sparse model has {ours} where the dense one has {theirs}"


def _steps(network: Network, new: dict[fx.Node, Tensor]) -> Iterator[Step]:
    """The replacements of tensors by ``new``, in the graph's order."""
    changed = {n for n, t in network.tensors.items() if not torch.equal(t, new[n])}
    step: Step | None = None  # the step that later nodes may still join
    for node in _calls(network.graph):
        moved = [n for n in node.all_input_nodes if n in changed]
        if not moved:
            continue
        weights = [n for n in moved if network.tensors[n].dim() > 1]
        name = _layer(network.names[(weights or moved)[0]])
        sources = [n for n in node.all_input_nodes if n not in network.tensors]
        follows = step is not None and sources == [step.node] and list(step.node.users) == [node]
        if step is not None and follows and not weights:
            step.nodes.append(node)
            step.name += f" + {name.rpartition('.')[2]}"
            continue
        if step is not None:
            yield step
        step = Step([node], name, weights)
    if step is not None:
        yield step


def _layer(name: str) -> str:
    """The name of the layer that owns a tensor of this name."""
    layer, _, leaf = name.rpartition(".")
    return layer if layer and leaf in ("weight", "bias", "running_mean", "running_var") else name


def run(pair: NetworkPair, tensors: dict[fx.Node, Tensor], inputs: Sequence[Tensor]) -> Tensor:
    """Return the logits of one of the two networks, in float64."""
    env: dict[fx.Node, Any] = dict(zip(pair.inputs, inputs, strict=True)) | tensors
    for node in _calls(pair.graph):
        env[node] = evaluate(node, env)
    return env[pair.output]


def evaluate(node: fx.Node, env: dict[fx.Node, Any]) -> Any:
    """The value of a node, from the values of its inputs."""
    args = fx.map_arg(node.args, lambda n: env[n])
    kwargs = fx.map_arg(node.kwargs, lambda n: env[n])
    return node.target(*args, **kwargs)  # type: ignore[operator]


def check_values(
    pair: NetworkPair, tensors: dict[fx.Node, Tensor], inputs: Sequence[Tensor], expected: Tensor, which: str
) -> None:
    """Check that a graph computes the logits ``expected`` of the module that it was traced from.

    Args:
        which: ``"dense"`` or ``"sparse"``, for the message.

    Raises:
        GraphError: they differ by more than float64 rounding.
    """
    check_same(
        run(pair, tensors, inputs),
        expected,
        f"the traced graph does not compute the outputs of the {which} model",
        "the model may write into memory that it reads elsewhere",
    )


def check_same(found: Tensor, expected: Tensor, complaint: str, hint: str) -> None:
    """Check that two float64 runs of the same function agree.

    Raises:
        GraphError: they differ by more than rounding. The message is ``complaint``.
    """
    scale = float(expected.abs().max().clamp(min=1e-30))
    difference = float((found - expected).abs().max()) / scale if found.shape == expected.shape else float("inf")
    if not difference <= SAME:
        raise GraphError(
            complaint,
            expected=f"a relative difference of at most {SAME:.0e}",
            found=f"{difference:.1e}",
            hint=hint,
        )
