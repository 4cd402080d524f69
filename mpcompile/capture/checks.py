"""Refusals of models that cannot be brought into the IR; each error names what to pass instead."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from mpcompile.capture.copies import HOOK_TABLES
from mpcompile.capture.tracing import backward_hooks, replaced_forward
from mpcompile.errors import InputError, TraceError
from mpcompile.ir.isolation import global_hooks, of_torch
from mpcompile.ir.module import RESERVED
from mpcompile.layers import MaskedConv2d, MaskedLinear

_WRAPPERS = {  # class -> what to pass instead
    "torch.nn.parallel.data_parallel.DataParallel": "model.module",
    "torch.nn.parallel.distributed.DistributedDataParallel": "model.module",
    "torch.distributed.fsdp.fully_sharded_data_parallel.FullyShardedDataParallel": "model.module, its weights gathered",
    "torch._dynamo.eval_frame.OptimizedModule": "model._orig_mod, and compile the result",
}


def not_a_model(value: Any) -> InputError:
    """Return the error for a value that is not a module; the error says what to pass instead."""
    hint = None
    if isinstance(value, torch.export.ExportedProgram):
        hint = "pass program.module()"
    elif isinstance(value, type):
        hint = f"make one first: {value.__name__}(...)"
    elif isinstance(value, torch.jit.ScriptFunction):
        hint = "pass the torch.nn.Module that it was scripted or traced from"
    elif isinstance(value, Mapping):
        hint = "weights alone do not define a computation: load them into the model first"
    elif callable(value):
        hint = "put it into the forward of a torch.nn.Module that holds its weights"
    expected = "a torch.nn.Module or fx.GraphModule"
    return InputError("this is not a model", expected=expected, found=type(value).__name__, hint=hint)


def _class_path(value: object) -> str:
    return f"{type(value).__module__}.{type(value).__qualname__}"


def _check_part(module: nn.Module, path: str) -> None:
    """Refuse a wrapper, or another form of a model, and say what to pass instead."""
    name, where = type(module).__name__, path or None
    whole = f"model.{path}" if path else "model"
    if isinstance(module, (torch.jit.ScriptModule, torch.jit.ScriptFunction)):
        hint = f"pass the torch.nn.Module that {whole} was scripted or traced from"
        raise TraceError("a TorchScript module cannot be traced", layer=where, found=name, hint=hint)
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
    """Refuse weights without shapes, and kinds of weights that cannot be masked or copied into a graph."""
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if nn.parameter.is_lazy(tensor):
            raise TraceError("the model has lazy parameters", layer=name, hint="run it once on an example input first")
        if tensor.is_quantized or is_traceable_wrapper_subclass(tensor) or tensor.layout != torch.strided:
            kind = "quantised" if tensor.is_quantized else type(tensor.data).__name__
            raise InputError(
                f"the weight is not an ordinary tensor ({kind}, {tensor.layout})",
                layer=name,
                expected="dense tensors on one device",
                hint="gather, densify or dequantise the weights first",
            )


def _all(named: Any) -> Any:
    return named(remove_duplicate=False)


def check_module(model: nn.Module) -> None:
    """Refuse a module that cannot be traced, before anything is copied.

    Raises:
        TraceError: a wrapper, a TorchScript or quantised module, an attribute with a reserved name, or no parameters.
        InputError: weights of a kind that cannot be copied.
    """
    for path, module in model.named_modules():
        _check_part(module, path)
    for name in [*model._modules, *model._parameters, *model._buffers]:
        if name in RESERVED:
            raise TraceError(
                f"{type(model).__name__} has an attribute {name!r}, a name that the transformed module needs itself",
                hint=f"rename the attribute {name!r} of the model",
            )
    if not any(True for _ in model.parameters()):
        raise TraceError(f"{type(model).__name__} has no parameters: there is nothing to compile")
    _check_tensors(model)
    state = set(model.state_dict())
    hooked = [path for path, m in model.named_modules() if m._state_dict_hooks or m._state_dict_pre_hooks]
    if hooked and not state <= {name for name, _ in [*_all(model.named_parameters), *_all(model.named_buffers)]}:
        raise TraceError(
            "state-dict hooks rename the weights",
            layer=hooked[0] or type(model).__name__,
            hint="remove them first (handle.remove()): the transformed module lacks the model's hooks",
        )


def check_hooks(model: nn.Module) -> None:
    """Refuse hooks that a GraphModule would lose, and hooks on every module of the process."""
    everywhere = global_hooks()
    if everywhere:
        raise TraceError(
            f"hooks on all modules of the process are registered ({', '.join(everywhere)[:100]})",
            hint="remove them first (handle.remove()): a graph cannot hold them",
        )
    if not isinstance(model, fx.GraphModule):
        return
    for path, module in model.named_modules():
        masked = isinstance(module, (MaskedLinear, MaskedConv2d))
        replaced = "forward" in vars(module) if not path else replaced_forward(module)
        if path and not masked and not (replaced and type(module).__module__.startswith("torch.nn")):
            continue
        tables = [getattr(module, table).values() for table in HOOK_TABLES]
        # torch.export registers its own checks there.
        hooks = [hook for hook in itertools.chain(*tables) if not of_torch(hook)]
        if hooks or replaced:
            raise TraceError(
                f"{type(module).__name__} has {'hooks' if hooks else 'a forward of its own'}, which would be lost",
                layer=path or None,
                hint="remove it first, and register it again on the result",
            )


def check_backward_hooks(model: nn.Module) -> None:
    """Refuse backward hooks anywhere in a module that is to become a graph of operators.

    Raises:
        TraceError: names the module.
    """
    for path, module in model.named_modules():
        if module._backward_hooks or module._backward_pre_hooks:
            raise backward_hooks(module, path)


def check_finite(tensors: Mapping[str, Tensor], *, bounds: bool = False) -> None:
    """Raise for the first weight that is not finite; a single number may be infinite (the bound of a clamp).

    Args:
        bounds: allow infinite values (an attention mask holds -inf at hidden positions), but no NaN, and in parameters
            -inf alone.

    Raises:
        InputError: names the tensor and counts its values that are NaN or infinite.
    """
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and tensor.device.type != "meta":
            wrong = ~torch.isfinite(tensor) if tensor.dim() and not bounds else tensor.isnan()
            if bounds and tensor.dim() and isinstance(tensor, nn.Parameter):
                wrong |= tensor.isposinf()
            bad = int(wrong.sum())
            if bad:
                raise InputError(
                    "the weight is not finite",
                    layer=name,
                    expected="finite values",
                    found=f"{bad} of {tensor.numel()} NaN or infinite",
                    hint="load another checkpoint, or convert it without overflow",
                )


def check_values(gm: nn.Module) -> None:
    """Raise for a weight without values: on the device "meta" it has only a shape, for counting operations.

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
