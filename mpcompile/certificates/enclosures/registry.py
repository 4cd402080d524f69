"""The table of rules: what each operator of an aten graph does to enclosures.

Graphs come from ``make_fx`` before decomposition, so that a linear layer, a normalisation or an attention is one node.
An operator without a rule ends a certificate.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import fx

Rule = Callable[..., Any]
RULES: dict[str, Rule] = {}


class NoRule(Exception):
    """No rule encloses this operator; the message names it and says why, where that is known."""


WHY = {
    "topk": "which tokens it picks depends on values",
    "sort": "the order depends on values",
    "argsort": "the order depends on values",
    "argmax": "it is not continuous",
    "embedding": "its index depends on values",
}


def operator_name(target: Any) -> str:
    """``"linear"`` for ``aten.linear.default``, ``"mpcompile.token_merge"`` for an operator of ours."""
    packet = getattr(target, "overloadpacket", None)
    if packet is None:
        return str(getattr(target, "__name__", target))
    return str(packet).removeprefix("aten.")


def rule(*names: str) -> Callable[[Rule], Rule]:
    """Registers a rule under the names of aten operators."""

    def register(function: Rule) -> Rule:
        for name in names:
            RULES[name] = function
        return function

    return register


def enclose(node: fx.Node, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    """The enclosure of a node's value; arguments are enclosures where the node takes tensors.

    Raises:
        NoRule: the operator, or these arguments of it, can't be enclosed.
        Unbounded: it can, but on these values nothing bounds it.
    """
    name = operator_name(node.target)
    if name not in RULES:
        why = WHY.get(name, "which tokens become one depends on values" if "token_" in name else "")
        raise NoRule(f"no rule encloses {name}" + (f": {why}" if why else ""))
    return RULES[name](*args, **kwargs)


def refuse(reason: str, refused: bool) -> None:
    if refused:
        raise NoRule(reason)
