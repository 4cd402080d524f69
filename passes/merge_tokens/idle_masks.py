"""Idle masks: attention masks that hide nothing, constants that are all true, or all zero and added to logits.

Exported models build attention masks from ones, arange and full although every token may see every other. Such a mask
has no effect, and without it tokens can merge. Only masks that depend neither on data nor on parameters count: a
relative position bias that starts at zero may be trained later.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, fx, nn

from mpcompile.ir.effects import erase_unread, written
from mpcompile.ir.macs import is_add
from mpcompile.ir.module import IRModule, Lifted
from mpcompile.ir.nodes import ATTENTION, argument, fake_value, hint, shape_of, target_name
from mpcompile.ir.parts import attribute
from mpcompile.passes.merge_tokens.sites import find_attentions, is_matmul

_LARGEST = 1 << 26  # maximum number of elements of a constant that is evaluated
_RANDOM = ("rand", "bernoulli", "multinomial", "normal", "dropout", "uniform", "empty")
_FILLED = {"ones_like": 1, "zeros_like": 0, "new_ones": 1, "new_zeros": 0}
_MISSING = object()


class Constants:
    """Evaluates nodes that depend on shapes alone, for the shapes of the graph's example inputs."""

    def __init__(self, gm: IRModule, lifted: Lifted) -> None:
        self.gm, self.lifted = gm, lifted
        self.known: dict[fx.Node, Any] = {}

    def value(self, node: Any) -> Any:
        """Return the value of a node, or ``_MISSING`` if it depends on data or parameters, or is unknown."""
        if not isinstance(node, fx.Node):
            return node
        if node not in self.known:
            self.known[node] = _MISSING  # while it is being computed
            self.known[node] = self._compute(node)
        return self.known[node]

    def _compute(self, node: fx.Node) -> Any:
        fake = fake_value(node)
        if isinstance(fake, (bool, int, float, torch.SymInt, torch.dtype, torch.device, torch.Size)):
            return tuple(map(hint, fake)) if isinstance(fake, torch.Size) else hint(fake)
        if node.target is getattr and isinstance(node.args[0], fx.Node):
            source = fake_value(node.args[0])
            read = getattr(source, str(node.args[1]), _MISSING) if isinstance(source, Tensor) else _MISSING
            return tuple(map(hint, read)) if isinstance(read, torch.Size) else read
        if node.op == "call_method" and node.target == "size" and isinstance(shape_of(node.all_input_nodes[0]), tuple):
            return shape_of(node.all_input_nodes[0])
        if node.op in ("get_attr", "placeholder"):
            owned = node.op == "get_attr"
            tensor = attribute(self.gm, str(node.target)) if owned else self.lifted.tensors.get(node.name)
            held = isinstance(tensor, Tensor) and not isinstance(tensor, nn.Parameter)
            return tensor if held else _MISSING
        if node.op not in ("call_function", "call_method") or not isinstance(fake, (Tensor, tuple, list)):
            return _MISSING
        if isinstance(fake, Tensor) and fake.numel() > _LARGEST:
            return _MISSING
        return self._called(node, fake)

    def _called(self, node: fx.Node, fake: Any) -> Any:
        name = target_name(self.gm, node)
        if isinstance(fake, Tensor) and name in (*_FILLED, "full_like", "new_full"):
            fill = _FILLED.get(name, argument(node, 2 if name == "new_full" else 1, "fill_value"))
            fill = self.value(fill)
            return fill if fill is _MISSING else torch.full([*map(hint, fake.shape)], fill, dtype=fake.dtype)
        if any(word in name for word in _RANDOM):
            return _MISSING
        values = {n: self.value(n) for n in node.all_input_nodes}
        if any(value is _MISSING for value in values.values()):
            return _MISSING
        # The call may write into its operands.
        values = {n: v.clone() if isinstance(v, Tensor) else v for n, v in values.items()}
        args: Any = fx.node.map_arg(node.args, values.__getitem__)
        kwargs: Any = fx.node.map_arg(node.kwargs, values.__getitem__)
        kwargs = {key: torch.device("cpu") if key == "device" else value for key, value in kwargs.items()}
        try:
            with torch.no_grad():
                if node.op == "call_method":
                    return getattr(args[0], str(node.target))(*args[1:], **kwargs)
                return node.target(*args, **kwargs)  # type: ignore[operator]
        except Exception:
            return _MISSING

    def fixed(self, node: fx.Node) -> Tensor | None:
        """Return the tensor that a node always yields, or None; None too if a node writes into one of its sources."""
        value = self.value(node)
        if not isinstance(value, Tensor):
            return None
        stack, related = [node], {node}
        while stack:
            for source in stack.pop().all_input_nodes:
                if source not in related and isinstance(self.known.get(source), Tensor):
                    related.add(source)
                    stack.append(source)
        views = list(related)
        while views:
            for user in views.pop().users:
                if user in related or not isinstance(fake_value(user), (Tensor, type(None))):
                    continue
                if written(self.gm, user):
                    return None
                if isinstance(fake_value(user), Tensor) and self.value(user) is not _MISSING:
                    related.add(user)
                    views.append(user)
        return value


def _is_all(value: Tensor | None, true: bool) -> bool:
    """Return True if a mask is true everywhere or, unless ``true``, zero everywhere."""
    if value is None:
        return False
    return bool(value.all()) if true else not bool(value.any())


def hides_nothing(constants: Constants, mask: Any) -> bool:
    """Return True if an attention mask (boolean, or added to the logits) lets every token see every other."""
    value = constants.fixed(mask) if isinstance(mask, fx.Node) else None
    return value is not None and _is_all(value, value.dtype is torch.bool)


def _idle_step(constants: Constants, node: fx.Node) -> fx.Node | None:
    """Return the logits that a masking node yields unchanged; None if it changes them, or masks nothing."""
    name = target_name(constants.gm, node)
    source: Any = None
    if is_add(node) and len(node.args) == 2 and not node.kwargs:
        first, second = node.args
        for logits, mask in ((first, second), (second, first)):
            if isinstance(mask, fx.Node) and isinstance(logits, fx.Node) and _is_all(constants.fixed(mask), False):
                source = logits
    elif name in ("masked_fill", "masked_fill_") and isinstance(node.args[1], fx.Node):
        source = node.args[0] if _is_all(constants.fixed(node.args[1]), False) else None
    elif name == "where" and len(node.args) == 3 and isinstance(node.args[0], fx.Node):
        source = node.args[1] if _is_all(constants.fixed(node.args[0]), True) else None
    if not isinstance(source, fx.Node):
        return None
    before, after = fake_value(source), fake_value(node)
    same = isinstance(before, Tensor) and shape_of(source) == shape_of(node) and before.dtype == after.dtype
    return source if same else None


def idle_masks(gm: IRModule, lifted: Lifted) -> Mapping[fx.Node, fx.Node | None]:
    """Return fused attention with an idle mask -> None, and idle masking of written-out logits -> these logits."""
    constants, idle = Constants(gm, lifted), dict[fx.Node, fx.Node | None]()
    for attention in find_attentions(gm):
        if attention.anchor.target in ATTENTION:
            if hides_nothing(constants, argument(attention.anchor, 3, "attn_mask")):
                idle[attention.anchor] = None
            continue
        stack, seen = [attention.anchor], {attention.anchor}
        while stack:  # from the softmax up to the product of queries and keys
            for node in stack.pop().all_input_nodes:
                if node in seen or is_matmul(node) or shape_of(node) != shape_of(attention.anchor):
                    continue
                seen.add(node)
                stack.append(node)
                source = _idle_step(constants, node)
                if source is not None:
                    idle[node] = source
    return idle


def drop(gm: IRModule, idle: Mapping[fx.Node, fx.Node | None]) -> None:
    """Remove idle masks from a graph, along with the nodes that computed nothing else."""
    unread = [n for node in idle for n in node.all_input_nodes if n not in idle]
    for node, source in idle.items():
        if source is not None:
            node.replace_all_uses_with(source)
            gm.graph.erase_node(node)
        elif len(node.args) > 3:
            node.update_arg(3, None)
        else:
            node.kwargs = {key: value for key, value in node.kwargs.items() if key != "attn_mask"}
    erase_unread(gm, unread)
