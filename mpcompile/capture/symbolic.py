"""Import of a module by symbolic tracing, in train and eval mode."""

from __future__ import annotations

import contextlib
import inspect
import sys
import traceback
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn

from mpcompile.capture.copies import copy_of
from mpcompile.capture.inputs import by_parameter, call_for
from mpcompile.capture.tracing import Tracer
from mpcompile.capture.unify import unify_modes
from mpcompile.errors import InputError, MPCompileError, TraceError, summary
from mpcompile.ir.effects import UNDECIDED, settle
from mpcompile.ir.isolation import generators_kept, untouched, without_global_hooks
from mpcompile.ir.module import Imported, IRModule, Lifted
from mpcompile.ir.numerics import training_flags
from mpcompile.ir.parts import carry
from mpcompile.ir.shapes import propagate

_SCALARS = (bool, int, float, str, type(None))


@dataclass
class _Traced:
    """One symbolic trace.

    Attributes:
        graph: the traced graph.
        constants: values, mostly tensors, that the graph reads but the model does not hold.
        drew: True if torch's random generator was used.
    """

    graph: fx.Graph
    constants: dict[str, Any]
    tracer: Tracer
    drew: bool


@contextlib.contextmanager
def _compiled_functions_inlined() -> Iterator[None]:
    """Allow tracing through functions wrapped in torch.compile, which dynamo forbids by default."""
    if "torch._dynamo" not in sys.modules:
        yield
        return
    with sys.modules["torch._dynamo"].config.patch(error_on_nested_fx_trace=False):
        yield


def _graph_of(model: nn.Module, original: nn.Module, training: bool, tracer: Tracer) -> _Traced:
    """Trace a copy of ``original`` once, and leave both models unchanged."""
    held = set(vars(model))
    buffers = {name: (buffer, buffer._version) for name, buffer in model.named_buffers()}
    written: list[str] = []
    try:
        with (
            training_flags(model, training),
            untouched(model, original),
            without_global_hooks(),
            _compiled_functions_inlined(),
            generators_kept() as drew,
        ):
            graph = tracer.trace(model)
            tracer.prune()
            targets = [str(node.target) for node in graph.nodes if node.op == "get_attr"]
            constants = {name: vars(model)[name] for name in targets if name in vars(model) and name not in held}
    finally:
        for name, (buffer, version) in buffers.items():
            if buffer._version != version:
                written.append(name)
                with torch.no_grad():
                    buffer.copy_(original.get_buffer(name))
    if written and not tracer.written:  # the trace records a write only if the read of the tensor is a node
        again = Tracer(tracer.given, tracer.keywords, tuple(tracer.fixed), written)
        return _graph_of(model, original, training, again)
    constants = {k: v.detach().clone() if isinstance(v, Tensor) else v for k, v in constants.items()}
    return _Traced(graph, constants, tracer, drew[0])


def _equal_constants(a: Mapping[str, Any], b: Mapping[str, Any]) -> bool:
    """Return True if two traces hold the same constants."""
    if a.keys() != b.keys() or any(type(a[name]) is not type(b[name]) for name in a):
        return False
    return all(torch.equal(a[k], b[k]) if isinstance(a[k], Tensor) else a[k] is b[k] for k in a)


def _fixed(model: nn.Module, given: int, keywords: Sequence[str]) -> dict[str, Any]:
    """Return name -> value of the parameters of forward that keep their default, a plain number, string or None."""
    fixed = {}
    for position, parameter in enumerate(inspect.signature(model.forward).parameters.values()):
        several = parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD)
        placed = position < given and parameter.kind is not parameter.KEYWORD_ONLY
        if placed or parameter.name in keywords or several or parameter.default is parameter.empty:
            continue
        if isinstance(parameter.default, _SCALARS):
            fixed[parameter.name] = parameter.default
    return fixed


def place_of(error: BaseException) -> str:
    """Return ``", file:line"`` for the line of the user's model that raised an error, or ``""`` if there is none."""
    ours = (str(Path(torch.__file__).parent), str(Path(__file__).parents[1]))
    frames = [f for f in traceback.extract_tb(error.__traceback__) if not f.filename.startswith((*ours, "<"))]
    return f", {Path(frames[-1].filename).name}:{frames[-1].lineno}" if frames else ""


class Untraceable(TraceError):
    """The model's own code failed in a trace."""


def _untraceable(model: nn.Module, tracer: Tracer, error: Exception) -> Untraceable:
    """Return the error for a model whose own code failed, with the class and the line."""
    path, cls = tracer.failed or ("", type(model).__name__)
    return Untraceable(
        summary(error),
        layer=path or None,
        expected="a forward without data-dependent control flow",
        found=f"{type(error).__name__} in {cls}.forward{place_of(error)}",
    )


def _traces(model: nn.Module, original: nn.Module, given: int, keywords: Sequence[str]) -> dict[bool, _Traced]:
    """Return training flag -> trace, for the mode that the model is in, and for the other mode if it can be traced."""
    fixed = tuple(_fixed(model, given, keywords))
    traces: dict[bool, _Traced] = {}
    for training in (model.training, not model.training):
        tracer = Tracer(given, keywords, fixed)
        try:
            traces[training] = _graph_of(model, original, training, tracer)
        except Exception as error:
            if training != model.training:
                continue
            if isinstance(error, MPCompileError):
                raise
            raise _untraceable(model, tracer, error) from error
        if traces[training].drew:
            if training != model.training:
                del traces[training]
            elif training or _is_random(model, original, traces[training]):
                raise TraceError(
                    f"{type(model).__name__} draws random numbers that would be the same in every call",
                    expected="random tensors made from an input, such as torch.rand_like(x) or x.new_empty(n)",
                    found="torch.rand of a fixed shape, or a branch that depends on it",
                    hint="call .eval() before mpcompile.transform, or use torch.compile(model, backend='mpsparse')",
                )
    return traces


def _is_random(model: nn.Module, original: nn.Module, first: _Traced) -> bool:
    """Return True if a second trace, from another random seed, differs."""
    tracer = first.tracer
    with torch.random.fork_rng([]):
        torch.manual_seed(torch.initial_seed() + 1)
        other = Tracer(tracer.given, tracer.keywords, tuple(tracer.fixed), tuple(tracer.written))
        again = _graph_of(model, original, model.training, other)
    return str(again.graph) != str(first.graph) or not _equal_constants(again.constants, first.constants)


def _trace(model: nn.Module, original: nn.Module, given: int, keywords: Sequence[str]) -> tuple[IRModule, list[str]]:
    """Trace an owned module into a graph that follows ``train()`` and ``eval()``, and return notes for the plan."""
    traces = _traces(model, original, given, keywords)
    chosen, other = traces[model.training], traces.get(not model.training)
    follows = other is not None and _equal_constants(chosen.constants, other.constants)
    follows = follows and unify_modes(model, traces[True].graph, traces[False].graph)
    for name, value in chosen.constants.items():
        if isinstance(value, Tensor):
            model.register_buffer(name, value, persistent=False)
        else:
            setattr(model, name, value)
    gm = IRModule(model, traces[False].graph if follows else chosen.graph, class_name=type(model).__name__)
    gm.training = model.training
    notes = []
    fixed = _fixed(model, given, keywords)
    if fixed:
        notes.append("inputs fixed at their defaults: " + ", ".join(f"{k}={v!r}" for k, v in fixed.items()))
    if chosen.tracer.silent:
        silent = sorted({path or type(model).__name__ for path in chosen.tracer.silent})
        more = f" and {len(silent) - 8} more" if len(silent) > 8 else ""
        notes.append(
            f"hooks that return nothing are not part of the graph (on {', '.join(silent[:8])}{more}): "
            "register them on the result"
        )
    if not follows:
        gm.locked_mode = model.training
        mode = "train" if model.training else "eval"
        notes.append(f"train() and eval() take different paths: this graph is for {mode}() only")
    return gm, notes


def import_module(model: nn.Module, example_inputs: Any) -> Imported:
    """Import a module by symbolic tracing."""
    copied = copy_of(model)
    call = call_for(model, example_inputs)
    inputs = by_parameter(model, call)
    gm, notes = _trace(copied, model, len(call.args), tuple(call.kwargs))
    if call.left_out:
        notes.append(f"inputs left out: {', '.join(call.left_out)}")
    placeholders = [n for n in gm.graph.nodes if n.op == "placeholder"]
    if len(placeholders) != len(inputs):
        raise InputError(
            "the number of example inputs is wrong",
            expected=f"{len(placeholders)} ({', '.join(str(p.target) for p in placeholders)})",
            found=len(inputs),
        )
    carry(copied, gm)
    if any(UNDECIDED in node.meta for node in gm.graph.nodes):
        propagate(gm, inputs)
        if settle(gm):
            gm.recompile()
    return Imported(gm, inputs, Lifted(), notes)
