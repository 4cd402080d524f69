"""Copies of a user's model: the model itself is never changed."""

from __future__ import annotations

import copy
import functools
from types import FunctionType, MethodType
from typing import Any

from torch import nn

from mpcompile.errors import TraceError, summary
from mpcompile.ir.isolation import rebind, tensors_of

HOOK_TABLES = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def without_history(model: nn.Module) -> dict[int, Any]:
    """Return a memo for deepcopy that maps computed tensors, which deepcopy refuses to copy, to detached copies.

    Hooks and forward methods leave such tensors in attributes.
    """
    return {id(t): t.detach().clone() for t in tensors_of(model) if not t.is_leaf}


def copy_of(model: nn.Module) -> nn.Module:
    """Return a copy of a model, including the functions and hooks that were set on individual modules."""
    memo = without_history(model)
    try:
        copied = copy.deepcopy(model, memo)
    except Exception as error:
        raise TraceError(f"{type(model).__name__} cannot be copied: {summary(error)}") from error
    parts = [*model.modules(), *model.parameters(), *model.buffers()]
    memo = {id(part): memo[id(part)] for part in parts}
    for module in copied.modules():
        for key, value in list(vars(module).items()):
            if isinstance(value, (FunctionType, MethodType, functools.partial)):
                vars(module)[key] = rebind(value, memo)
        for table in HOOK_TABLES:
            hooks = getattr(module, table)
            for key, hook in hooks.items():
                hooks[key] = rebind(hook, memo)
    for (_, old), (_, new) in zip(model.named_parameters(), copied.named_parameters(), strict=True):
        for hook in (old._backward_hooks or {}).values():
            new.register_hook(rebind(hook, memo))
        for hook in (getattr(old, "_post_accumulate_grad_hooks", None) or {}).values():
            new.register_post_accumulate_grad_hook(rebind(hook, memo))
    return copied
