"""Results that are read by name, ``x.topk(3).indices``, which torch.export and files write as ``x.topk(3)[1]``."""

from __future__ import annotations

import operator

from torch import fx

_FIELDS = {"values": 0, "indices": 1}
# Operators that return values and indices.
_PAIRS = {"cummax", "cummin", "kthvalue", "max", "median", "min", "mode", "nanmedian", "sort", "topk"}


def number_results(gm: fx.GraphModule) -> None:
    """Read the values and indices that an operator returns by their place.

    Example:
        >>> import torch
        >>> gm = fx.symbolic_trace(lambda x: x.topk(3).indices)
        >>> number_results(gm)
        >>> print(gm.code.strip().splitlines()[-2].strip())
        getitem = topk[1];  topk = None
    """
    changed = False
    for node in list(gm.graph.nodes):
        if node.target is not getattr or not isinstance(node.args[0], fx.Node) or node.args[1] not in _FIELDS:
            continue
        source, place = node.args[0], _FIELDS[node.args[1]]
        if source.op in ("call_function", "call_method") and _name(source) in _PAIRS:
            with gm.graph.inserting_before(node):
                item = gm.graph.call_function(operator.getitem, (source, place))
            item.meta = dict(node.meta)
            node.replace_all_uses_with(item)
            gm.graph.erase_node(node)
            changed = True
    if changed:
        gm.recompile()


def _name(node: fx.Node) -> str:
    return node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
