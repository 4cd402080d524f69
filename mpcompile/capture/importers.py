"""Bring a model into the IR: trace a module symbolically, or take a GraphModule (symbolic, dynamo, export) as it is.

The result owns its parameters: they are copies, unless the graph takes them as inputs (dynamo). The user's module is
never changed.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, fx, nn

from mpcompile.capture.attention import expand_attention
from mpcompile.capture.checks import check_finite, check_hooks, check_values, not_a_model
from mpcompile.capture.graphs import import_graph
from mpcompile.capture.products import number_paddings, unify_products
from mpcompile.capture.symbolic import import_module
from mpcompile.ir.module import Imported
from mpcompile.ir.regions import inline_regions
from mpcompile.ir.view import layers

__all__ = ["Imported", "check_finite", "check_values", "import_model"]


def import_model(model: nn.Module, example_inputs: Any = None, *, share: bool = False) -> Imported:
    """Import a module or a GraphModule into the IR.

    Args:
        model: traced symbolically unless it is a GraphModule already.
        example_inputs: a tensor, a tuple of positional inputs, or a dict of keyword inputs. For a dynamo graph, the
            list that the backend received, parameters included. May be None if the graph carries shapes.
        share: use the user's tensors instead of copies (for the backend, which only reads them).

    Raises:
        InputError: example inputs missing or of the wrong kind, or weights that are not finite.
        TraceError: the module cannot be traced, or has no parameters.
    """
    if not isinstance(model, nn.Module):
        raise not_a_model(model)
    if not share:
        check_hooks(model)
    if isinstance(model, fx.GraphModule):
        imported = import_graph(model, example_inputs, share)
    else:
        imported = import_module(model, example_inputs)
    inline_regions(imported.gm)
    unify_products(imported.gm, imported.lifted)
    if not share:
        number_paddings(imported.gm)
    expand_attention(imported)
    uses = layers(imported.gm, imported.lifted)
    biases = {f"{layer.name}.bias": layer.bias for layer in uses if isinstance(layer.bias, Tensor)}
    check_finite({layer.weight.name: layer.weight.tensor for layer in uses} | biases)
    everything = {imported.lifted.names[k]: v for k, v in imported.lifted.tensors.items()}
    check_finite({**imported.gm.state_dict(), **everything}, bounds=True)
    return imported
