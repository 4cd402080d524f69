"""The mode that a graph was captured in: torch.export, dynamo and symbolic_trace read ``self.training`` once."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import fx

_ATEN = torch.ops.aten
# Operator -> position and name of its training flag.
_FLAGS: dict[Any, tuple[int, str]] = {
    **dict.fromkeys([F.dropout, F.dropout1d, F.dropout2d, F.dropout3d], (2, "training")),
    **dict.fromkeys([F.alpha_dropout, F.feature_alpha_dropout], (2, "training")),
    **dict.fromkeys([torch.dropout, torch.feature_dropout, torch.alpha_dropout], (2, "train")),
    F.batch_norm: (5, "training"),
    torch.batch_norm: (5, "training"),
    F.instance_norm: (5, "use_input_stats"),
    F.rrelu: (3, "training"),
    torch.rrelu: (3, "training"),
    F.multi_head_attention_forward: (13, "training"),
    _ATEN.dropout.default: (2, "train"),
    _ATEN.feature_dropout.default: (2, "train"),
    _ATEN.alpha_dropout.default: (2, "train"),
    _ATEN.feature_alpha_dropout.default: (2, "train"),
    _ATEN.native_dropout.default: (2, "train"),
    _ATEN.rrelu.default: (3, "training"),
    _ATEN.batch_norm.default: (5, "training"),
    _ATEN.cudnn_batch_norm.default: (5, "training"),
    _ATEN.native_batch_norm.default: (5, "training"),
    _ATEN._native_batch_norm_legit.default: (5, "training"),
    _ATEN._native_batch_norm_legit_functional.default: (5, "training"),
}
_ATTENTION = {F.scaled_dot_product_attention: 4, _ATEN.scaled_dot_product_attention.default: 4}
_EVALUATING = frozenset({_ATEN._native_batch_norm_legit_no_training.default})
_RANDOM = ("bernoulli", "rand", "randn", "randint", "randperm", "uniform", "normal", "exponential", "rrelu_with_noise")


def _flag(node: fx.Node) -> bool | None:
    """Return the training flag that a node was captured with; None if it has none, or a computed one."""
    if node.op != "call_function":
        return None
    if node.target in _EVALUATING:
        return False
    if node.target in _ATTENTION:
        place = _ATTENTION[node.target]
        rate = node.args[place] if len(node.args) > place else node.kwargs.get("dropout_p", 0.0)
        return True if isinstance(rate, (int, float)) and rate > 0 else None
    place, name = _FLAGS.get(node.target, (0, ""))
    value = node.args[place] if name and len(node.args) > place else node.kwargs.get(name)
    return value if isinstance(value, bool) else None


def _draws(node: fx.Node) -> bool:
    """Return True if an exported node is one of torch's random functions."""
    packet = getattr(node.target, "overloadpacket", None)
    return packet is not None and packet.__name__.removesuffix("_").removesuffix("_like") in _RANDOM


def captured_mode(graph: fx.Graph) -> bool | None:
    """Return the training flag that a graph was captured with, or None if its layers follow ``train()`` and ``eval()``.

    A single node with a true flag is enough to call it training, since a model may train with frozen normalisation. An
    exported graph always has one mode. Without a sign of training it counts as captured in ``eval()``, the mode that
    export is meant for: stochastic depth, for example, leaves no trace in that mode.
    """
    flags = [flag for flag in map(_flag, graph.nodes) if flag is not None]
    if any(flags):
        return True
    functions = [node for node in graph.nodes if node.op == "call_function"]
    exported = [node for node in functions if isinstance(node.target, torch._ops.OpOverload)]
    if exported and not any(node.op in ("call_method", "call_module") and node.users for node in graph.nodes):
        return any(map(_draws, exported))
    return False if flags else None
