"""The two graphs of a reconstruction: copies of the student, one of them with the dense model's tensors."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from mpcompile.capture.signature import call_graph
from mpcompile.errors import GraphError, MPCompileError
from mpcompile.ir.effects import switches
from mpcompile.ir.module import IRModule, masked
from mpcompile.ir.nodes import hint
from mpcompile.ir.parts import device_of
from mpcompile.layers import fixed_batch


def sides(gm: IRModule, dense: Mapping[str, Tensor]) -> tuple[IRModule, IRModule]:
    """Return two copies of a graph, in evaluation mode: the student, and its twin with the dense tensors and no masks.

    Both run in the precision of their weights: switches of autocast and of recording gradients are left out.

    Args:
        gm: a masked graph; not changed.
        dense: tensors of the dense model by name, channels in the graph's order. Tensors not named are equal in both.

    Raises:
        GraphError: a dense tensor does not fit.
    """
    student, twin = copy.deepcopy(gm), copy.deepcopy(gm)
    for side in (student, twin):
        for module in side.modules():
            module.training = False
        _without_switches(side)
    own: dict[str, Tensor] = {**dict(twin.named_parameters(remove_duplicate=False)), **twin.state_dict(keep_vars=True)}
    with torch.no_grad():
        for name, tensor in dense.items():
            if name not in own or own[name].shape != tensor.shape:
                raise GraphError(
                    "a tensor of the dense model does not fit the graph",
                    layer=name,
                    expected=tuple(own[name].shape) if name in own else "a tensor of this name in the graph",
                    found=tuple(tensor.shape),
                    hint="pass the model that the graph was made from",
                )
            own[name].copy_(tensor)
        for weight, mask, _ in masked(student):
            weight.masked_fill_(~mask, 0)
        for _, mask, _ in masked(twin):
            mask.fill_(True)
    return student, twin


def fixed_size(gm: IRModule, inputs: Sequence[Any]) -> int | None:
    """Return the one batch size that a graph takes, that of its example inputs; None if it takes another, too."""
    known = fixed_batch(gm)
    sizes = [int(hint(v.shape[0])) for v in inputs if isinstance(v, Tensor) and v.dim()]
    if known is not None or not sizes:
        return known

    def larger(value: Any) -> Any:
        if not isinstance(value, Tensor) or not value.dim() or int(hint(value.shape[0])) != sizes[0]:
            return value
        shape = [int(hint(size)) for size in value.shape]
        return torch.zeros([shape[0] + 1, *shape[1:]], dtype=value.dtype, device=device_of(gm))

    try:
        with torch.no_grad():
            call_graph(gm, [larger(value) for value in inputs])
    except (RuntimeError, MPCompileError):
        return sizes[0]
    return None


def _without_switches(gm: IRModule) -> None:
    """Erase the nodes that switch autocast or the recording of gradients on and off."""
    found = [node for node in gm.graph.nodes if switches(node)]
    for node in reversed(found):
        if not node.users:
            gm.graph.erase_node(node)
    if found:
        gm.recompile()
