"""Rules: the effect of each aten operator on the axes of its operands, as a table by operator name.

A rule takes the walk's :class:`Axes`, a node and fresh axes of the node's result. It unifies the axes that the operator
ties together, and returns the axes of the result (a list of them where it yields several tensors), or None where it
cannot follow this call, whose operands are then frozen. To teach the analysis another operator, write such a function
under ``@rule("name")``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from torch import Tensor, fx

from mpcompile.passes.channels.atoms import Atoms, Dims

Result = Dims | list[Dims]

_MOST_SLICES = 8  # maximum number of parts of a tensor that may each have a channel order of their own


class Axes:
    """The axes of every value computed so far, and the operations that rules apply to them.

    Attributes:
        of: node -> its axes; for a node that yields several tensors, a list with the axes of each.
    """

    def __init__(self) -> None:
        self.atoms = Atoms()
        self.of: dict[Any, Any] = {}

    def shape(self, node: Any) -> tuple[int, ...]:
        value = node.meta.get("val") if isinstance(node, fx.Node) else None
        return tuple(map(int, value.shape)) if isinstance(value, Tensor) else ()

    def fresh(self, node: fx.Node) -> Dims:
        """Return new axes for a node's result, one atom each."""
        return [[self.atoms.new(size)] for size in self.shape(node)]

    def freeze(self, dims: Any) -> None:
        """Freeze all axes of a tensor, or of several."""
        for axis in dims:
            if axis and isinstance(axis[0], list):
                self.freeze(axis)
            else:
                self.atoms.freeze(axis)

    def tie(self, left: Iterable[list[int]], right: Iterable[list[int]]) -> None:
        """Unify axes pairwise."""
        for a, b in zip(left, right, strict=True):
            self.atoms.unify(a, b)

    def broadcast(self, operands: Iterable[Any], out: Dims) -> None:
        """Unify the axes of operands and result, aligned at the last axis; axes of length 1 broadcast."""
        for node in operands:
            if not isinstance(node, fx.Node) or not self.shape(node):
                continue
            dims, shape = self.of[node], self.shape(node)
            for i in range(1, len(dims) + 1):
                if shape[-i] != 1:
                    self.atoms.unify(dims[-i], out[-i])

    def take_apart(self, source: Dims, dim: int, size: int) -> list[Dims]:
        """Return the axes of each of the ``size`` parts of a tensor that is taken apart along axis ``dim``."""
        selector = self.atoms.expand(source[dim])
        others = [axis for i, axis in enumerate(source) if i != dim]
        self.atoms.freeze(selector)
        if len(selector) != 1 or size > _MOST_SLICES:
            return [others] * size
        parts: list[Dims] = [[] for _ in range(size)]
        for axis in others:
            expanded = self.atoms.expand(axis)
            children = [[a] * size if self.atoms.frozen[a] else self.atoms.slice(a, selector[0]) for a in expanded]
            if any(child is None for child in children):
                self.atoms.freeze(expanded)
                children = [[a] * size for a in expanded]
            for i in range(size):
                parts[i].append([child[i] for child in children if child is not None])
        return parts


Rule = Callable[[Axes, Any, Dims], "Result | None"]

RULES: dict[str, Rule] = {}

_UNARY = frozenset(
    [
        *("relu", "gelu", "silu", "sigmoid", "tanh", "hardswish", "hardsigmoid", "hardtanh", "relu6", "leaky_relu"),
        *("elu", "selu", "mish", "softplus", "dropout", "feature_dropout", "softmax", "log_softmax", "_softmax"),
        *("clone", "contiguous", "detach", "alias", "to", "_to_copy", "lift_fresh", "clamp", "clamp_min", "neg"),
        *("exp", "log", "sqrt", "rsqrt", "square", "abs", "erf", "reciprocal"),
    ]
)


def find_rule(name: str, node: fx.Node) -> Rule | None:
    """Return the rule for a call of operator ``name``, or None where there is none.

    Elementwise operators of one tensor have none if the call has a second tensor (``clamp`` to a tensor of limits).
    """
    if name in _UNARY and any(isinstance(a, fx.Node) for a in node.args[1:]):
        return None
    return RULES.get(name)


def rule(*names: str) -> Callable[[Rule], Rule]:
    """Register a function as the rule of some operators, by their names without overload and trailing underscore."""

    def register(function: Rule) -> Rule:
        RULES.update(dict.fromkeys(names, function))
        return function

    return register


@rule(*sorted(_UNARY), "expand")
def _unary(axes: Axes, node: Any, out: Dims) -> Result:
    axes.broadcast(node.args[:1], out)
    return out


@rule("add", "sub", "rsub", "mul", "div", "true_divide", "addcmul", "addcdiv", "maximum", "minimum", "where", "pow")
def _elementwise(axes: Axes, node: Any, out: Dims) -> Result:
    axes.broadcast([*node.args, *node.kwargs.values()], out)
    return out


@rule("reshape", "view", "_unsafe_view", "flatten", "unflatten", "squeeze", "unsqueeze", "view_as", "reshape_as")
def _view(axes: Axes, node: Any, out: Dims) -> Result:
    source = axes.of[node.args[0]]
    axes.atoms.unify([a for axis in source for a in axis], [a for axis in out for a in axis])
    return out


@rule("mean", "sum", "amax", "amin", "var", "std", "linalg_vector_norm", "norm")
def _reduction(axes: Axes, node: Any, out: Dims) -> Result:
    source, shape = axes.of[node.args[0]], axes.shape(node.args[0])
    reduced = next((a for a in node.args[1:] if isinstance(a, (list, tuple))), node.kwargs.get("dim"))
    if reduced is None:
        last = node.args[1] if len(node.args) > 1 and isinstance(node.args[1], int) else None
        if last is None and out:
            axes.freeze([*source, *out])
            return out
        reduced = [last] if last is not None and len(out) != len(shape) else range(len(shape))
    gone = {dim % len(shape) for dim in reduced}
    left = [axis for i, axis in enumerate(source) if i not in gone]
    held = [axis for i, axis in enumerate(out) if i not in gone] if len(out) == len(shape) else out
    axes.tie(left, held)
    return out


@rule("max_pool2d", "avg_pool2d", "adaptive_avg_pool2d", "adaptive_max_pool2d")
def _pool(axes: Axes, node: Any, out: Dims) -> Result:
    source = axes.of[node.args[0]]
    axes.tie(source[:-2], out[:-2])
    axes.freeze([*source[-2:], *out[-2:]])
    return out


@rule("linear")
def _linear(axes: Axes, node: Any, out: Dims) -> Result:
    x, w = axes.of[node.args[0]], axes.of[node.args[1]]
    axes.atoms.unify(x[-1], w[1])
    axes.atoms.unify(out[-1], w[0])
    axes.tie(x[:-1], out[:-1])
    if len(node.args) > 2 and node.args[2] is not None:
        axes.atoms.unify(axes.of[node.args[2]][0], w[0])
    return out


@rule("conv2d")
def _conv2d(axes: Axes, node: Any, out: Dims) -> Result | None:
    atoms, x, w = axes.atoms, axes.of[node.args[0]], axes.of[node.args[1]]
    if len(x) != 4:
        return None
    groups = node.args[6] if len(node.args) > 6 else 1
    outputs, inner = axes.shape(node.args[1])[:2]
    if groups == 1:
        atoms.unify(x[1], w[1])
    else:  # channels (group, place within): the weight's axis 0 is (group, outputs), its axis 1 the place
        group = atoms.new(groups)
        atoms.unify(x[1], [group, *w[1]] if inner > 1 else [group])
        atoms.unify(w[0], [group, atoms.new(outputs // groups)])
    atoms.unify(out[1], w[0])
    atoms.unify(out[0], x[0])
    axes.freeze([*x[2:], *w[2:], *out[2:]])
    if len(node.args) > 2 and node.args[2] is not None:
        atoms.unify(axes.of[node.args[2]][0], w[0])
    return out


def _per_channel(axes: Axes, inputs: Any, parameters: Any, out: Dims) -> Result:
    """An operator whose parameters hold one value per channel, axis 1."""
    axes.broadcast(inputs, out)
    for value in parameters:
        if isinstance(value, fx.Node):
            axes.atoms.unify(axes.of[value][0], out[1])
    return out


@rule("batch_norm")
def _batch_norm(axes: Axes, node: Any, out: Dims) -> Result:
    return _per_channel(axes, node.args[:1], node.args[1:5], out)


@rule("layer_norm")
def _layer_norm(axes: Axes, node: Any, out: Dims) -> Result:
    axes.broadcast(node.args[:1], out)
    for value in node.args[2:4]:
        if isinstance(value, fx.Node):
            for a, b in zip(reversed(axes.of[value]), reversed(out), strict=False):
                axes.atoms.unify(a, b)
    return out


@rule("group_norm")
def _group_norm(axes: Axes, node: Any, out: Dims) -> Result | None:
    if node.args[1] != 1:
        return None
    return _per_channel(axes, node.args[:1], node.args[2:4], out)


@rule("scaled_dot_product_attention")
def _attention(axes: Axes, node: Any, out: Dims) -> Result:
    q, k, v = (axes.of[a] for a in node.args[:3])
    if len(node.args) > 3 and node.args[3] is not None:
        axes.freeze(axes.of[node.args[3]])
        axes.freeze([*q[:-1], *k[:-1]])
    axes.atoms.unify(q[-1], k[-1])
    axes.atoms.unify(k[-2], v[-2])
    axes.atoms.unify(out[-1], v[-1])
    axes.atoms.unify(out[-2], q[-2])
    for i in range(len(out) - 2):
        for side in (q, k, v):
            axes.atoms.unify(side[i], out[i])
    return out


@rule("matmul", "bmm")
def _matmul(axes: Axes, node: Any, out: Dims) -> Result | None:
    a, b = axes.of[node.args[0]], axes.of[node.args[1]]
    if len(a) < 2 or len(a) != len(b):
        return None
    axes.atoms.unify(a[-1], b[-2])
    axes.atoms.unify(a[-2], out[-2])
    axes.atoms.unify(b[-1], out[-1])
    for i in range(len(out) - 2):
        for side, shape in ((a, axes.shape(node.args[0])), (b, axes.shape(node.args[1]))):
            if shape[i] != 1:
                axes.atoms.unify(side[i], out[i])
    return out


@rule("transpose")
def _transpose(axes: Axes, node: Any, out: Dims) -> Result:
    source = list(axes.of[node.args[0]])
    i, j = (node.args[1] % len(source), node.args[2] % len(source)) if len(node.args) > 2 else (0, 1)
    source[i], source[j] = source[j], source[i]
    return source


@rule("t")
def _t(axes: Axes, node: Any, out: Dims) -> Result:
    return list(reversed(axes.of[node.args[0]]))


@rule("permute")
def _permute(axes: Axes, node: Any, out: Dims) -> Result:
    source = axes.of[node.args[0]]
    return [source[i] for i in node.args[1]]


@rule("cat")
def _cat(axes: Axes, node: Any, out: Dims) -> Result:
    dim = (node.args[1] if len(node.args) > 1 else node.kwargs.get("dim", 0)) % len(out)
    for source in node.args[0]:
        for i, (a, b) in enumerate(zip(axes.of[source], out, strict=True)):
            if i == dim:
                axes.freeze([a, b])
            else:
                axes.atoms.unify(a, b)
    return out


@rule("select")
def _select(axes: Axes, node: Any, out: Dims) -> Result:
    source = axes.of[node.args[0]]
    dim = node.args[1] % len(source)
    size = axes.shape(node.args[0])[dim]
    return axes.take_apart(source, dim, size)[node.args[2] % size]


@rule("unbind")
def _unbind(axes: Axes, node: Any, out: Dims) -> Result:
    source = axes.of[node.args[0]]
    dim = (node.args[1] if len(node.args) > 1 else 0) % len(source)
    return axes.take_apart(source, dim, axes.shape(node.args[0])[dim])


@rule("chunk", "split")
def _chunk(axes: Axes, node: Any, out: Dims) -> Result | None:
    atoms, source = axes.atoms, axes.of[node.args[0]]
    dim = (node.args[2] if len(node.args) > 2 else 0) % len(source)
    sizes = [v.shape[dim] for v in node.meta["val"]]
    if len(set(sizes)) > 1:
        return None
    axis = atoms.expand(source[dim])
    outer = atoms.new(len(sizes))
    atoms.unify([outer, atoms.new(sizes[0])], axis)
    axis = atoms.expand(source[dim])
    if atoms.find(outer) != axis[0]:
        return None
    parts = [*source[:dim], [axis[0]], axis[1:], *source[dim + 1 :]]
    return axes.take_apart(parts, dim, len(sizes))


@rule("slice")
def _slice(axes: Axes, node: Any, out: Dims) -> Result:
    source = axes.of[node.args[0]]
    dim = (node.args[1] if len(node.args) > 1 else 0) % len(source)
    for i, (a, b) in enumerate(zip(source, out, strict=True)):
        if i == dim and axes.shape(node) != axes.shape(node.args[0]):
            axes.freeze([a, b])
        else:
            axes.atoms.unify(a, b)
    return out


@rule("pad", "constant_pad_nd")
def _pad(axes: Axes, node: Any, out: Dims) -> Result:
    lengths = zip(axes.shape(node.args[0]), axes.shape(node), strict=True)
    for a, b, (before, after) in zip(axes.of[node.args[0]], out, lengths, strict=True):
        if before == after:
            axes.atoms.unify(a, b)
        else:
            axes.freeze([a, b])
    return out
