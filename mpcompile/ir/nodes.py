"""Single nodes of a graph: their arguments, names and fake values, and which placeholders hold parameters or data."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from mpcompile.ir.module import Lifted

LINEAR = frozenset({F.linear, torch.ops.aten.linear.default})
CONV2D = frozenset({F.conv2d, torch.ops.aten.conv2d.default, torch.ops.aten.conv2d.padding})
MATMUL = frozenset({torch.matmul, torch.bmm, torch.ops.aten.matmul.default, torch.ops.aten.bmm.default, torch.einsum})
ATTENTION = frozenset({F.scaled_dot_product_attention, torch.ops.aten.scaled_dot_product_attention.default})
CASTS = ("alias", "to", "type", "type_as", "float", "half", "bfloat16", "_to_copy", "maybe_add_mask")
_ARITHMETIC = ("add", "iadd", "add_", "sub", "isub", "sub_", "mul", "imul", "mul_", "div", "div_", "truediv", "addcmul")
_ACTIVATIONS = ("gelu", "relu", "silu", "sigmoid", "tanh", "hardswish", "mish", "leaky_relu", "dropout", "DropPath")
_UNARY = ("neg", "pow", "sqrt", "rsqrt", "exp", "square", "abs", "clamp", "contiguous", "clone", "detach", "softplus")
_FUNCTIONS = (
    "log",
    "log1p",
    "expm1",
    "erf",
    "sin",
    "cos",
    "reciprocal",
    "elu",
    "selu",
    "relu6",
    "hardsigmoid",
    "hardtanh",
    "softsign",
)
ELEMENTWISE = frozenset(_ARITHMETIC + _ACTIVATIONS + _UNARY + _FUNCTIONS + CASTS)
"""Names of operations that compute each value from those at the same place, with broadcasting."""
ELEMENTWISE_MODULES = (
    *(nn.Identity, nn.Dropout, nn.GELU, nn.ReLU, nn.ReLU6, nn.SiLU, nn.Sigmoid, nn.Tanh, nn.Hardswish, nn.Mish),
    *(nn.LeakyReLU, nn.ELU, nn.Softplus),
)
ALONG_LAST = frozenset(("linear", "masked_linear", "layer_norm", "rms_norm"))
"""Names of operations that read and write the last axis as a whole."""
LAST_AXIS_MODULES = (nn.Linear, nn.LayerNorm, nn.RMSNorm)
_FQN = re.compile(r"_(?:modules|parameters|buffers)\[['\"]([^'\"]+)['\"]\]")


def argument(node: fx.Node, index: int, name: str, default: Any = None) -> Any:
    """Return positional argument ``index`` of a call, or its keyword ``name``, or ``default``."""
    return node.args[index] if len(node.args) > index else node.kwargs.get(name, default)


def target_name(gm: fx.GraphModule, node: fx.Node) -> str:
    """Return the name of a node's operation: of its module's class, its method or its function."""
    if node.op == "call_module":
        return type(gm.get_submodule(str(node.target))).__name__
    if node.op == "call_function":
        packet = getattr(node.target, "overloadpacket", None)
        return str(getattr(packet or node.target, "__name__", node.target))
    return str(node.target)


def fake_value(node: fx.Node) -> Any:
    """Return the fake tensor (or tuple of them, or number) that a node yields, from ``val`` or ``example_value``."""
    return node.meta.get("val", node.meta.get("example_value"))


def shape_of(node: fx.Node) -> tuple[int, ...] | None:
    """Return the shape of a node's tensor, with example values for symbolic sizes; None if it yields no tensor."""
    value = fake_value(node)
    if not isinstance(value, Tensor):
        return None
    return tuple(int(hint(s)) for s in value.shape)


def hint(size: Any) -> Any:
    """Return a symbolic number's example value, without specialising the compile on it; anything else unchanged."""
    return size.node.hint if isinstance(size, (torch.SymInt, torch.SymFloat, torch.SymBool)) else size


def element_count(shape: Sequence[int]) -> int:
    """Return the product of a shape."""
    return math.prod(shape)


_FORM = frozenset(
    {
        "shape",
        "size",
        "dim",
        "ndim",
        "numel",
        "nelement",
        "dtype",
        "device",
        "stride",
        "requires_grad",
        "is_cuda",
        "layout",
        "itemsize",
        "is_floating_point",
        "is_complex",
        "get_device",
        "element_size",
        "storage_offset",
        "is_contiguous",
        "sym_size",
        "sym_numel",
        "sym_stride",
        "sym_storage_offset",
    }
)


def reads_form(node: fx.Node) -> bool:
    """Return True if a node reads the form of a tensor alone: its sizes, dtype or device, and no value."""
    if node.op == "call_method":
        return node.target in _FORM
    if node.target is getattr:
        return node.args[1] in _FORM
    packet = getattr(node.target, "overloadpacket", node.target)
    return node.op == "call_function" and getattr(packet, "__name__", "") in _FORM


def reads_number(node: fx.Node) -> bool:
    """Return True if a node reads a Python number from a tensor, as compiled code does for numbers that vary."""
    if node.op == "call_method":
        return node.target == "item"
    return node.target in (torch.ops.aten.item.default, torch.ops.aten._local_scalar_dense.default)


def dynamo_name(node: fx.Node) -> str | None:
    """Return the dotted name of the parameter or buffer that a dynamo placeholder holds, or None for a real input."""
    source = getattr(getattr(node, "_dynamo_source", None), "name", None)
    source = source() if callable(source) else source
    if not isinstance(source, str) or not re.search(r"_(?:parameters|buffers)\[", source):
        return None
    return ".".join(_FQN.findall(source)) or None


def lifted_from(gm: fx.GraphModule, inputs: Sequence[Any] | Mapping[str, Any]) -> Lifted:
    """Match dynamo's lifted parameters with the tensors that the backend received."""
    lifted = Lifted()
    placeholders = [n for n in gm.graph.nodes if n.op == "placeholder"]
    for node, value in zip(placeholders, inputs, strict=False):
        name = dynamo_name(node)
        if name is not None and isinstance(value, Tensor):
            lifted.tensors[node.name], lifted.names[node.name] = value, name
    return lifted


def real_inputs(gm: fx.GraphModule, lifted: Lifted) -> list[fx.Node]:
    """Return the placeholders that hold data rather than parameters."""
    return [n for n in gm.graph.nodes if n.op == "placeholder" and n.name not in lifted.tensors]


def batch_size(gm: fx.GraphModule, lifted: Lifted) -> int:
    """Return the length of axis 0 of the first tensor input; 1 if there is none, or if it is empty."""
    for node in real_inputs(gm, lifted):
        for value in pytree.tree_leaves(fake_value(node)):
            if isinstance(value, Tensor) and value.dim():
                return max(1, int(hint(value.shape[0])))
    return 1
