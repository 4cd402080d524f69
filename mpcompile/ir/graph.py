"""The IR: an owned, torch-level fx.GraphModule, and one typed view of its weighted layers.

A linear layer may stand in a graph as a module call, as ``F.linear`` on an attribute or on a lifted placeholder, as an
aten op, or masked or packed as one of our own. :func:`layers` shows all of them alike.
"""

from __future__ import annotations

import contextlib
import copy
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch._subclasses import FakeTensor, FakeTensorMode
from torch._subclasses.fake_tensor import unset_fake_temporarily
from torch.fx.passes.fake_tensor_prop import FakeTensorProp
from torch.nn.utils import parametrize
from torch.utils import _pytree as pytree

from mpcompile.errors import GraphError, summary
from mpcompile.ir.flops import flop_counter
from mpcompile.ir.isolation import tensors_of, untouched, without_global_hooks
from mpcompile.ir.module import IRModule  # noqa: F401  (imported from here, too)
from mpcompile.ir.numerics import modes_kept
from mpcompile.ir.parts import FOLDED, attribute
from mpcompile.ir.regions import opaque
from mpcompile.kernels import ops, schema
from mpcompile.kernels.nm_format import Pattern
from mpcompile.layers import MaskedConv2d, MaskedLinear

if TYPE_CHECKING:
    pass

LINEAR = frozenset({F.linear, torch.ops.aten.linear.default})
CONV2D = frozenset({F.conv2d, torch.ops.aten.conv2d.default})
MATMUL = frozenset({torch.matmul, torch.bmm, torch.ops.aten.matmul.default, torch.ops.aten.bmm.default, torch.einsum})
ATTENTION = frozenset({F.scaled_dot_product_attention, torch.ops.aten.scaled_dot_product_attention.default})

_FQN = re.compile(r"_(?:modules|parameters|buffers)\[['\"]([^'\"]+)['\"]\]")


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


@dataclass(frozen=True)
class ParamRef:
    """A parameter or buffer: its dotted name, its tensor, and the node that brings it in (None inside a module)."""

    name: str
    tensor: Tensor
    node: fx.Node | None


@dataclass(frozen=True)
class Geometry:
    """Stride, padding, dilation and groups of a 2-d convolution."""

    stride: list[int]
    padding: list[int]
    dilation: list[int]
    groups: int


@dataclass(frozen=True)
class LayerOp:
    """One use of a linear or convolution weight.

    Attributes:
        name: the layer's dotted name, e.g. ``"blocks.0.attn.qkv"``.
        kind: ``"linear"`` or ``"conv2d"``.
        weight: (out, in) or (out, in / groups, kh, kw).
        bias: node, tensor or None, as the node or its module has it.
        obstacle: why this use can't be rewritten, or None.
    """

    node: fx.Node
    name: str
    kind: str
    input: fx.Node
    weight: ParamRef
    bias: Any = None
    geometry: Geometry | None = None
    pattern: Pattern | None = None
    mask: ParamRef | None = None
    obstacle: str | None = None

    @property
    def depthwise(self) -> bool:
        return self.geometry is not None and self.geometry.groups > 1 and self.weight.tensor.shape[1] == 1


@dataclass
class Lifted:
    """Parameters that arrive as graph inputs, by placeholder name (dynamo graphs); empty otherwise."""

    tensors: dict[str, Tensor] = field(default_factory=dict)
    names: dict[str, str] = field(default_factory=dict)


def argument(node: fx.Node, index: int, name: str, default: Any = None) -> Any:
    """Positional argument ``index`` of a call, or its keyword ``name``, or ``default``."""
    return node.args[index] if len(node.args) > index else node.kwargs.get(name, default)


def dynamo_name(node: fx.Node) -> str | None:
    """Dotted name of the parameter or buffer that a dynamo placeholder stands for, or None for a real input."""
    source = getattr(getattr(node, "_dynamo_source", None), "name", None)
    source = source() if callable(source) else source
    if not isinstance(source, str) or not re.search(r"_(?:parameters|buffers)\[", source):
        return None
    return ".".join(_FQN.findall(source)) or None


def fake_value(node: fx.Node) -> Any:
    """The fake tensor (or tuple of them, or number) that a node yields, from ``val`` or ``example_value``."""
    return node.meta.get("val", node.meta.get("example_value"))


def shape_of(node: fx.Node) -> tuple[int, ...] | None:
    """Shape of a node's tensor with symbolic sizes at their example values, or None where it isn't a tensor."""
    value = fake_value(node)
    if not isinstance(value, Tensor):
        return None
    return tuple(int(hint(s)) for s in value.shape)


def hint(size: Any) -> Any:
    """A symbolic number's example value, read without specialising the compile on it; anything else as it is."""
    return size.node.hint if isinstance(size, (torch.SymInt, torch.SymFloat, torch.SymBool)) else size


def device_of(model: nn.Module) -> torch.device:
    """Where a model's weights are; the CPU without any."""
    return next((p.device for p in model.parameters()), torch.device("cpu"))


@contextlib.contextmanager
def training_flags(module: nn.Module, training: bool) -> Iterator[None]:
    """Every submodule in one mode for a while; afterwards each as it was, also where they differed."""
    flags = [(m, m.training) for m in module.modules()]
    try:
        for m, _ in flags:
            m.training = training
        yield
    finally:
        for m, flag in flags:
            m.training = flag


def _is_plain(module: nn.Module) -> bool:
    """Whether calling a module leaves nothing behind in it, in eval mode: torch's and our own, as they are."""
    for part in module.modules():
        if "forward" in vars(part) or any(getattr(part, table) for table in _FORWARD_HOOKS):
            return False
        if not type(part).__module__.startswith(("torch.nn.modules.", "mpcompile.layers")):
            return False
    return True


def reads_number(node: fx.Node) -> bool:
    """Whether a node takes a Python number out of a tensor, as compiled code does with numbers that vary."""
    if node.op == "call_method":
        return node.target == "item"
    return node.target in (torch.ops.aten.item.default, torch.ops.aten._local_scalar_dense.default)


class _Shapes(FakeTensorProp):
    """Runs the graph on fake tensors; leaves ``val`` and ``macs`` (of the whole batch) on every node.

    Layers that could keep something of what they see are called on copies that share their tensors.

    Args:
        numbers: what the placeholders of single numbers hold, by name: fake tensors have no values.
    """

    def __init__(self, gm: fx.GraphModule, mode: FakeTensorMode, numbers: Mapping[str, Any]) -> None:
        super().__init__(gm, mode)
        self.extra_traceback = False
        self.numbers = numbers
        self.node: fx.Node | None = None  # the one that runs
        self.stand_ins: dict[str, nn.Module] = {}

    def run_node(self, n: fx.Node) -> Any:
        self.node = n
        if reads_number(n):
            return self._number(n)
        # Branches count for nothing (which runs, and how often, is not known); out= takes no tensor with a gradient.
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
        return self._mode.from_tensor(value) if isinstance(value, Tensor) else value  # real ones would be written to

    def call_module(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        module = self.fetch_attr(target)
        if _is_plain(module):
            return module(*args, **kwargs)
        if target not in self.stand_ins:
            fakes: Any = {id(t): self._mode.from_tensor(t) for t in tensors_of(module)}
            with unset_fake_temporarily():  # what a hook keeps is copied as it is
                self.stand_ins[target] = copy.deepcopy(module, fakes)
        with untouched(module):
            return self.stand_ins[target](*args, **kwargs)

    def _number(self, n: fx.Node) -> Any:
        """The number that was given, or the one that it had when the graph was captured; else 1."""
        source: Any = n.all_input_nodes[0]
        known = self.numbers.get(source.name, hint(n.meta.get("example_value")))
        if not isinstance(known, (bool, int, float)):
            known = torch.ones((), dtype=self.env[source].dtype).item()
        n.meta["val"], n.meta["macs"] = known, 0
        return known


def _is_number(value: Any) -> bool:
    """Whether a graph input is a single number whose value is known."""
    known = isinstance(value, Tensor) and not isinstance(value, FakeTensor) and value.device.type == "cpu"
    return known and value.dim() == 0


def propagate(gm: fx.GraphModule, inputs: Sequence[Any]) -> Any:
    """Recompute shapes and MACs of every node, in eval mode and without touching a real value.

    Raises:
        GraphError: an op rejects the shapes it is given.
    """
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    inputs = [hint(value) for value in inputs]
    names = [n.name for n in gm.graph.nodes if n.op == "placeholder"]
    numbers = {name: v.item() for name, v in zip(names, inputs, strict=False) if _is_number(v)}
    prop = _Shapes(gm, mode, numbers)
    # Not under no_grad: the counter's module tracker hooks views of parameters, which then have no gradient function.
    with modes_kept(), training_flags(gm, False), torch.enable_grad(), without_global_hooks():
        try:
            fakes = pytree.tree_map_only(Tensor, mode.from_tensor, inputs)
            return prop.propagate_dont_convert_inputs(*fakes)
        except Exception as error:
            node = prop.node
            where = None if node is None or node.op != "call_module" else str(node.target)
            raise GraphError(
                f"shapes don't fit through the graph: {summary(error)}",
                layer=where,
                expected="example inputs that the model accepts",
                found=", ".join(str(tuple(i.shape)) if isinstance(i, Tensor) else repr(i)[:80] for i in inputs),
                hint=None if node is None else f"it is raised at {target_name(gm, node)} (node {node.name})",
            ) from error


def real_inputs(gm: fx.GraphModule, lifted: Lifted) -> list[fx.Node]:
    """Placeholders that carry data, not parameters."""
    return [n for n in gm.graph.nodes if n.op == "placeholder" and n.name not in lifted.tensors]


def batch_size(gm: fx.GraphModule, lifted: Lifted) -> int:
    """Length of axis 0 of the first tensor input; 1 where there is none, or where it is empty."""
    for node in real_inputs(gm, lifted):
        for value in pytree.tree_leaves(fake_value(node)):
            if isinstance(value, Tensor) and value.dim():
                return max(1, int(hint(value.shape[0])))
    return 1


def _resolve(gm: fx.GraphModule, node: Any, lifted: Lifted) -> ParamRef | None:
    """The parameter that a get_attr or lifted placeholder brings in, seen through detach, or None."""
    if not isinstance(node, fx.Node):
        return None
    if node.op == "get_attr":
        tensor = attribute(gm, str(node.target))
        return ParamRef(str(node.target), tensor, node) if isinstance(tensor, Tensor) else None
    if node.op == "placeholder" and node.name in lifted.tensors:
        return ParamRef(lifted.names[node.name], lifted.tensors[node.name], node)
    return None


def _ints(value: Any) -> list[int] | None:
    """A convolution's stride, padding or dilation as two numbers, or None (a name, or a traced value)."""
    if isinstance(value, int):
        return [value, value]
    if isinstance(value, (tuple, list)) and all(isinstance(v, int) for v in value):
        return list(value) * 2 if len(value) == 1 else list(value)
    return None


def _layer_name(weight: str) -> str:
    return weight.removeprefix(f"{FOLDED}.").removesuffix(".weight")


def _module_obstacle(module: nn.Module) -> str | None:
    """Why a layer's weight isn't all that decides what it computes, or None."""
    if parametrize.is_parametrized(module):
        return "its weight is parametrized"
    if "weight" not in module._parameters:
        return "its weight is computed before each call"
    if module._forward_hooks or module._forward_pre_hooks:
        return "it has forward hooks"
    if module._backward_hooks or module._backward_pre_hooks:
        return "it has backward hooks"
    if "forward" in vars(module):
        return "its forward was replaced"
    return None


def _module_layer(gm: fx.GraphModule, node: fx.Node) -> LayerOp | None:
    name = str(node.target)
    module = gm.get_submodule(name)
    source = argument(node, 0, "input")
    if not isinstance(source, fx.Node) or not isinstance(module, (nn.Linear, nn.Conv2d, MaskedLinear, MaskedConv2d)):
        return None
    if not module.weight.is_floating_point():
        return None
    obstacle = _module_obstacle(module)
    weight = ParamRef(f"{name}.weight", module.weight, None)
    if isinstance(module, (MaskedLinear, MaskedConv2d)):
        geometry = None
        if isinstance(module, MaskedConv2d):
            geometry = Geometry(module.stride, module.padding, module.dilation, module.groups)
        kind = "linear" if geometry is None else "conv2d"
        mask = ParamRef(f"{name}.mask", module.mask, None)
        return LayerOp(node, name, kind, source, weight, module.bias, geometry, module.pattern, mask, obstacle)
    if isinstance(module, nn.Linear):
        if type(module).forward is not nn.Linear.forward:
            obstacle = f"{type(module).__name__} has a forward of its own"
        return LayerOp(node, name, "linear", source, weight, module.bias, obstacle=obstacle)
    stride, padding, dilation = _ints(module.stride), _ints(module.padding), _ints(module.dilation)
    if type(module).forward is not nn.Conv2d.forward:
        obstacle = f"{type(module).__name__} has a forward of its own"
    elif module.padding_mode != "zeros":
        obstacle = f"padding_mode={module.padding_mode!r}"
    elif padding is None:
        obstacle = f"padding={module.padding!r}"
    geometry = Geometry(stride or [1, 1], padding or [0, 0], dilation or [1, 1], module.groups)
    return LayerOp(node, name, "conv2d", source, weight, module.bias, geometry, obstacle=obstacle)


def _function_layer(gm: fx.GraphModule, node: fx.Node, lifted: Lifted) -> LayerOp | None:
    target: Any = node.target
    masked = target in ops.MASKED
    linear = target in LINEAR or target is ops.masked_linear
    if not (masked or linear or target in CONV2D):
        return None
    source, weight = argument(node, 0, "input"), _resolve(gm, argument(node, 1, "weight"), lifted)
    if weight is None or not isinstance(source, fx.Node) or not weight.tensor.is_floating_point():
        return None
    name, shift, mask, pattern = _layer_name(weight.name), 0, None, None
    if masked:
        args = schema.bind(node)
        shift, mask, pattern = 1, _resolve(gm, args.mask, lifted), Pattern(args.n, args.m)
    bias = argument(node, 2 + shift, "bias")
    if linear:
        obstacle = None if weight.tensor.dim() == 2 else f"its weight has {weight.tensor.dim()} axes"
        return LayerOp(node, name, "linear", source, weight, bias, None, pattern, mask, obstacle)
    raw = [argument(node, i + shift, key, d) for i, key, d in ((3, "stride", 1), (4, "padding", 0), (5, "dilation", 1))]
    axes = [_ints(value) for value in raw]
    groups = argument(node, 6 + shift, "groups", 1)
    known = None not in axes and isinstance(groups, int)
    obstacle = None if known else "its stride, padding, dilation or groups is not a number"
    geometry = Geometry(axes[0] or [1, 1], axes[1] or [0, 0], axes[2] or [1, 1], groups if known else 1)
    return LayerOp(node, name, "conv2d", source, weight, bias, geometry, pattern, mask, obstacle)


def layers(gm: fx.GraphModule, lifted: Lifted | None = None) -> list[LayerOp]:
    """Every use of a linear or 2-d convolution weight, in graph order; a shared layer appears once a use."""
    found = []
    for node in gm.graph.nodes:
        if node.op == "call_module":
            layer = _module_layer(gm, node)
        elif node.op == "call_function":
            layer = _function_layer(gm, node, lifted or Lifted())
        else:
            layer = None
        if layer is not None:
            found.append(layer)
    return found


def _of_dtype(weight: Tensor) -> str:
    return "" if weight.is_floating_point() else f", of {weight.dtype}"


def unsupported(gm: fx.GraphModule, lifted: Lifted | None = None) -> dict[str, tuple[tuple[int, ...], str]]:
    """Weights that :func:`layers` can't show: name -> (shape, why), so that a report leaves none out."""
    known = {layer.weight.name for layer in layers(gm, lifted)}
    found: dict[str, tuple[tuple[int, ...], str]] = {}
    for node in gm.graph.nodes:
        if node.op == "call_module":
            module = gm.get_submodule(node.target)
            for name, parameter in module.named_parameters():
                full = f"{node.target}.{name}"
                if parameter.dim() >= 2 and full not in known:
                    why = f"inside {type(module).__name__}{_of_dtype(parameter)}"
                    found[_layer_name(full)] = (tuple(parameter.shape), why)
        elif node.op == "call_function" and (
            node.target in MATMUL | LINEAR or "conv" in str(node.target) or opaque(node)
        ):
            for operand in node.all_input_nodes:
                ref = _resolve(gm, operand, lifted or Lifted())
                if ref is not None and ref.tensor.dim() >= 2 and ref.name not in known:
                    op = getattr(node.target, "__name__", str(node.target))
                    why = f"inside {opaque(node)}, which holds a graph of its own" if opaque(node) else f"used by {op}"
                    found[_layer_name(ref.name)] = (tuple(ref.tensor.shape), why + _of_dtype(ref.tensor))
    return found


def target_name(gm: fx.GraphModule, node: fx.Node) -> str:
    """What a node does, as one word: module class, method or function name."""
    if node.op == "call_module":
        return type(gm.get_submodule(str(node.target))).__name__
    if node.op == "call_function":
        packet = getattr(node.target, "overloadpacket", None)
        return str(getattr(packet or node.target, "__name__", node.target))
    return str(node.target)


def element_count(shape: Sequence[int]) -> int:
    """Product of a shape."""
    return math.prod(shape)


def lifted_from(gm: fx.GraphModule, inputs: Sequence[Any] | Mapping[str, Any]) -> Lifted:
    """Match dynamo's lifted parameters to the tensors that the backend received."""
    lifted = Lifted()
    placeholders = [n for n in gm.graph.nodes if n.op == "placeholder"]
    for node, value in zip(placeholders, inputs, strict=False):
        name = dynamo_name(node)
        if name is not None and isinstance(value, Tensor):
            lifted.tensors[node.name], lifted.names[node.name] = value, name
    return lifted
