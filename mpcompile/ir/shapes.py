"""Shapes and MACs of every node, from one run of the graph on fake tensors."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._subclasses import FakeTensor, FakeTensorMode
from torch._subclasses.fake_tensor import unset_fake_temporarily
from torch.fx.passes.fake_tensor_prop import FakeTensorProp
from torch.utils import _pytree as pytree

from mpcompile.errors import GraphError, InputError, summary
from mpcompile.ir.isolation import tensors_of, untouched, without_global_hooks
from mpcompile.ir.macs import flop_counter
from mpcompile.ir.nodes import hint, reads_number, target_name
from mpcompile.ir.numerics import modes_kept, training_flags
from mpcompile.ir.regions import opaque

_FORWARD_HOOKS = (
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
    "_backward_hooks",
    "_backward_pre_hooks",
    "_is_full_backward_hook",
)


def _is_plain(module: nn.Module) -> bool:
    """Return True if a call in eval mode cannot change the module: all of it is torch's or ours, and has no hooks."""
    for part in module.modules():
        if "forward" in vars(part) or any(getattr(part, table) for table in _FORWARD_HOOKS):
            return False
        if not type(part).__module__.startswith(("torch.nn.modules.", "mpcompile.layers")):
            return False
    return True


class _Shapes(FakeTensorProp):
    """Run the graph on fake tensors and set ``val`` and ``macs`` (of the whole batch) on every node.

    Layers that might store something when called are replaced by copies that hold fakes of their tensors.

    Args:
        numbers: placeholder name -> value, for inputs that are single numbers: fake tensors have no values.
    """

    def __init__(self, gm: fx.GraphModule, mode: FakeTensorMode, numbers: Mapping[str, Any]) -> None:
        super().__init__(gm, mode)
        self.extra_traceback = False
        self.numbers = numbers
        self.node: fx.Node | None = None  # the node that is running
        self.stand_ins: dict[str, nn.Module] = {}

    def run_node(self, n: fx.Node) -> Any:
        self.node = n
        if reads_number(n):
            return self._number(n)
        # Branches count zero MACs (which one runs, and how often, is unknown). no_grad is for ops with out=, which
        # refuse tensors that require gradients.
        if opaque(n) or "out" in n.kwargs:
            with torch.no_grad():
                result = super().run_node(n)
            n.meta["macs"] = 0
            return result
        with flop_counter() as counter:
            result = super().run_node(n)
        n.meta["macs"] = counter.get_total_flops() // 2
        return result

    def get_attr(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        value = super().get_attr(target, args, kwargs)
        # A fake, because a node could write to a real tensor.
        return self._mode.from_tensor(value) if isinstance(value, Tensor) else value

    def call_module(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        module = self.fetch_attr(target)
        if _is_plain(module):
            return module(*args, **kwargs)
        if target not in self.stand_ins:
            fakes: Any = {id(t): self._mode.from_tensor(t) for t in tensors_of(module)}
            with unset_fake_temporarily():  # real tensors that a hook stores are copied as they are
                self.stand_ins[target] = copy.deepcopy(module, fakes)
        with untouched(module):
            return self.stand_ins[target](*args, **kwargs)

    def _number(self, n: fx.Node) -> Any:
        """Return the number that was passed in, else the one seen at capture, else 1."""
        source: Any = n.all_input_nodes[0]
        known = self.numbers.get(source.name, hint(n.meta.get("example_value")))
        if not isinstance(known, (bool, int, float)):
            with unset_fake_temporarily():  # a fake tensor has no value to read
                known = torch.ones((), dtype=self.env[source].dtype).item()
        n.meta["val"], n.meta["macs"] = known, 0
        return known


def _is_number(value: Any) -> bool:
    """Return True if a graph input is a single number whose value is known."""
    known = isinstance(value, Tensor) and not isinstance(value, FakeTensor) and value.device.type == "cpu"
    return known and value.dim() == 0


def propagate(gm: fx.GraphModule, inputs: Sequence[Any]) -> Any:
    """Recompute the shapes and MACs of every node, in eval mode and without touching a real value.

    Raises:
        InputError: the graph was captured for inputs of other sizes.
        GraphError: an op rejects the shapes it is given.
    """
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    inputs = [hint(value) for value in inputs]
    names = [n.name for n in gm.graph.nodes if n.op == "placeholder"]
    numbers = {name: v.item() for name, v in zip(names, inputs, strict=False) if _is_number(v)}
    prop = _Shapes(gm, mode, numbers)
    # Not under no_grad: the counter's module tracker registers hooks on views of parameters, which then would have no
    # gradient function.
    with modes_kept(), training_flags(gm, False), torch.enable_grad(), without_global_hooks():
        try:
            fakes = pytree.tree_map_only(Tensor, mode.from_tensor, inputs)
            return prop.propagate_dont_convert_inputs(*fakes)
        except InputError:  # the graph's own check of its inputs
            raise
        except Exception as error:
            node = prop.node
            where = None if node is None or node.op != "call_module" else str(node.target)
            raise GraphError(
                f"shapes cannot be propagated through the graph: {summary(error)}",
                layer=where,
                expected="example inputs that the model accepts",
                found=", ".join(str(tuple(i.shape)) if isinstance(i, Tensor) else repr(i)[:80] for i in inputs),
                hint=None if node is None else f"the error comes from {target_name(gm, node)} (node {node.name})",
            ) from error
