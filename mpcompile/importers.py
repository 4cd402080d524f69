"""Bring a model into the IR: a module by symbolic tracing, or a GraphModule (symbolic, dynamo, export) as it is.

What comes out is owned: parameters are copies, unless the graph takes them as inputs (dynamo), and the user's module
is never changed.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from mpcompile.errors import InputError, MPCompileError, TraceError
from mpcompile.graph import IRModule, Lifted, dynamo_name, fake_value, hint, layers, lifted_from, training_flags
from mpcompile.layers import ByMode, MaskedConv2d, MaskedLinear
from mpcompile.regions import inline_regions

_SCALARS = (bool, int, float, str, type(None))


@dataclass
class Imported:
    """An owned graph, the inputs that show its shapes (one a placeholder), and its lifted parameters."""

    gm: IRModule
    inputs: list[Any]
    lifted: Lifted
    notes: list[str]


def _reads_training(module: nn.Module) -> bool:
    code = getattr(type(module).forward, "__code__", None)
    return code is not None and "training" in code.co_names


class Tracer(fx.Tracer):
    """Keeps as leaves what torch.nn defines, our masked layers, and whatever asks for ``self.training``.

    A module that reads the flag and holds layers to mask (attention with its ``dropout_p``) is entered: the traces of
    both modes are compared instead, see :func:`_trace`.
    """

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        if super().is_leaf_module(m, module_qualified_name) or isinstance(m, (MaskedLinear, MaskedConv2d, ByMode)):
            return True
        weighted = any(isinstance(child, (nn.Linear, nn.Conv2d)) for child in m.modules())
        return _reads_training(m) and not weighted


def _graph_of(module: nn.Module, training: bool, defaults: Mapping[str, Any]) -> fx.Graph:
    """One symbolic trace; parameters in ``defaults`` are fixed and leave the signature."""
    with training_flags(module, training):
        graph = Tracer().trace(module, concrete_args=dict(defaults) or None)
    fixed = [n for n in graph.nodes if n.op == "placeholder" and n.target.rsplit("_", 1)[0] in defaults]
    doomed: set[fx.Node] = set()
    for node in fixed:  # concrete_args leaves a placeholder and a check of its value behind
        stack = [node]
        while stack:
            current = stack.pop()
            doomed.add(current)
            stack.extend(current.users)
    for node in reversed(list(graph.nodes)):
        if node in doomed:
            graph.erase_node(node)
    return graph


def _same(a: Any, b: Any, twin: dict[fx.Node, fx.Node]) -> bool:
    if isinstance(a, fx.Node):
        return twin.get(a) is b
    if isinstance(a, (tuple, list)) and type(a) is type(b):
        return len(a) == len(b) and all(_same(x, y, twin) for x, y in zip(a, b, strict=True))
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(_same(a[k], b[k], twin) for k in a)
    if isinstance(a, slice) and isinstance(b, slice):
        return _same((a.start, a.stop, a.step), (b.start, b.stop, b.step), twin)
    return type(a) is type(b) and bool(a == b)


def _unify_modes(root: nn.Module, training: fx.Graph, evaluation: fx.Graph) -> bool:
    """Make ``evaluation`` follow the training flag where the two graphs differ in a number only.

    Returns:
        False when they differ in more than that.
    """
    if len(training.nodes) != len(evaluation.nodes):
        return False
    twin: dict[fx.Node, fx.Node] = {}
    switches: list[tuple[fx.Node, int | str, Any, Any]] = []
    for t, e in zip(training.nodes, evaluation.nodes, strict=True):
        if (t.op, t.target) != (e.op, e.target) or len(t.args) != len(e.args) or t.kwargs.keys() != e.kwargs.keys():
            return False
        twin[t] = e
        for key in [*range(len(t.args)), *t.kwargs]:
            a = t.args[key] if isinstance(key, int) else t.kwargs[key]
            b = e.args[key] if isinstance(key, int) else e.kwargs[key]
            if _same(a, b, twin):
                continue
            if not (isinstance(a, (bool, int, float)) and isinstance(b, (bool, int, float))):
                return False
            switches.append((e, key, a, b))
    for node, key, a, b in switches:
        name = f"{node.name}_{key if isinstance(key, str) else f'arg{key}'}"
        root.add_module(name, ByMode(a, b).train(root.training))
        with evaluation.inserting_before(node):
            value = evaluation.create_node("call_module", name)
        if isinstance(key, int):
            node.update_arg(key, value)
        else:
            node.update_kwarg(key, value)
    return True


def _trace(model: nn.Module, given: int, keywords: Sequence[str]) -> tuple[IRModule, list[str]]:
    """Symbolic trace of an owned module that follows ``train()`` and ``eval()``."""
    defaults = {}
    parameters = list(inspect.signature(model.forward).parameters.values())
    for position, parameter in enumerate(parameters):
        named = parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD)
        if position < given or parameter.name in keywords or named or parameter.default is parameter.empty:
            continue
        if isinstance(parameter.default, _SCALARS):
            defaults[parameter.name] = parameter.default
    graphs: dict[bool, fx.Graph] = {}
    for training in (model.training, not model.training):
        try:
            graphs[training] = _graph_of(model, training, defaults)
        except MPCompileError:
            raise
        except Exception as error:
            if training == model.training:
                raise TraceError(
                    f"{type(model).__name__} can't be traced: {str(error).splitlines()[0]}",
                    expected="a forward without data-dependent control flow",
                    found=type(error).__name__,
                    hint="use torch.compile(model, backend='mpsparse', options={...}), or pass "
                    "torch.export.export(model, example_inputs).module()",
                ) from error
    notes = []
    if defaults:
        notes.append("inputs fixed at their defaults: " + ", ".join(f"{k}={v!r}" for k, v in defaults.items()))
    graph = graphs[model.training]
    follows = len(graphs) == 2 and _unify_modes(model, graphs[True], graphs[False])
    gm = IRModule(model, graphs[False] if follows else graph, class_name=type(model).__name__)
    gm.training = model.training
    if not follows:
        gm.locked_mode = model.training
        mode = "train" if model.training else "eval"
        notes.append(f"train() and eval() take different paths: this graph stands for {mode}() alone")
    return gm, notes


def _own_graph(gm: fx.GraphModule, share: bool) -> IRModule:
    """A copy of a GraphModule: private tables dropped, parameters and submodules copied unless ``share``."""
    graph = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    output = graph.graph_copy(gm.graph, copies)
    graph._codegen = copy.deepcopy(gm.graph._codegen)
    original = next(n for n in reversed(gm.graph.nodes) if n.op == "output")
    graph.output(output).meta = dict(original.meta)
    for old, new in copies.items():
        if old.op == "placeholder":  # our names, and AOTAutograd, look for the source of each input
            new._dynamo_source = getattr(old, "_dynamo_source", None)
    owned = IRModule(gm, graph, class_name=type(gm).__name__)
    owned.training = gm.training
    if not share:
        memo: dict[int, Any] = {}
        for table in ("_modules", "_parameters", "_buffers"):
            setattr(owned, table, copy.deepcopy(getattr(owned, table), memo))
    if isinstance(gm, IRModule):
        owned.meta = copy.deepcopy(gm.meta)
    return owned


def _example(node: fx.Node) -> Any:
    """An input of the right shape and dtype for a placeholder whose fake value the graph carries."""
    value = fake_value(node)
    if isinstance(value, Tensor):
        return torch.empty([hint(s) for s in value.shape], dtype=value.dtype, device=value.device)
    return hint(value)


def _arguments(model: nn.Module, example_inputs: Any) -> list[Any]:
    """Example inputs as a list of positional arguments; a dict is bound to the signature of forward."""
    if isinstance(example_inputs, Tensor):
        return [example_inputs]
    if isinstance(example_inputs, Mapping):
        try:
            bound = inspect.signature(model.forward).bind(**example_inputs)
        except TypeError as error:
            raise InputError(f"example_inputs don't fit forward: {error}") from error
        return list(bound.arguments.values())
    if isinstance(example_inputs, (tuple, list)):
        return list(example_inputs)
    raise InputError(
        "example_inputs has the wrong type",
        expected="a tensor, a tuple of inputs, or a dict of keyword inputs",
        found=type(example_inputs).__name__,
    )


def _import_graph(gm: fx.GraphModule, example_inputs: Any, share: bool) -> Imported:
    owned = _own_graph(gm, share)
    placeholders = [n for n in owned.graph.nodes if n.op == "placeholder"]
    if example_inputs is not None:
        inputs = _arguments(gm, example_inputs)
        lifted = lifted_from(owned, inputs)
        return Imported(owned, inputs, lifted, [])
    if any(dynamo_name(n) for n in placeholders):
        raise InputError(
            "this graph takes its weights as inputs, so it doesn't hold their values",
            expected="example_inputs, the list that dynamo hands to a backend",
            found="None",
            hint="call mpcompile.transform(gm, example_inputs)",
        )
    missing = [n.name for n in placeholders if fake_value(n) is None]
    if missing:
        raise InputError(
            "this graph carries no shapes",
            expected="example_inputs, or 'val' or 'example_value' in the meta of every placeholder",
            found=f"none on {', '.join(missing)}",
            hint="call mpcompile.transform(gm, example_inputs)",
        )
    return Imported(owned, [_example(n) for n in placeholders], Lifted(), [])


def check_finite(tensors: Mapping[str, Tensor], *, bounds: bool = False) -> None:
    """Raise for the first weight that isn't finite; a single number may be infinite (the bound of a clamp).

    Args:
        bounds: let all values be infinite (an attention mask holds -inf where it hides), but none NaN.

    Raises:
        InputError: names the tensor, and how many of its values are NaN or infinite.
    """
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and tensor.device.type != "meta":
            bad = int((~torch.isfinite(tensor) if tensor.dim() and not bounds else tensor.isnan()).sum())
            if bad:
                raise InputError(
                    "the weight is not finite",
                    layer=name,
                    expected="finite values",
                    found=f"{bad} of {tensor.numel()} NaN or infinite",
                    hint="load another checkpoint, or convert it without overflow",
                )


def import_model(model: nn.Module, example_inputs: Any = None, *, share: bool = False) -> Imported:
    """A module or a GraphModule -> the IR.

    Args:
        model: traced symbolically unless it is a GraphModule already.
        example_inputs: a tensor, a tuple of positional inputs, or a dict of keyword inputs. For a dynamo graph, the
            list that the backend received, parameters included. May be None when the graph carries shapes.
        share: take the user's tensors instead of copies (the backend, which only reads them).

    Raises:
        InputError: example inputs missing or of the wrong kind, or weights that are not finite.
        TraceError: the module can't be traced, or holds no parameter.
    """
    if not isinstance(model, nn.Module):
        raise InputError(
            "this is not a model", expected="a torch.nn.Module or fx.GraphModule", found=type(model).__name__
        )
    if isinstance(model, fx.GraphModule):
        imported = _import_graph(model, example_inputs, share)
    else:
        if example_inputs is None:
            raise InputError(
                f"the shapes in {type(model).__name__} are not known",
                expected="example_inputs",
                found="None",
                hint="call mpcompile.transform(model, torch.randn(1, 3, 224, 224)) with an input of your size",
            )
        for name in ("plan", "locked_mode"):
            if hasattr(model, name):
                raise TraceError(
                    f"{type(model).__name__} has an attribute {name!r}, which the transformed module needs for itself",
                    hint=f"rename the attribute {name!r} of the model",
                )
        if not any(True for _ in model.parameters()):
            raise TraceError(f"{type(model).__name__} has no parameters: there is nothing to compile")
        if any(nn.parameter.is_lazy(p) for p in model.parameters()):
            raise TraceError("the model has lazy parameters", hint="run it once on an example input first")
        try:
            copied = copy.deepcopy(model)
        except Exception as error:
            raise TraceError(f"{type(model).__name__} can't be copied: {error}") from error
        inputs = _arguments(model, example_inputs)
        keywords = tuple(example_inputs) if isinstance(example_inputs, Mapping) else ()
        gm, notes = _trace(copied, 0 if keywords else len(inputs), keywords)
        placeholders = [n for n in gm.graph.nodes if n.op == "placeholder"]
        if len(placeholders) != len(inputs):
            raise InputError(
                "the number of example inputs doesn't fit",
                expected=f"{len(placeholders)} ({', '.join(str(p.target) for p in placeholders)})",
                found=len(inputs),
            )
        imported = Imported(gm, inputs, Lifted(), notes)
    inline_regions(imported.gm)
    found = layers(imported.gm, imported.lifted)
    biases = {f"{layer.name}.bias": layer.bias for layer in found if isinstance(layer.bias, Tensor)}
    check_finite({layer.weight.name: layer.weight.tensor for layer in found} | biases)
    everything = {imported.lifted.names[k]: v for k, v in imported.lifted.tensors.items()}
    check_finite({**imported.gm.state_dict(), **everything}, bounds=True)
    return imported
