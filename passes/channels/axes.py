"""Axes: which axes of which weights are the same channels, for any graph that make_fx can trace.

Every axis of every tensor is a list of *atoms*, outermost first. Operators unify atoms (the channels that a layer
writes are those that the next one reads), split them (a reshape to heads), or freeze them (a slice picks places).
What stays unfrozen may be permuted everywhere at once without changing the network. An operator without a rule freezes
everything it touches and is named.

Taking a tensor apart along a small axis (q, k and v) gives every part atoms of its own: the atom that was shared
becomes *sliced*, and its children are tied together again only by tensors that hold it without the axis.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx.experimental.proxy_tensor import make_fx

from mpcompile.ir.numerics import training_flags

Axis = list[int]
Dims = list[Axis]

_MOST_SLICES = 8

_UNARY = frozenset(
    [
        "relu",
        "gelu",
        "silu",
        "sigmoid",
        "tanh",
        "hardswish",
        "hardsigmoid",
        "hardtanh",
        "relu6",
        "leaky_relu",
        "elu",
        "selu",
        "mish",
        "softplus",
        "dropout",
        "feature_dropout",
        "clone",
        "contiguous",
        "detach",
        "alias",
        "to",
        "_to_copy",
        "clamp",
        "clamp_min",
        "neg",
        "exp",
        "log",
        "sqrt",
        "rsqrt",
        "square",
        "abs",
        "erf",
        "pow",
        "reciprocal",
        "softmax",
        "log_softmax",
        "_softmax",
        "type_as",
        "lift_fresh",
    ]
)
_BROADCAST = frozenset(
    ("add", "sub", "rsub", "mul", "div", "true_divide", "addcmul", "addcdiv", "maximum", "minimum", "where", "pow")
)
_VIEWS = frozenset(
    ("reshape", "view", "_unsafe_view", "flatten", "unflatten", "squeeze", "unsqueeze", "view_as", "reshape_as")
)
_REDUCTIONS = frozenset(("mean", "sum", "amax", "amin", "var", "std", "linalg_vector_norm", "norm"))
_POOLS = frozenset(("max_pool2d", "avg_pool2d", "adaptive_avg_pool2d", "adaptive_max_pool2d"))


class Atoms:
    """Union-find over atoms."""

    def __init__(self) -> None:
        self.parent: list[int] = []
        self.size: list[int] = []
        self.frozen: list[bool] = []
        self.parts: dict[int, tuple[int, int]] = {}
        self.slices: dict[int, tuple[int, list[int]]] = {}

    def new(self, size: int, frozen: bool = False) -> int:
        self.parent.append(len(self.parent))
        self.size.append(size)
        self.frozen.append(frozen)
        return len(self.parent) - 1

    def find(self, a: int) -> int:
        while self.parent[a] != a:
            self.parent[a] = self.parent[self.parent[a]]
            a = self.parent[a]
        return a

    def expand(self, axis: Iterable[int]) -> Axis:
        """Representatives, split atoms replaced by their parts, those of size 1 left out."""
        found: Axis = []
        for a in axis:
            a = self.find(a)
            if a in self.parts:
                found += self.expand(self.parts[a])
            elif self.size[a] != 1:
                found.append(a)
        return found

    def freeze(self, axis: Iterable[int]) -> None:
        stack, seen = self.expand(axis), set()
        while stack:
            a = stack.pop()
            if a not in seen:
                seen.add(a)
                self.frozen[a] = True
                stack += self.expand(self.slices[a][1]) if a in self.slices else []

    def _below(self, a: int) -> set[int]:
        """All atoms that stand for parts of a sliced atom."""
        stack, seen = [a], set()
        while stack:
            a = stack.pop()
            for child in self.expand(self.slices[a][1]) if a in self.slices else []:
                if child not in seen:
                    seen.add(child)
                    stack.append(child)
        return seen

    def _merge(self, a: int, b: int) -> None:
        for whole, part in ((a, b), (b, a)):
            if part in self._below(whole):  # a slice can't be the whole: no order of either is free
                _, children = self.slices.pop(whole)
                self.freeze([whole, *children])
                for child in children:
                    self.unify([child], [whole])
                return
        self.parent[a] = b
        frozen = self.frozen[a] or self.frozen[b]
        left, right = self.slices.pop(a, None), self.slices.get(b)
        if left is not None and right is None:
            self.slices[b] = left
        elif left is not None and right is not None:
            if self.find(left[0]) == self.find(right[0]):
                for x, y in zip(left[1], right[1], strict=True):
                    self.unify([x], [y])
            else:
                frozen = True
                self.freeze([*left[1], *right[1]])
        self.frozen[b] = frozen
        if frozen:
            self.freeze([b])

    def unify(self, left: Axis, right: Axis) -> None:
        """Make two axes of one length the same channels in the same order; what doesn't tile freezes."""
        a, b = self.expand(left), self.expand(right)
        while a and b:
            x, y = a[0], b[0]
            if x == y:
                a, b = a[1:], b[1:]
            elif self.size[x] == self.size[y]:
                self._merge(x, y)
                a, b = self.expand(a[1:]), self.expand(b[1:])
            elif self.size[y] % self.size[x] == 0 and y not in self.slices:
                self.split(y, self.size[x])
                b = self.expand(b)
            elif self.size[x] % self.size[y] == 0 and x not in self.slices:
                self.split(x, self.size[y])
                a = self.expand(a)
            else:
                self.freeze([*a, *b])
                return
        self.freeze([*a, *b])

    def split(self, a: int, outer: int) -> None:
        """Atom a = (outer, inner)."""
        self.parts[a] = (self.new(outer, self.frozen[a]), self.new(self.size[a] // outer, self.frozen[a]))

    def children(self, a: int, selector: int) -> list[int] | None:
        """The atoms that stand for ``a`` at each place of ``selector``; None where it is sliced by another already."""
        if a not in self.slices:
            made = [self.new(self.size[a], self.frozen[a]) for _ in range(self.size[selector])]
            self.slices[a] = (selector, made)
        owner, found = self.slices[a]
        return found if self.find(owner) == selector else None


@dataclass
class Analysis:
    """What is known of a graph's axes.

    Attributes:
        dims: parameter or buffer name -> its axes.
        tensors: the axes of every tensor, activations too.
        unknown: operators without a rule.
    """

    atoms: Atoms
    dims: dict[str, Dims] = field(default_factory=dict)
    tensors: list[Dims] = field(default_factory=list)
    unknown: set[str] = field(default_factory=set)

    def settle(self) -> None:
        """Tie children of sliced atoms together again where a tensor holds the atom without its selector."""
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


class _Rules:
    """Axes of each node of an aten graph."""

    def __init__(self, graph: fx.Graph, names: Sequence[str]) -> None:
        self.atoms = Atoms()
        self.env: dict[Any, Any] = {}
        self.result = Analysis(self.atoms)
        placeholders = [n for n in graph.nodes if n.op == "placeholder"]
        for node, name in zip(placeholders, [*names, *[None] * len(placeholders)], strict=False):
            dims = self._fresh(node)
            self.env[node] = dims
            if name is None:
                self._freeze(dims)
            else:
                self.result.dims[name] = dims
        for node in graph.nodes:
            if node.op == "call_function":
                self._call(node)
            elif node.op == "get_attr":
                self.env[node] = []
            elif node.op == "output":
                for source in node.all_input_nodes:
                    self._freeze(self.env[source])
        for value in self.env.values():
            several = bool(value and value[0] and isinstance(value[0][0], list))  # what unbind gave
            self.result.tensors += value if several else [value]
        self.result.settle()

    def _shape(self, node: Any) -> tuple[int, ...]:
        value = node.meta.get("val") if isinstance(node, fx.Node) else None
        return tuple(map(int, value.shape)) if isinstance(value, Tensor) else ()

    def _fresh(self, node: fx.Node) -> Dims:
        return [[self.atoms.new(size)] for size in self._shape(node)]

    def _freeze(self, dims: Any) -> None:
        for axis in dims:
            if axis and isinstance(axis[0], list):
                self._freeze(axis)
            else:
                self.atoms.freeze(axis)

    def _broadcast(self, sources: Iterable[Any], out: Dims) -> None:
        for node in sources:
            if not isinstance(node, fx.Node) or not self._shape(node):
                continue
            dims, shape = self.env[node], self._shape(node)
            for i in range(1, len(dims) + 1):
                if shape[-i] != 1:
                    self.atoms.unify(dims[-i], out[-i])

    def _call(self, node: Any) -> None:
        target: Any = node.target
        name = getattr(target, "__name__", str(target)).split(".")[0]
        if hasattr(target, "overloadpacket"):
            name = str(target.overloadpacket).rsplit(".", 1)[-1]
            if not str(target).startswith("aten."):
                name = str(target)
        name = name.removesuffix("_") if not name.startswith("_") else name
        if name == "getitem":
            value = self.env[node.args[0]]
            self.env[node] = value[node.args[1]] if value and isinstance(value[0], list) else []
            return
        rule = getattr(self, f"_op_{name}", None)
        out = self._fresh(node)
        self.env[node] = out
        if rule is not None and rule(node, out):
            return
        if rule is None and name in _UNARY and not [a for a in node.args[1:] if isinstance(a, fx.Node)]:
            self._broadcast(node.args[:1], out)
        elif rule is None and name in _BROADCAST:
            self._broadcast([*node.args, *node.kwargs.values()], out)
        elif rule is None and name in _VIEWS:
            source = self.env[node.args[0]]
            self.atoms.unify([a for axis in source for a in axis], [a for axis in out for a in axis])
        elif rule is None and name in _REDUCTIONS:
            self._reduce(node, out)
        elif rule is None and name in _POOLS:
            self._pool(node, out)
        elif not out and not isinstance(node.meta.get("val"), (tuple, list)) and not node.all_input_nodes:
            return
        else:
            if rule is None:
                self.result.unknown.add(name)
            for source in node.all_input_nodes:
                self._freeze(self.env[source])
            self._freeze(self.env[node])
            value = node.meta.get("val")
            if isinstance(value, (tuple, list)):
                parts = [[[self.atoms.new(int(s), True)] for s in v.shape] for v in value if isinstance(v, Tensor)]
                self.env[node] = parts

    def _reduce(self, node: Any, out: Dims) -> None:
        source, shape = self.env[node.args[0]], self._shape(node.args[0])
        places = next((a for a in node.args[1:] if isinstance(a, (list, tuple))), node.kwargs.get("dim"))
        if places is None:
            last = node.args[1] if len(node.args) > 1 and isinstance(node.args[1], int) else None
            if last is None and out:
                self._freeze([*source, *out])
                return
            places = [last] if last is not None and len(out) != len(shape) else range(len(shape))
        gone = {p % len(shape) for p in places}
        kept = [axis for i, axis in enumerate(source) if i not in gone]
        if len(out) == len(shape):
            out = [axis for i, axis in enumerate(out) if i not in gone]
        for a, b in zip(kept, out, strict=True):
            self.atoms.unify(a, b)

    def _pool(self, node: Any, out: Dims) -> None:
        source = self.env[node.args[0]]
        for a, b in zip(source[:-2], out[:-2], strict=True):
            self.atoms.unify(a, b)
        self._freeze([*source[-2:], *out[-2:]])

    def _op_linear(self, node: Any, out: Dims) -> bool:
        x, w = self.env[node.args[0]], self.env[node.args[1]]
        self.atoms.unify(x[-1], w[1])
        self.atoms.unify(out[-1], w[0])
        for a, b in zip(x[:-1], out[:-1], strict=True):
            self.atoms.unify(a, b)
        if len(node.args) > 2 and node.args[2] is not None:
            self.atoms.unify(self.env[node.args[2]][0], w[0])
        return True

    def _op_conv2d(self, node: Any, out: Dims) -> bool:
        x, w = self.env[node.args[0]], self.env[node.args[1]]
        if len(x) != 4:
            return False
        groups = node.args[6] if len(node.args) > 6 else 1
        inner = self._shape(node.args[1])[1]
        if groups == 1:
            self.atoms.unify(x[1], w[1])
        else:  # channels (group, place within): the weight's axis 0 is (group, outputs), its axis 1 the place
            group = self.atoms.new(groups)
            self.atoms.unify(x[1], [group, *w[1]] if inner > 1 else [group])
            self.atoms.unify(w[0], [group, self.atoms.new(self._shape(node.args[1])[0] // groups)])
        self.atoms.unify(out[1], w[0])
        self.atoms.unify(out[0], x[0])
        self._freeze([*x[2:], *w[2:], *out[2:]])
        if len(node.args) > 2 and node.args[2] is not None:
            self.atoms.unify(self.env[node.args[2]][0], w[0])
        return True

    def _op_batch_norm(self, node: Any, out: Dims) -> bool:
        self._broadcast(node.args[:1], out)
        for value in node.args[1:5]:
            if isinstance(value, fx.Node):
                self.atoms.unify(self.env[value][0], out[1])
        return True

    def _op_layer_norm(self, node: Any, out: Dims) -> bool:
        self._broadcast(node.args[:1], out)
        for value in node.args[2:4]:
            if isinstance(value, fx.Node):
                for a, b in zip(reversed(self.env[value]), reversed(out), strict=False):
                    self.atoms.unify(a, b)
        return True

    def _op_group_norm(self, node: Any, out: Dims) -> bool:
        if node.args[1] != 1:
            return False
        self._broadcast(node.args[:1], out)
        for value in node.args[2:4]:
            if isinstance(value, fx.Node):
                self.atoms.unify(self.env[value][0], out[1])
        return True

    def _op_scaled_dot_product_attention(self, node: Any, out: Dims) -> bool:
        q, k, v = (self.env[a] for a in node.args[:3])
        if len(node.args) > 3 and node.args[3] is not None:
            self._freeze(self.env[node.args[3]])
            self._freeze([*q[:-1], *k[:-1]])
        self.atoms.unify(q[-1], k[-1])
        self.atoms.unify(k[-2], v[-2])
        self.atoms.unify(out[-1], v[-1])
        self.atoms.unify(out[-2], q[-2])
        for i in range(len(out) - 2):
            for side in (q, k, v):
                self.atoms.unify(side[i], out[i])
        return True

    def _op_matmul(self, node: Any, out: Dims) -> bool:
        a, b = self.env[node.args[0]], self.env[node.args[1]]
        if len(a) < 2 or len(a) != len(b):
            return False
        self.atoms.unify(a[-1], b[-2])
        self.atoms.unify(a[-2], out[-2])
        self.atoms.unify(b[-1], out[-1])
        for i in range(len(out) - 2):
            for side, shape in ((a, self._shape(node.args[0])), (b, self._shape(node.args[1]))):
                if shape[i] != 1:
                    self.atoms.unify(side[i], out[i])
        return True

    _op_bmm = _op_matmul

    def _op_transpose(self, node: Any, out: Dims) -> bool:
        source = list(self.env[node.args[0]])
        i, j = (node.args[1] % len(source), node.args[2] % len(source)) if len(node.args) > 2 else (0, 1)
        source[i], source[j] = source[j], source[i]
        self.env[node] = source
        return True

    def _op_t(self, node: Any, out: Dims) -> bool:
        self.env[node] = list(reversed(self.env[node.args[0]]))
        return True

    def _op_permute(self, node: Any, out: Dims) -> bool:
        source = self.env[node.args[0]]
        self.env[node] = [source[i] for i in node.args[1]]
        return True

    def _op_expand(self, node: Any, out: Dims) -> bool:
        self._broadcast(node.args[:1], out)
        return True

    def _op_cat(self, node: Any, out: Dims) -> bool:
        place = (node.args[1] if len(node.args) > 1 else node.kwargs.get("dim", 0)) % len(out)
        for source in node.args[0]:
            for i, (a, b) in enumerate(zip(self.env[source], out, strict=True)):
                if i == place:
                    self._freeze([a, b])
                else:
                    self.atoms.unify(a, b)
        return True

    def _op_select(self, node: Any, out: Dims) -> bool:
        source = self.env[node.args[0]]
        place = node.args[1] % len(source)
        size = self._shape(node.args[0])[place]
        parts = self._apart(source, place, size)
        self.env[node] = parts[node.args[2] % size]
        return True

    def _op_unbind(self, node: Any, out: Dims) -> bool:
        source = self.env[node.args[0]]
        place = (node.args[1] if len(node.args) > 1 else 0) % len(source)
        self.env[node] = self._apart(source, place, self._shape(node.args[0])[place])
        return True

    def _op_chunk(self, node: Any, out: Dims) -> bool:
        source = self.env[node.args[0]]
        place = (node.args[2] if len(node.args) > 2 else 0) % len(source)
        sizes = [v.shape[place] for v in node.meta["val"]]
        if len(set(sizes)) > 1:
            return False
        axis = self.atoms.expand(source[place])
        outer = self.atoms.new(len(sizes))
        self.atoms.unify([outer, self.atoms.new(sizes[0])], axis)
        axis = self.atoms.expand(source[place])
        if self.atoms.find(outer) != axis[0]:
            return False
        rest = [*source[:place], [axis[0]], axis[1:], *source[place + 1 :]]
        self.env[node] = self._apart(rest, place, len(sizes))
        return True

    _op_split = _op_chunk

    def _op_slice(self, node: Any, out: Dims) -> bool:
        source = self.env[node.args[0]]
        place = (node.args[1] if len(node.args) > 1 else 0) % len(source)
        for i, (a, b) in enumerate(zip(source, out, strict=True)):
            if i == place and self._shape(node) != self._shape(node.args[0]):
                self._freeze([a, b])
            else:
                self.atoms.unify(a, b)
        return True

    def _op_pad(self, node: Any, out: Dims) -> bool:
        source = self.env[node.args[0]]
        shapes = zip(self._shape(node.args[0]), self._shape(node), strict=True)
        for a, b, (before, after) in zip(source, out, shapes, strict=True):
            if before == after:
                self.atoms.unify(a, b)
            else:
                self._freeze([a, b])
        return True

    _op_constant_pad_nd = _op_pad

    def _apart(self, source: Dims, place: int, size: int) -> list[Dims]:
        """The axes of each part of a tensor that is taken apart along axis ``place``."""
        selector = self.atoms.expand(source[place])
        others = [axis for i, axis in enumerate(source) if i != place]
        self.atoms.freeze(selector)
        if len(selector) != 1 or size > _MOST_SLICES:
            return [others] * size
        parts: list[Dims] = [[] for _ in range(size)]
        for axis in others:
            expanded = self.atoms.expand(axis)
            made = [[a] * size if self.atoms.frozen[a] else self.atoms.children(a, selector[0]) for a in expanded]
            if any(m is None for m in made):
                self.atoms.freeze(expanded)
                made = [[a] * size for a in expanded]
            for i in range(size):
                parts[i].append([m[i] for m in made if m is not None])
        return parts


def analyse(gm: fx.GraphModule, inputs: Sequence[Any]) -> Analysis:
    """Axes of all parameters and buffers of a graph module, in eval mode.

    Args:
        inputs: example inputs, one a placeholder; shapes alone matter.
    """
    state = {**dict(gm.named_parameters()), **dict(gm.named_buffers())}

    def call(tensors: dict[str, Tensor], *values: Any) -> Any:
        return torch.func.functional_call(gm, tensors, values)

    with torch.no_grad(), training_flags(gm, False):
        graph = make_fx(call, tracing_mode="fake", pre_dispatch=True, _allow_non_fake_inputs=True)(state, *inputs).graph
    return _Rules(graph, list(state)).result
