"""Outputs that a user needs: the others are returned as None, and nothing is computed for them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any

from torch import fx

from mpcompile.capture.signature import outputs
from mpcompile.errors import ConfigError
from mpcompile.ir.effects import erase_unread
from mpcompile.ir.module import Imported, IRModule
from mpcompile.ir.nodes import dynamo_name


def named_outputs(gm: fx.GraphModule) -> dict[str, Any]:
    """Return what a graph returns by name, as :func:`mpcompile.capture.signature.outputs` does.

    Dynamo numbers the outputs of its graphs. There, an output has the name of its variable in the model's code.
    """
    found = outputs(gm)
    if not any(node.op == "placeholder" and dynamo_name(node) for node in gm.graph.nodes):
        return found
    return {value.name if isinstance(value, fx.Node) else name: value for name, value in found.items()}


def notes(names: Mapping[Any, str], spread: Sequence[fx.Node], norms: Sequence[str]) -> list[str]:
    """Return what a user of a model with merged tokens has to know, one sentence each.

    Args:
        names: output -> its name.
        spread: outputs that hold a value for each token.
        norms: names of norms that work on merged tokens.
    """
    found = []
    if spread:
        told = ", ".join(dict.fromkeys(names.get(node, node.name) for node in spread))
        found.append(f"returned for every input token, with the value of the merged token that holds it: {told}")
    if norms:
        told = ", ".join(dict.fromkeys(norms))
        found.append(f"after .train(), batch statistics are those of merged tokens, each counted once: {told}")
    return found


def select_outputs(imported: Imported, wanted: Sequence[str]) -> None:
    """Keep the named outputs of a graph, return None for the others, and note which these are.

    Args:
        imported: the graph; it is changed in place.
        wanted: names or glob patterns; all outputs if there are none.

    Raises:
        ConfigError: the graph returns nothing of that name; the message lists the names.

    Example:
        >>> from mpcompile.capture.importers import import_model
        >>> class Two(nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.body, self.head = nn.Linear(8, 8), nn.Linear(8, 2)
        ...     def forward(self, x):
        ...         x = self.body(x)
        ...         return {"logits": self.head(x), "features": x}
        >>> imported = import_model(Two(), torch.randn(3, 8))
        >>> select_outputs(imported, ["logits"])
        >>> imported.notes
        ['outputs that are None because only logits are asked for: features']
        >>> print(imported.gm(torch.randn(3, 8))["features"])
        None
    """
    if not wanted:
        return
    gm, found = imported.gm, named_outputs(imported.gm)
    for pattern in wanted:
        if not any(fnmatchcase(name, pattern) for name in found):
            raise ConfigError(
                f"the model returns nothing named {pattern!r}",
                expected=f"outputs among {', '.join(found)}",
                found=", ".join(wanted),
            )
    kept = {name for name in found if any(fnmatchcase(name, pattern) for pattern in wanted)}
    needed = {id(found[name]) for name in kept}
    unneeded = {name: node for name, node in found.items() if isinstance(node, fx.Node) and id(node) not in needed}
    if not unneeded:
        return
    _replace(gm, set(unneeded.values()))
    erase_unread(gm, unneeded.values())
    gm.recompile()
    asked = ", ".join(dict.fromkeys(wanted))
    imported.notes.append(f"outputs that are None because only {asked} are asked for: {', '.join(unneeded)}")


def _replace(gm: IRModule, unneeded: set[fx.Node]) -> None:
    """Let the output, and the namedtuples and dataclasses that are made for it, hold None in place of nodes."""
    makers = [gm.graph.output_node()]
    for maker in makers:
        makers += [node for node in maker.all_input_nodes if isinstance(node.target, type)]
        args: Any = fx.node.map_arg(maker.args, lambda node: None if node in unneeded else node)
        kwargs: Any = fx.node.map_arg(maker.kwargs, lambda node: None if node in unneeded else node)
        maker.args, maker.kwargs = args, kwargs
