"""Bring a model into the IR: a module by symbolic tracing, or a GraphModule (symbolic, dynamo, export) as it is.

What comes out is owned: parameters are copies, unless the graph takes them as inputs (dynamo), and the user's module
is never changed.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import inspect
import itertools
import random
import sys
import traceback
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FunctionType, MethodType
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from mpcompile.capture.modes import captured_mode, ordinary
from mpcompile.capture.tracing import UNDECIDED, Tracer, replaced_forward
from mpcompile.errors import InputError, MPCompileError, TraceError, summary
from mpcompile.ir.effects import settle
from mpcompile.ir.graph import Lifted, dynamo_name, fake_value, hint, layers, lifted_from, propagate, training_flags
from mpcompile.ir.isolation import global_hooks, of_torch, rebind, tensors_of, untouched, without_global_hooks
from mpcompile.ir.module import RESERVED, IRModule
from mpcompile.ir.parts import carry
from mpcompile.ir.regions import inline_regions
from mpcompile.layers import ByMode, MaskedConv2d, MaskedLinear

_SCALARS = (bool, int, float, str, type(None))
_WRAPPERS = {  # class -> what to pass instead
    "torch.nn.parallel.data_parallel.DataParallel": "model.module",
    "torch.nn.parallel.distributed.DistributedDataParallel": "model.module",
    "torch.distributed.fsdp.fully_sharded_data_parallel.FullyShardedDataParallel": "model.module, its weights gathered",
    "torch._dynamo.eval_frame.OptimizedModule": "model._orig_mod, and compile what comes out",
}
_HOOK_TABLES = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


@dataclass
class Imported:
    """An owned graph, the inputs that show its shapes (one a placeholder), and its lifted parameters."""

    gm: IRModule
    inputs: list[Any]
    lifted: Lifted
    notes: list[str]


@dataclass
class _Traced:
    """One symbolic trace: its graph, and the tensors that it reads but that the model doesn't hold."""

    graph: fx.Graph
    constants: dict[str, Any]
    tracer: Tracer
    drew: bool


@contextlib.contextmanager
def _generators() -> Iterator[list[bool]]:
    """Random generators are put back at the end; the list that is yielded then says whether torch's was used."""
    drew: list[bool] = []
    numpy = sys.modules.get("numpy")
    states = random.getstate(), None if numpy is None else numpy.random.get_state()
    devices = list(range(torch.cuda.device_count())) if torch.cuda.is_initialized() else []
    with torch.random.fork_rng(devices):
        before = torch.get_rng_state()
        try:
            yield drew
        finally:
            drew.append(not torch.equal(before, torch.get_rng_state()))
            random.setstate(states[0])
            if numpy is not None:
                numpy.random.set_state(states[1])


@contextlib.contextmanager
def _compiled_functions_inlined() -> Iterator[None]:
    """Functions under torch.compile are traced like others (dynamo forbids it by default)."""
    if "torch._dynamo" not in sys.modules:
        yield
        return
    with sys.modules["torch._dynamo"].config.patch(error_on_nested_fx_trace=False):
        yield


def _graph_of(model: nn.Module, original: nn.Module, training: bool, tracer: Tracer) -> _Traced:
    """One symbolic trace of the copy of ``original``, which leaves nothing behind in either."""
    held = set(vars(model))
    buffers = {name: (buffer, buffer._version) for name, buffer in model.named_buffers()}
    written: list[str] = []
    try:
        with (
            training_flags(model, training),
            untouched(model, original),
            without_global_hooks(),
            _compiled_functions_inlined(),
            _generators() as drew,
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
    if written and not tracer.written:  # a write to a tensor isn't seen by the trace unless reading it is a node
        again = Tracer(tracer.given, tracer.keywords, tuple(tracer.fixed), written)
        return _graph_of(model, original, training, again)
    constants = {k: v.detach().clone() if isinstance(v, Tensor) else v for k, v in constants.items()}
    return _Traced(graph, constants, tracer, drew[0])


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


def _alike(a: Mapping[str, Any], b: Mapping[str, Any]) -> bool:
    """Whether two traces found the same constants."""
    if a.keys() != b.keys() or any(type(a[name]) is not type(b[name]) for name in a):
        return False
    return all(torch.equal(a[k], b[k]) if isinstance(a[k], Tensor) else a[k] is b[k] for k in a)


def _fixed(model: nn.Module, given: int, keywords: Sequence[str]) -> dict[str, Any]:
    """Parameters of forward that are left at a plain default."""
    fixed = {}
    for position, parameter in enumerate(inspect.signature(model.forward).parameters.values()):
        several = parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD)
        placed = position < given and parameter.kind is not parameter.KEYWORD_ONLY
        if placed or parameter.name in keywords or several or parameter.default is parameter.empty:
            continue
        if isinstance(parameter.default, _SCALARS):
            fixed[parameter.name] = parameter.default
    return fixed


def _place(error: BaseException) -> str:
    """The line of somebody's model that an error comes from."""
    ours = (str(Path(torch.__file__).parent), str(Path(__file__).parents[1]))
    frames = [f for f in traceback.extract_tb(error.__traceback__) if not f.filename.startswith((*ours, "<"))]
    return f", {Path(frames[-1].filename).name}:{frames[-1].lineno}" if frames else ""


def _untraceable(model: nn.Module, tracer: Tracer, error: Exception) -> TraceError:
    """The error of a model's own code, with the class and the place."""
    path, cls = tracer.failed or ("", type(model).__name__)
    return TraceError(
        f"{type(model).__name__} can't be traced: {summary(error)}",
        layer=path or None,
        expected="a forward without data-dependent control flow",
        found=f"{type(error).__name__} in {cls}.forward{_place(error)}",
        hint="use torch.compile(model, backend='mpsparse', options={...}), or pass "
        "torch.export.export(model, example_inputs).module()",
    )


def _traces(model: nn.Module, original: nn.Module, given: int, keywords: Sequence[str]) -> dict[bool, _Traced]:
    """Training flag -> trace: of the mode that the model is in, and of the other where that can be had."""
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
    """Whether another trace, after other random numbers, comes out differently."""
    tracer = first.tracer
    with torch.random.fork_rng([]):
        torch.manual_seed(torch.initial_seed() + 1)
        other = Tracer(tracer.given, tracer.keywords, tuple(tracer.fixed), tuple(tracer.written))
        again = _graph_of(model, original, model.training, other)
    return str(again.graph) != str(first.graph) or not _alike(again.constants, first.constants)


def _trace(model: nn.Module, original: nn.Module, given: int, keywords: Sequence[str]) -> tuple[IRModule, list[str]]:
    """Symbolic trace of an owned module that follows ``train()`` and ``eval()``."""
    traces = _traces(model, original, given, keywords)
    chosen, other = traces[model.training], traces.get(not model.training)
    follows = other is not None and _alike(chosen.constants, other.constants)
    follows = follows and _unify_modes(model, traces[True].graph, traces[False].graph)
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
            f"hooks that return nothing are no part of the graph (on {', '.join(silent[:8])}{more}): "
            "register them on what came out"
        )
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
        carry(gm, owned)
        memo: dict[int, Any] = _without_history(owned)
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


def _example(node: fx.Node) -> Any:
    """An input of the right shape and dtype for a placeholder whose fake value the graph carries."""
    value = fake_value(node)
    if isinstance(value, Tensor):
        return torch.empty([hint(s) for s in value.shape], dtype=value.dtype, device=value.device)
    return hint(value)


def _arguments(model: nn.Module, example_inputs: Any) -> list[Any]:
    """Example inputs as a list of positional arguments; a dict is bound to the signature of forward."""
    example_inputs = ordinary(example_inputs)
    if isinstance(example_inputs, Tensor):
        return [example_inputs]
    if isinstance(example_inputs, Mapping):
        try:
            bound = inspect.signature(model.forward).bind(**example_inputs)
        except TypeError as error:
            hint = "to pass the dict itself as the one input, put it into a tuple: ({...},)"
            raise InputError(f"example_inputs don't fit forward: {error}", hint=hint) from error
        values: list[Any] = []
        for name, value in bound.arguments.items():
            rest = bound.signature.parameters[name].kind is inspect.Parameter.VAR_KEYWORD
            values.extend(value.values() if rest else [value])
        return values
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


def _without_history(model: nn.Module) -> dict[int, Any]:
    """A memo for deepcopy, which refuses tensors that were computed: attributes that hooks or a forward have set."""
    return {id(t): t.detach().clone() for t in tensors_of(model) if not t.is_leaf}


def _copied(model: nn.Module) -> nn.Module:
    """A copy of a model, also of the functions and hooks that were put on its instances."""
    memo = _without_history(model)
    try:
        copied = copy.deepcopy(model, memo)
    except Exception as error:
        raise TraceError(f"{type(model).__name__} can't be copied: {summary(error)}") from error
    parts = [*model.modules(), *model.parameters(), *model.buffers()]
    memo = {id(part): memo[id(part)] for part in parts}
    for module in copied.modules():
        for key, value in list(vars(module).items()):
            if isinstance(value, (FunctionType, MethodType, functools.partial)):
                vars(module)[key] = rebind(value, memo)
        for table in _HOOK_TABLES:
            hooks = getattr(module, table)
            for key, hook in hooks.items():
                hooks[key] = rebind(hook, memo)
    for (_, old), (_, new) in zip(model.named_parameters(), copied.named_parameters(), strict=True):
        for hook in (old._backward_hooks or {}).values():
            new.register_hook(rebind(hook, memo))
        for hook in (getattr(old, "_post_accumulate_grad_hooks", None) or {}).values():
            new.register_post_accumulate_grad_hook(rebind(hook, memo))
    return copied


def _class_path(value: object) -> str:
    return f"{type(value).__module__}.{type(value).__qualname__}"


def _check_part(module: nn.Module, path: str) -> None:
    """Refuse a module that is another form of a model, or around one, by the name of what to pass instead."""
    name, where = type(module).__name__, path or None
    whole = f"model.{path}" if path else "model"
    if isinstance(module, (torch.jit.ScriptModule, torch.jit.ScriptFunction)):
        hint = f"pass the torch.nn.Module that {whole} was scripted or traced from"
        raise TraceError("a TorchScript module can't be traced", layer=where, found=name, hint=hint)
    if _class_path(module) in _WRAPPERS:
        inner = _WRAPPERS[_class_path(module)].replace("model", whole, 1)
        verb = "pass" if not path else "put in its place"
        raise TraceError(f"{name} is a wrapper around the model", layer=where, hint=f"{verb} {inner}")
    home = type(module).__module__
    if home.startswith("torch.ao.") and ".quantized" in home:
        raise TraceError(
            f"{home.rpartition('.')[2]}.{name} is a quantised layer: its weight is packed already",
            layer=where,
            expected="a model in floating point",
            hint="transform the model first, then quantise",
        )


def _check_tensors(model: nn.Module) -> None:
    """Refuse weights without shapes, or of a kind that can't be masked or copied into a graph."""
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if nn.parameter.is_lazy(tensor):
            raise TraceError("the model has lazy parameters", layer=name, hint="run it once on an example input first")
        if tensor.is_quantized or is_traceable_wrapper_subclass(tensor) or tensor.layout != torch.strided:
            kind = "quantised" if tensor.is_quantized else type(tensor.data).__name__
            raise InputError(
                f"the weight is no ordinary tensor ({kind}, {tensor.layout})",
                layer=name,
                expected="dense tensors on one device",
                hint="gather, densify or dequantise the weights first",
            )


def _check_module(model: nn.Module) -> None:
    """Refuse what can't be traced, before anything is copied.

    Raises:
        TraceError: a wrapper, a TorchScript or quantised module, names that the result needs, or no parameters.
        InputError: weights of a kind that can't be copied.
    """
    for path, module in model.named_modules():
        _check_part(module, path)
    for name in [*model._modules, *model._parameters, *model._buffers]:
        if name in RESERVED:
            raise TraceError(
                f"{type(model).__name__} has an attribute {name!r}, which the transformed module needs for itself",
                hint=f"rename the attribute {name!r} of the model",
            )
    if not any(True for _ in model.parameters()):
        raise TraceError(f"{type(model).__name__} has no parameters: there is nothing to compile")
    _check_tensors(model)
    state = set(model.state_dict())
    hooked = [path for path, m in model.named_modules() if m._state_dict_hooks or m._state_dict_pre_hooks]
    if hooked and not state <= {name for name, _ in [*_all(model.named_parameters), *_all(model.named_buffers)]}:
        raise TraceError(
            "state-dict hooks give the weights other names",
            layer=hooked[0] or type(model).__name__,
            hint="remove them first (handle.remove()): the transformed module has no hooks of the model",
        )


def _all(named: Any) -> Any:
    return named(remove_duplicate=False)


def _check_hooks(model: nn.Module) -> None:
    """Refuse hooks that a GraphModule would lose, and hooks on every module of the process."""
    everywhere = global_hooks()
    if everywhere:
        raise TraceError(
            f"hooks on all modules of the process are registered ({', '.join(everywhere)[:100]})",
            hint="remove them first (handle.remove()): they can't stand in a graph",
        )
    if not isinstance(model, fx.GraphModule):
        return
    for path, module in model.named_modules():
        masked = isinstance(module, (MaskedLinear, MaskedConv2d))
        replaced = "forward" in vars(module) if not path else replaced_forward(module)
        if path and not masked and not (replaced and type(module).__module__.startswith("torch.nn")):
            continue
        tables = [getattr(module, table).values() for table in _HOOK_TABLES]
        hooks = [hook for hook in itertools.chain(*tables) if not of_torch(hook)]  # export puts checks of its own there
        if hooks or replaced:
            raise TraceError(
                f"{type(module).__name__} has {'hooks' if hooks else 'a forward of its own'}, which would be lost",
                layer=path or None,
                hint="remove it first, and put it back on what comes out",
            )


def _import_module(model: nn.Module, example_inputs: Any) -> Imported:
    """A module by symbolic tracing."""
    _check_module(model)
    if example_inputs is None:
        raise InputError(
            f"the shapes in {type(model).__name__} are not known",
            expected="example_inputs",
            found="None",
            hint="call mpcompile.transform(model, torch.randn(1, 3, 224, 224)) with an input of your size",
        )
    copied = _copied(model)
    inputs = _arguments(model, example_inputs)
    keywords = tuple(example_inputs) if isinstance(example_inputs, Mapping) else ()
    gm, notes = _trace(copied, model, 0 if keywords else len(inputs), keywords)
    placeholders = [n for n in gm.graph.nodes if n.op == "placeholder"]
    if len(placeholders) != len(inputs):
        raise InputError(
            "the number of example inputs doesn't fit",
            expected=f"{len(placeholders)} ({', '.join(str(p.target) for p in placeholders)})",
            found=len(inputs),
        )
    carry(copied, gm)
    if any(UNDECIDED in node.meta for node in gm.graph.nodes):
        propagate(gm, inputs)
        if settle(gm):
            gm.recompile()
    return Imported(gm, inputs, Lifted(), notes)


def _not_a_model(value: Any) -> InputError:
    """What to pass instead of something that isn't a module."""
    hint = None
    if isinstance(value, torch.export.ExportedProgram):
        hint = "pass program.module()"
    elif isinstance(value, type):
        hint = f"make one first: {value.__name__}(...)"
    elif isinstance(value, torch.jit.ScriptFunction):
        hint = "pass the torch.nn.Module that it was scripted or traced from"
    elif isinstance(value, Mapping):
        hint = "weights alone don't say what is computed: load them into the model first"
    elif callable(value):
        hint = "put it into the forward of a torch.nn.Module that holds its weights"
    expected = "a torch.nn.Module or fx.GraphModule"
    return InputError("this is not a model", expected=expected, found=type(value).__name__, hint=hint)


def check_values(gm: nn.Module) -> None:
    """Raise for a weight without values: such a model has shapes, for counting operations, and no more.

    Raises:
        InputError: names the weight.
    """
    for name, tensor in [*gm.named_parameters(), *gm.named_buffers()]:
        if tensor.is_meta:
            raise InputError(
                "the weight has no values: it is on the device 'meta'",
                layer=name,
                expected="weights in memory",
                hint="load them first: model.to_empty(device='cpu'), then model.load_state_dict(state)",
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
        raise _not_a_model(model)
    if not share:
        _check_hooks(model)
    if isinstance(model, fx.GraphModule):
        imported = _import_graph(model, example_inputs, share)
    else:
        imported = _import_module(model, example_inputs)
    inline_regions(imported.gm)
    found = layers(imported.gm, imported.lifted)
    biases = {f"{layer.name}.bias": layer.bias for layer in found if isinstance(layer.bias, Tensor)}
    check_finite({layer.weight.name: layer.weight.tensor for layer in found} | biases)
    everything = {imported.lifted.names[k]: v for k, v in imported.lifted.tensors.items()}
    check_finite({**imported.gm.state_dict(), **everything}, bounds=True)
    return imported
