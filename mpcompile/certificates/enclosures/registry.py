"""The registry of rules: how each operator of an aten graph acts on enclosures.

Graphs are traced with ``make_fx`` before decomposition, so that a linear layer, a normalisation or an attention is one
node. An operator without a rule ends a certificate.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import fx

Rule = Callable[..., Any]
RULES: dict[str, Rule] = {}


class NoRule(Exception):
    """No rule encloses this operator; the message names it and, where known, says why."""


WHY = {  # operator -> why it has no rule
    "topk": "which tokens it picks depends on values",
    "sort": "the order depends on values",
    "argsort": "the order depends on values",
    "argmax": "it is not continuous",
    "embedding": "its index depends on values",
}


def operator_name(target: Any) -> str:
    """Return the name of an operator's rule: ``"linear"`` for ``aten.linear.default``, ``"mpcompile.token_merge"``."""
    packet = getattr(target, "overloadpacket", None)
    if packet is None:
        return str(getattr(target, "__name__", target))
    return str(packet).removeprefix("aten.")


def rule(*names: str) -> Callable[[Rule], Rule]:
    """Register the decorated function as the rule of the aten operators with these names."""

    def register(function: Rule) -> Rule:
        for name in names:
            RULES[name] = function
        return function

    return register


def enclose(node: fx.Node, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    """Return the enclosure of a node's value; arguments are enclosures where the node takes tensors.

    Raises:
        NoRule: the operator cannot be enclosed, or not with these arguments.
        Unbounded: the operator has a rule, but its value is not bounded on these enclosures.
    """
    name = operator_name(node.target)
    if name not in RULES:
        why = WHY.get(name, "which tokens are merged depends on values" if "token_" in name else "")
        raise NoRule(f"no rule encloses {name}" + (f": {why}" if why else ""))
    return RULES[name](*args, **kwargs)


def refuse(reason: str, refused: bool) -> None:
    """Raise :class:`NoRule` with this reason, if ``refused``."""
    if refused:
        raise NoRule(reason)
