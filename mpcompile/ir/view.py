"""One typed view of the weighted layers of a graph.

A linear layer may appear in a graph as a module call, as ``F.linear`` on an attribute or on a lifted placeholder, as an
aten operator, or as one of our masked operators. :func:`layers` returns one type for all of them.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, fx, nn
from torch.nn.utils import parametrize

from mpcompile.ir.effects import known
from mpcompile.ir.module import Lifted
from mpcompile.ir.nodes import ATTENTION, CONV2D, LINEAR, argument, reads_form, target_name
from mpcompile.ir.parts import FOLDED, attribute, rows_name, rows_within, whole_of
from mpcompile.ir.regions import opaque
from mpcompile.kernels import ops, schema
from mpcompile.kernels.nm_format import Pattern
from mpcompile.layers import MaskedConv2d, MaskedLinear

LEFT_WHOLE = "mpcompile.left_whole"  # key in a node's meta: why a call that hides an attention stays a single call


@dataclass(frozen=True)
class ParamRef:
    """A parameter or buffer, or some of its rows.

    Attributes:
        name: dotted name; rows have the name of the whole with ``_rows_START_STOP`` behind it.
        tensor: the values; rows share the memory of the whole.
        node: the node that yields them (None inside a module).
        whole: the node that reads the whole parameter, if ``node`` takes rows of it.
        rows: the rows that ``node`` takes of it.
    """

    name: str
    tensor: Tensor
    node: fx.Node | None
    whole: fx.Node | None = None
    rows: slice | None = None

    @property
    def owned(self) -> bool:
        """True if the graph holds the tensor: it is in a module, or a get_attr node reads it."""
        reader = self.whole or self.node
        return reader is None or reader.op == "get_attr"


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
        bias: node, tensor or None, as the node or its module holds it.
        obstacle: why this use cannot be rewritten, or None.
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


def parameter_read(gm: fx.GraphModule, node: Any, lifted: Lifted) -> ParamRef | None:
    """Return the parameter that a node reads, or takes rows of; None for any other node."""
    if not isinstance(node, fx.Node):
        return None
    if node.op == "get_attr":
        tensor = attribute(gm, str(node.target))
        return ParamRef(str(node.target), tensor, node) if isinstance(tensor, Tensor) else None
    if node.op == "placeholder":
        known = node.name in lifted.tensors
        return ParamRef(lifted.names[node.name], lifted.tensors[node.name], node) if known else None
    whole = whole_of(node)
    ref = None if whole is None else parameter_read(gm, whole, lifted)
    rows = rows_within(node, len(ref.tensor)) if ref is not None and ref.tensor.dim() else None
    if ref is None or rows is None:
        return None
    return ParamRef(rows_name(ref.name, rows), ref.tensor.detach()[rows], node, whole, rows)


def _ints(value: Any) -> list[int] | None:
    """Return a convolution's stride, padding or dilation as two numbers, or None for a name or a traced value."""
    if isinstance(value, int):
        return [value, value]
    if isinstance(value, (tuple, list)) and all(isinstance(v, int) for v in value):
        return list(value) * 2 if len(value) == 1 else list(value)
    return None


def _layer_name(weight: str) -> str:
    return weight.removeprefix(f"{FOLDED}.").removesuffix(".weight")


def _module_obstacle(module: nn.Module) -> str | None:
    """Return why a layer does not simply compute with its stored weight, or None if it does."""
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
    source, weight = argument(node, 0, "input"), parameter_read(gm, argument(node, 1, "weight"), lifted)
    if weight is None or not isinstance(source, fx.Node) or not weight.tensor.is_floating_point():
        return None
    name, shift, mask, pattern = _layer_name(weight.name), 0, None, None
    if masked:
        args = schema.bind(node)
        shift, mask, pattern = 1, parameter_read(gm, args.mask, lifted), Pattern(args.n, args.m)
    bias = argument(node, 2 + shift, "bias")
    if linear:
        obstacle = None if weight.tensor.dim() == 2 else f"its weight has {weight.tensor.dim()} axes"
        if weight.whole is not None and not weight.owned and pattern is None:
            obstacle = "its weight is a part of a graph input"  # no graph could share the mask of a part with another
        return LayerOp(node, name, "linear", source, weight, bias, None, pattern, mask, obstacle)
    raw = [argument(node, i + shift, key, d) for i, key, d in ((3, "stride", 1), (4, "padding", 0), (5, "dilation", 1))]
    axes = [_ints(value) for value in raw]
    groups = argument(node, 6 + shift, "groups", 1)
    numbers = None not in axes and isinstance(groups, int)
    obstacle = None if numbers else "its stride, padding, dilation or groups is not a number"
    geometry = Geometry(axes[0] or [1, 1], axes[1] or [0, 0], axes[2] or [1, 1], groups if numbers else 1)
    return LayerOp(node, name, "conv2d", source, weight, bias, geometry, pattern, mask, obstacle)


def layers(gm: fx.GraphModule, lifted: Lifted | None = None) -> list[LayerOp]:
    """Return every use of a linear or 2-d convolution weight, in graph order; a shared layer appears once per use."""
    uses = []
    for node in gm.graph.nodes:
        if node.op == "call_module":
            layer = _module_layer(gm, node)
        elif node.op == "call_function":
            layer = _function_layer(gm, node, lifted or Lifted())
        else:
            layer = None
        if layer is not None:
            uses.append(layer)
    return uses


def as_stored(gm: fx.GraphModule, layer: LayerOp, lifted: Lifted | None = None) -> LayerOp:
    """Return the layer on all rows of its weight and mask if it is the same rows of both; any other as it is."""
    lifted, weight, mask = lifted or Lifted(), layer.weight, layer.mask
    if weight.whole is None or mask is None or weight.rows != mask.rows:
        return layer
    whole, its = parameter_read(gm, weight.whole, lifted), parameter_read(gm, mask.whole, lifted)
    if whole is None or its is None or whole.tensor.shape != its.tensor.shape:
        return layer
    return replace(layer, name=_layer_name(whole.name), weight=whole, mask=its, bias=None)


def stored_layers(gm: fx.GraphModule, lifted: Lifted | None = None) -> list[LayerOp]:
    """Return one use of each layer, in graph order; parts of one weight and one mask are one layer, on all rows."""
    stored: dict[str, LayerOp] = {}
    for layer in layers(gm, lifted):
        whole = as_stored(gm, layer, lifted)
        stored.setdefault(whole.name, whole)
    return list(stored.values())


# Names of products. "convert" and "upsample_bilinear" are none.
_PRODUCT = re.compile(
    r"_*(r?matmul|imatmul|mm|bmm|mv|addmm|addbmm|baddbmm|addmv|inner|tensordot|chain_matmul|multi_dot|einsum|linear|bilinear|"
    r"multi_head_attention_forward|scaled_dot_product\w*|lstm|gru|rnn_\w+|\w*conv(?!ert)\w*)_*"
)


def unentered(node: fx.Node) -> bool:
    """Return True if a node calls a function of the user's that the trace keeps whole (``torch.fx.wrap``)."""
    return node.op == "call_function" and not opaque(node) and not known(node.target)


def multiplies(gm: fx.GraphModule, node: fx.Node) -> bool:
    """Return True if a function or method multiplies matrices or convolves, or holds a graph that may do so."""
    if node.op not in ("call_function", "call_method") or str(node.target).startswith(f"{ops.NAMESPACE}."):
        return False
    return bool(_PRODUCT.fullmatch(target_name(gm, node))) or opaque(node) is not None


def _of_dtype(weight: Tensor) -> str:
    return "" if weight.is_floating_point() else f", of {weight.dtype}"


def unsupported(gm: fx.GraphModule, lifted: Lifted | None = None) -> dict[str, tuple[tuple[int, ...], str]]:
    """Return name -> (shape, reason) of the weights that :func:`layers` misses, so that no report omits them.

    These are weights of other modules, and tensors of two axes or more that reach a product: as they are, or, if
    they are parameters, transposed, cast or otherwise computed first.
    """
    covered = {layer.weight.name for layer in layers(gm, lifted)}
    missed: dict[str, tuple[tuple[int, ...], str]] = {}
    held: dict[fx.Node, list[ParamRef]] = {}  # nodes that depend on no input -> the tensors that they are computed from
    for node in gm.graph.nodes:
        ref = parameter_read(gm, node, lifted or Lifted())
        if ref is not None:
            held[node] = [ref]
        elif node.op == "call_module":
            module = gm.get_submodule(node.target)
            for name, parameter in module.named_parameters():
                full = f"{node.target}.{name}"
                if parameter.dim() >= 2 and full not in covered:
                    why = f"inside {type(module).__name__}{_of_dtype(parameter)}{_left(node)}"
                    missed[_layer_name(full)] = (tuple(parameter.shape), why)
        elif multiplies(gm, node) or unentered(node):
            for operand in _weights(node):
                refs = held.get(operand, [])
                largest = max((ref.tensor.numel() for ref in refs), default=0)
                for ref in refs:  # smaller ones scale the weight
                    if ref.tensor.dim() >= 2 and ref.tensor.numel() == largest and ref.name not in covered:
                        missed[_layer_name(ref.name)] = (tuple(ref.tensor.shape), _why(gm, node, operand, ref))
        elif reads_form(node):
            held[node] = []
        elif node.op in ("call_function", "call_method") and all(source in held for source in node.all_input_nodes):
            sources = {ref.name: ref for source in node.all_input_nodes for ref in held[source]}
            held[node] = [ref for ref in sources.values() if isinstance(ref.tensor, nn.Parameter)]
    return missed


def _left(node: fx.Node) -> str:
    return f": {node.meta[LEFT_WHOLE]}" if LEFT_WHOLE in node.meta else ""


def whole_functions(gm: fx.GraphModule, lifted: Lifted | None = None) -> list[str]:
    """Return the names of functions that the graph holds as a whole although they take weights."""
    lifted, names = lifted or Lifted(), []
    for node in filter(unentered, gm.graph.nodes):
        refs = [parameter_read(gm, operand, lifted) for operand in node.all_input_nodes]
        if any(ref is not None and ref.tensor.dim() >= 2 for ref in refs):
            names.append(target_name(gm, node))
    return list(dict.fromkeys(names))


def _weights(node: fx.Node) -> list[fx.Node]:
    """Return the operands of a product that may be weights: not a layer's input, and not the mask of attention."""
    operands = node.all_input_nodes
    if node.target in LINEAR | CONV2D:
        return [n for n in operands if n is not argument(node, 0, "input")]
    if node.target in ATTENTION:
        return [n for n in operands if n is not argument(node, 3, "attn_mask")]
    return operands


def _why(gm: fx.GraphModule, node: fx.Node, operand: fx.Node, ref: ParamRef) -> str:
    """Return why a weight that reaches a product is none of a layer's."""
    if opaque(node):
        why = f"inside {opaque(node)}, which holds a graph of its own"
    elif unentered(node):
        why = f"used by {target_name(gm, node)}, which the graph holds as a whole"
    else:
        why = f"used by {target_name(gm, node)}"
    if operand is not ref.node:
        why += f", behind {operand.args[1] if operand.target is getattr else target_name(gm, operand)}"
    return why + _of_dtype(ref.tensor) + _left(node)
