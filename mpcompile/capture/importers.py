"""Bring a model into the IR: a graph as it is, or a module by the first capture that succeeds.

The captures are tried in an order of how well their graphs can be worked on: symbolic tracing keeps modules and leaves
every shape free; torch.export (by bytecode, then by running forward) and dynamo follow control flow that depends on
shapes and options, and record operators. The result owns its parameters: they are copies, unless the graph takes them
as inputs (dynamo). The user's module is never changed.
"""

from __future__ import annotations

import inspect
import re
from pathlib import Path
from typing import Any

from torch import Tensor, fx, nn
from tqdm import tqdm

from mpcompile.capture.attention import expand_attention
from mpcompile.capture.checks import (
    check_backward_hooks,
    check_finite,
    check_hooks,
    check_module,
    check_values,
    not_a_model,
)
from mpcompile.capture.exported import dynamo_graph, export, free_batch, import_captured, strict_export
from mpcompile.capture.forms.products import number_paddings, unify_products
from mpcompile.capture.forms.results import number_results
from mpcompile.capture.graphs import import_graph
from mpcompile.capture.inputs import call_for, unfit
from mpcompile.capture.symbolic import Untraceable, import_module, place_of
from mpcompile.errors import InputError, MPCompileError, TraceError, summary
from mpcompile.ir.module import Imported
from mpcompile.ir.regions import inline_regions
from mpcompile.ir.shapes import propagate
from mpcompile.ir.view import layers, whole_functions

__all__ = ["Imported", "check_finite", "check_values", "import_model"]

_CAPTURES: dict[str, Any] = {
    "torch.export, strict": strict_export,
    "torch.export, non-strict": export,
    "dynamo": dynamo_graph,
}
_USER_CODE = re.compile(r'File "([^"]+)", line (\d+)')


def import_model(
    model: nn.Module, example_inputs: Any = None, *, share: bool = False, dynamic_shapes: Any = None
) -> Imported:
    """Import a module or a GraphModule into the IR.

    Args:
        model: captured by symbolic tracing, else by torch.export, else by dynamo, unless it is a GraphModule already.
        example_inputs: a tensor, a tuple of positional inputs, or a dict of keyword inputs. For a dynamo graph, the
            list that the backend received, parameters included. May be None if the graph carries shapes.
        share: use the user's tensors instead of copies (for the backend, which only reads them).
        dynamic_shapes: for torch.export, the axes that stay free; None: axis 0 of every tensor, where possible.

    Raises:
        InputError: example inputs missing or of the wrong kind, or weights that are not finite.
        TraceError: the module cannot be captured; ``attempts`` has each reason. Or it has no parameters.
    """
    if not isinstance(model, nn.Module):
        raise not_a_model(model)
    if not share:
        check_hooks(model)
    if isinstance(model, fx.GraphModule):
        imported = import_graph(model, example_inputs, share)
    else:
        check_module(model)
        imported = _checked(model, example_inputs, dynamic_shapes)
    inline_regions(imported.gm)
    number_results(imported.gm)
    unify_products(imported.gm, imported.lifted)
    if not share:
        number_paddings(imported.gm)
    expand_attention(imported)
    uses = layers(imported.gm, imported.lifted)
    biases = {f"{layer.name}.bias": layer.bias for layer in uses if isinstance(layer.bias, Tensor)}
    check_finite({layer.weight.name: layer.weight.tensor for layer in uses} | biases)
    everything = {imported.lifted.names[k]: v for k, v in imported.lifted.tensors.items()}
    parameters = dict(imported.gm.named_parameters())
    check_finite({**imported.gm.state_dict(), **parameters, **everything}, bounds=True)
    return imported


def _checked(model: nn.Module, example_inputs: Any, dynamic_shapes: Any) -> Imported:
    """Capture a module. A mapping that was taken as the one input has to be one that forward can work with."""
    if example_inputs is None:
        raise InputError(
            f"the shapes in {type(model).__name__} are not known",
            expected="example_inputs",
            found="None",
            hint="call mpcompile.transform(model, torch.randn(1, 3, 224, 224)) with an input of your size",
        )
    call = call_for(model, example_inputs)
    if not call.whole:
        return _capture(model, example_inputs, dynamic_shapes)
    try:
        imported = _capture(model, call.args, dynamic_shapes)
        propagate(imported.gm, imported.inputs)
    except MPCompileError as error:
        keys, name = ", ".join(call.args[0]), next(iter(inspect.signature(model.forward).parameters))
        raise unfit(TypeError(f"it takes {name!r}, not {keys}")) from error
    return imported


def _capture(model: nn.Module, example_inputs: Any, dynamic_shapes: Any) -> Imported:
    """Return the result of the first capture that succeeds.

    Raises:
        TraceError: none does.
    """
    reasons: dict[str, str] = {}
    first: TraceError | None = None
    traced: Imported | None = None
    if dynamic_shapes is None:
        try:
            traced = import_module(model, example_inputs)
            traced.captured = "symbolic tracing"
            whole = whole_functions(traced.gm, traced.lifted)
            if not whole:
                return traced
            reasons["symbolic tracing"] = f"it keeps {', '.join(whole)} whole, which takes weights"
        except TraceError as error:
            if error.final:
                raise
            first, reasons["symbolic tracing"] = error, error.message
    try:
        check_backward_hooks(model)
    except TraceError:
        if traced is not None:
            return traced
        raise
    with tqdm(_CAPTURES.items(), desc=f"capture {type(model).__name__}", disable=None, leave=False) as attempts:
        for name, capture in attempts:
            attempts.set_postfix_str(name, refresh=True)
            try:
                imported = import_captured(model, example_inputs, capture, dynamic_shapes)
            except InputError:
                raise
            except Exception as error:
                reasons[name] = _reason(error)
                continue
            batch = "batch free" if free_batch(imported.gm) else "batch fixed"
            imported.captured = f"{name}, {batch}"
            imported.notes += [f"{tried} failed: {reason}" for tried, reason in reasons.items()]
            return imported
    if traced is not None:
        return traced
    raise _refusal(model, reasons, first)


def _reason(error: Exception) -> str:
    """Return an error's class and first line, and the line of the user's model that it comes from, if it is known."""
    if isinstance(error, MPCompileError):
        return str(error)
    places = _USER_CODE.findall(str(error).partition("from user code")[2])
    where = f", {Path(places[-1][0]).name}:{places[-1][1]}" if places else place_of(error)
    return summary(error) + where


def _refusal(model: nn.Module, reasons: dict[str, str], first: TraceError | None) -> TraceError:
    """Return the error that names the reason of every capture.

    The first line has the reason of the capture that says most: dynamo, which strict export uses, names the branch on a
    tensor and its line; running forward fails in the model's own words.
    """
    attempts = [f"{name}: {reason}" for name, reason in reasons.items()]
    if first is not None and not isinstance(first, Untraceable):
        details: Any = {key: getattr(first, key) for key in ("layer", "expected", "found", "hint")}
        return TraceError(first.message, **details, attempts=attempts)
    branches = any(re.search("data-dependent", reason, re.IGNORECASE) for reason in reasons.values())
    by_tracing, by_running = reasons.get("symbolic tracing"), reasons["torch.export, non-strict"]
    alike = by_tracing is not None and by_running.startswith(by_tracing)  # what the model itself raises
    reason = reasons["torch.export, strict" if branches else "torch.export, non-strict"]
    return TraceError(
        f"{type(model).__name__} cannot be traced: {reason}",
        layer=first.layer if first else None,
        expected="a forward without data-dependent control flow" if branches or first is None else first.expected,
        found="a branch on the values of a tensor" if branches else first and first.found,
        hint="use torch.compile(model, backend='mpsparse', options={...}), which breaks the graph there",
        attempts=[] if alike else attempts,
    )
