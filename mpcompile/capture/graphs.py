"""Import of a GraphModule (from symbolic tracing, dynamo or torch.export), without tracing it again."""

from __future__ import annotations

import copy
from typing import Any

from torch import fx

from mpcompile.capture.copies import without_history
from mpcompile.capture.input_guards import guard_inputs
from mpcompile.capture.inputs import arguments, example_of
from mpcompile.capture.modes import captured_mode
from mpcompile.errors import InputError
from mpcompile.ir.module import Imported, IRModule, Lifted
from mpcompile.ir.nodes import dynamo_name, lifted_from
from mpcompile.ir.parts import carry

AS_GIVEN = "a graph as given"


def own_graph(gm: fx.GraphModule, *, share: bool, class_name: str | None = None) -> IRModule:
    """Return a copy of a GraphModule: private tables dropped, parameters and submodules copied unless ``share``."""
    graph = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    output = graph.graph_copy(gm.graph, copies)
    graph._codegen = copy.deepcopy(gm.graph._codegen)
    original = next(n for n in reversed(gm.graph.nodes) if n.op == "output")
    graph.output(output).meta = dict(original.meta)
    for old, new in copies.items():
        if old.op == "placeholder":  # layer names and AOTAutograd need the source of each input
            new._dynamo_source = getattr(old, "_dynamo_source", None)
    owned = IRModule(gm, graph, class_name=class_name or type(gm).__name__)
    owned.training = gm.training
    if not share:
        carry(gm, owned)
        memo: dict[int, Any] = without_history(owned)
        for table in ("_modules", "_parameters", "_buffers"):
            setattr(owned, table, copy.deepcopy(getattr(owned, table), memo))
    if isinstance(gm, IRModule):
        owned.meta = copy.deepcopy(gm.meta)
    elif not share:
        mode = captured_mode(graph)
        owned.locked_mode = mode
        if mode is not None:
            for module in owned.modules():
                module.training = mode
    return owned


def import_graph(gm: fx.GraphModule, example_inputs: Any, share: bool) -> Imported:
    """Import a GraphModule; without ``example_inputs``, the inputs have the shapes that its placeholders carry."""
    owned = own_graph(gm, share=share)
    if not share and not isinstance(gm, IRModule):  # dynamo checks the graphs that a backend shares
        guard_inputs(owned)
    placeholders = [n for n in owned.graph.nodes if n.op == "placeholder"]
    if example_inputs is not None:
        inputs = arguments(gm, example_inputs)
        lifted = lifted_from(owned, inputs)
        return Imported(owned, inputs, lifted, [], AS_GIVEN)
    if any(dynamo_name(n) for n in placeholders):
        raise InputError(
            "this graph takes its weights as inputs, so it does not hold their values",
            expected="example_inputs, the list that dynamo passes to a backend",
            found="None",
            hint="call mpcompile.transform(gm, example_inputs)",
        )
    missing = [n.name for n in placeholders if not {"val", "example_value"} & n.meta.keys()]  # the value may be None
    if missing:
        raise InputError(
            "this graph carries no shapes",
            expected="example_inputs, or 'val' or 'example_value' in the meta of every placeholder",
            found=f"none on {', '.join(missing)}",
            hint="call mpcompile.transform(gm, example_inputs)",
        )
    return Imported(owned, [example_of(n) for n in placeholders], Lifted(), [], AS_GIVEN)
