"""Import of a module through torch.export, or through dynamo's capture of one whole graph.

Both keep the names and the trees of inputs and outputs. A graph of torch.export consists of aten operators; one of
dynamo, of torch's functions and methods, as forward calls them.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import io
import sys
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.export import Dim, ShapesCollection
from torch.utils import _pytree as pytree

from mpcompile.capture.copies import copy_of
from mpcompile.capture.graphs import own_graph
from mpcompile.capture.input_guards import guard_inputs
from mpcompile.capture.inputs import Call, call_for
from mpcompile.capture.signature import flatten_inputs
from mpcompile.capture.unify import unify_modes
from mpcompile.errors import InputError, TraceError, summary
from mpcompile.ir.isolation import generators_kept, untouched, without_global_hooks
from mpcompile.ir.module import Imported, Lifted
from mpcompile.ir.nodes import fake_value
from mpcompile.ir.numerics import training_flags
from mpcompile.ir.parts import attribute, carry
from mpcompile.layers import InputGuard

_ATEN = torch.ops.aten
# Checks that torch.export records beside the computation: dtypes and devices that its example had.
_CHECKS = frozenset({_ATEN._assert_tensor_metadata.default})
_Capture = Callable[[nn.Module, Call, Any], fx.GraphModule]


def strict_export(model: nn.Module, call: Call, shapes: Any) -> fx.GraphModule:
    """Export a module by interpreting its bytecode."""
    return torch.export.export(model, call.args, call.kwargs, dynamic_shapes=shapes, strict=True).module(False)


def export(model: nn.Module, call: Call, shapes: Any) -> fx.GraphModule:
    """Export a module by running its forward on fake tensors."""
    handle = model.register_forward_hook(_register_outputs)
    try:
        return torch.export.export(model, call.args, call.kwargs, dynamic_shapes=shapes, strict=False).module(False)
    finally:
        handle.remove()


def dynamo_graph(model: nn.Module, call: Call, shapes: Any) -> fx.GraphModule:
    """Capture a module with dynamo, as one graph without breaks, whose weights keep their names.

    ``shapes`` is of use only to torch.export: where it is one of the user's, there is no capture by dynamo.
    """
    if not isinstance(shapes, ShapesCollection):
        raise TypeError("dynamic_shapes are for torch.export alone")
    args, kwargs = pytree.tree_map_only(Tensor, lambda t: t.detach().clone(), (call.args, call.kwargs))
    for tensor in pytree.tree_leaves((args, kwargs)):
        if isinstance(tensor, Tensor) and tensor.dim():
            torch._dynamo.maybe_mark_dynamic(tensor, 0)
    gm: Any = torch._dynamo.export(model, assume_static_by_default=True)(*args, **kwargs).graph_module
    names = {id(part): n for n, part in [*model.named_buffers(), *model.named_parameters(), *model.named_modules()]}
    root = nn.Module()
    for table in ("_modules", "_parameters", "_buffers"):
        getattr(root, table).update(getattr(model, table))
    for node in gm.graph.nodes:
        if node.op in ("get_attr", "call_module"):
            value = attribute(gm, str(node.target))
            name = names.get(id(value))
            node.target = str(node.target).replace(".", "_") if name is None else name
            if name is None:
                setattr(root, node.target, value)
    return fx.GraphModule(root, gm.graph)


def import_captured(model: nn.Module, example_inputs: Any, capture: _Capture, dynamic_shapes: Any = None) -> Imported:
    """Import a module by a capture of the mode that it is in, and of both modes where one graph can hold both.

    Args:
        model: the module; it is copied.
        example_inputs: as for :func:`mpcompile.capture.inputs.call_for`.
        capture: :func:`strict_export`, :func:`export` or :func:`dynamo_graph`.
        dynamic_shapes: as for ``torch.export.export``; None leaves axis 0 of every tensor free where the model does.

    Raises:
        Exception: whatever ``capture`` raises.
    """
    copied = copy_of(model)
    call = call_for(model, example_inputs)
    error: Exception | None = None
    for example in [call] if dynamic_shapes is not None else _examples(call):
        shapes = _free_axes(example) if dynamic_shapes is None else dynamic_shapes
        try:
            run = functools.partial(_run, copied, model, example, shapes, capture)
            return _imported(copied, model, call, example, run)
        except Exception as failure:
            error = error or failure
    assert error is not None
    raise error


def _imported(
    copied: nn.Module, model: nn.Module, call: Call, example: Call, run: Callable[[bool], fx.GraphModule]
) -> Imported:
    """Import the graph that ``run`` captures in each mode, from ``example`` in place of the inputs of ``call``.

    Raises:
        Exception: the capture fails; or the graph of a doubled batch does not take the single sample of ``call``.
    """
    chosen = run(copied.training)
    if example is not call and not free_batch(chosen):
        raise TraceError("the batch is not free")
    gm, notes = _both_modes(copied, chosen, run)
    owned = own_graph(gm, share=True, class_name=type(model).__name__)
    carry(copied, owned)
    owned.train(copied.training)
    owned.locked_mode = copied.training if notes else None
    if call.left_out:
        notes.append(f"inputs left out: {', '.join(call.left_out)}")
    guard_inputs(owned, captured=True)
    inputs = flatten_inputs(owned, call.kwargs or call.args)
    for guard in owned.children():
        if isinstance(guard, InputGuard):
            try:
                guard(*inputs)
            except InputError as error:
                raise TraceError(error.message) from error
    return Imported(owned, inputs, Lifted(), notes)


def free_batch(gm: fx.GraphModule) -> bool:
    """Return True if a captured graph takes batches of any size."""
    values = (fake_value(node) for node in gm.graph.nodes if node.op == "placeholder")
    return any(isinstance(v, Tensor) and v.dim() and isinstance(v.shape[0], torch.SymInt) for v in values)


def _examples(call: Call) -> Iterator[Call]:
    """Yield the inputs to capture a model with, the best first.

    torch fixes an axis of length 1, so a batch of one sample is doubled; if the model needs one sample, the batch stays
    fixed at that.
    """
    tensors = [t for t in pytree.tree_leaves((call.args, call.kwargs)) if isinstance(t, Tensor) and t.dim()]
    if tensors and all(len(t) == 1 for t in tensors):
        doubled: Any = lambda t: torch.cat([t, t]) if t.dim() else t  # noqa: E731
        args, kwargs = pytree.tree_map_only(Tensor, doubled, (call.args, call.kwargs))
        yield Call(args, kwargs)
    yield call


def _free_axes(call: Call) -> ShapesCollection:
    shapes = ShapesCollection()
    for tensor in pytree.tree_leaves((call.args, call.kwargs)):
        if isinstance(tensor, Tensor) and tensor.dim() and len(tensor) > 1:
            shapes[tensor] = {0: Dim.AUTO}
    return shapes


def _run(
    copied: nn.Module, model: nn.Module, call: Call, shapes: Any, capture: _Capture, training: bool
) -> fx.GraphModule:
    """Return the graph of one mode. Both the copy and the model are left as they were."""
    with (
        training_flags(copied, training),
        untouched(copied, model),
        without_global_hooks(),
        generators_kept(),
        torch.enable_grad(),  # torch.nn's layers take paths of their own where no gradient is recorded
        contextlib.redirect_stderr(io.StringIO()) as printed,  # torch prints the graph of an attempt that fails
        warnings.catch_warnings(),
    ):
        warnings.simplefilter("ignore")  # advice on how to make a model exportable
        gm = capture(copied, call, shapes)
    sys.stderr.write(printed.getvalue())
    for node in list(gm.graph.nodes):
        if node.target in _CHECKS and not node.users:
            gm.graph.erase_node(node)
    return gm


def _register_outputs(_model: nn.Module, _args: Any, result: Any) -> None:
    """Register the dataclasses that a model returns with pytree, which makes the trees of inputs and outputs."""
    for leaf in pytree.tree_leaves(result):
        cls = type(leaf)
        if dataclasses.is_dataclass(cls) and cls not in pytree.SUPPORTED_NODES:
            torch.export.register_dataclass(cls)


def _both_modes(
    copied: nn.Module, chosen: fx.GraphModule, other: Callable[[bool], fx.GraphModule]
) -> tuple[fx.GraphModule, list[str]]:
    """Return one graph that follows ``train()`` and ``eval()``, or ``chosen`` with notes that say why not."""
    here = copied.training
    mode, opposite = ("train", "eval") if here else ("eval", "train")
    only = f"this graph is for {mode}() only"
    try:
        graphs = {here: chosen, not here: other(not here)}
    except Exception as error:
        return chosen, [f"{opposite}() cannot be captured ({summary(error, 120)}): {only}"]
    if _unify(graphs[True], graphs[False]):
        return graphs[False], []
    return chosen, [f"train() and eval() take different paths: {only}"]


def _unify(training: fx.GraphModule, evaluation: fx.GraphModule) -> bool:
    """Make the graph of ``eval()`` follow the training flag, if the two differ only in flags.

    BatchNorm's count of batches, which nothing reads where momentum is a number, is not kept.
    """
    graph = fx.Graph()
    graph.output(graph.graph_copy(training.graph, {}))
    for node in reversed(list(graph.nodes)):
        counter = node.args[0] if node.target is _ATEN.add_.Tensor else None
        if isinstance(counter, fx.Node) and counter.op == "get_attr" and _is_counter(counter, node):
            graph.erase_node(node)
            graph.erase_node(counter)
    return unify_modes(evaluation, graph, evaluation.graph)


def _is_counter(counter: fx.Node, addition: fx.Node) -> bool:
    name = str(counter.target).rpartition(".")[2]
    return name == "num_batches_tracked" and list(counter.users) == [addition] and not addition.users
