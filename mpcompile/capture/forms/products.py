"""Products in one form: the aten operators that a linear or convolution layer may be exported as become that layer's.

``torch.export`` writes a layer as ``aten.linear`` or ``aten.conv2d``. After ``run_decompositions`` it stands as
``aten.addmm(bias, x, aten.permute(weight, [1, 0]))`` or ``aten.convolution``, and padding may be given by name. All of
them compute the same with the same kernel, so passes need to know one form only.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn

from mpcompile.ir.module import Lifted
from mpcompile.ir.nodes import argument
from mpcompile.ir.view import parameter_read

_ATEN = torch.ops.aten
_TURNED = frozenset({_ATEN.t.default, _ATEN.numpy_T.default, _ATEN.mT.default, torch.t, "t"})  # of two axes
_SWAPPED = frozenset({_ATEN.transpose.int, torch.transpose, torch.swapaxes, "transpose", "swapaxes"})
_PERMUTED = frozenset({_ATEN.permute.default, torch.permute, "permute"})
# Product -> position of its bias, if it has one, and of its two operands; and the layer's operator.
_MATRIX: dict[Any, tuple[int | None, int, Any]] = {
    _ATEN.addmm.default: (0, 1, _ATEN.linear.default),
    _ATEN.mm.default: (None, 0, _ATEN.linear.default),
    torch.addmm: (0, 1, F.linear),
    torch.mm: (None, 0, F.linear),
}
_CONVOLUTION = frozenset({_ATEN.convolution.default, _ATEN._convolution.default, _ATEN._convolution.deprecated})
_NAMED = {_ATEN.conv2d.padding: _ATEN.conv2d.default, F.conv2d: F.conv2d}

Call = tuple[Any, tuple[Any, ...]]  # an operator and its arguments


def symmetric(padding: Any, kernel: list[int], stride: list[int], dilation: list[int]) -> list[int] | None:
    """Return the padding that ``"valid"`` or ``"same"`` stands for; None if its two sides differ or it is no name.

    Example:
        >>> symmetric("same", [3, 5], [1, 1], [1, 1]), symmetric("same", [2, 2], [1, 1], [1, 1])
        ([1, 2], None)
    """
    total = [d * (k - 1) for k, d in zip(kernel, dilation, strict=True)]
    if padding == "valid":
        return [0] * len(kernel)
    if padding != "same" or any(t % 2 for t in total) or any(s != 1 for s in stride):
        return None
    return [t // 2 for t in total]


def _pair(value: Any) -> list[int]:
    values = [value] if isinstance(value, int) else list(value)
    return values * 2 if len(values) == 1 else values


def _transposed(node: Any) -> fx.Node | None:
    """Return the node whose two axes ``node`` swaps, or None."""
    if not isinstance(node, fx.Node) or not node.args:
        return None
    source, axes = node.args[0], node.args[1:]
    if len(axes) == 1 and isinstance(axes[0], (list, tuple)):
        axes = tuple(axes[0])
    swapped = node.target in _SWAPPED and sorted(a % 2 for a in axes if isinstance(a, int)) == [0, 1]
    turned = node.target in _TURNED or (node.target is getattr and axes in (("T",), ("mT",)))
    permuted = node.target in _PERMUTED and axes in ((1, 0), (-1, -2))
    return source if isinstance(source, fx.Node) and (swapped or turned or permuted) else None


def _linear(gm: fx.GraphModule, node: fx.Node, lifted: Lifted) -> Call | None:
    """Return the linear layer that a product with a transposed weight is."""
    bias_at, first, layer = _MATRIX[node.target]
    if node.kwargs or len(node.args) != first + 2:  # scaled by alpha or beta
        return None
    weight = parameter_read(gm, _transposed(node.args[first + 1]), lifted)
    bias = None if bias_at is None else parameter_read(gm, node.args[bias_at], lifted)
    if weight is None or weight.tensor.dim() != 2:
        return None
    if bias_at is not None and (bias is None or bias.tensor.shape != weight.tensor.shape[:1]):
        return None
    return layer, (node.args[first], weight.node, None if bias is None else bias.node)


def _convolution(gm: fx.GraphModule, node: fx.Node, lifted: Lifted) -> Call | None:
    """Return the 2-d convolution that a general one is."""
    x, weight, bias, stride, padding, dilation, transposed, _, groups = node.args[:9]
    ref = parameter_read(gm, weight, lifted)
    if transposed or ref is None or ref.tensor.dim() != 4:
        return None
    return _ATEN.conv2d.default, (x, weight, bias, stride, padding, dilation, groups)


def _padded(gm: fx.GraphModule, node: fx.Node, lifted: Lifted) -> Call | None:
    """Return a convolution whose padding is given by numbers in place of a name."""
    unpadded = "valid" if node.target is _ATEN.conv2d.padding else 0
    padding, ref = argument(node, 4, "padding", unpadded), parameter_read(gm, argument(node, 1, "weight"), lifted)
    stride, dilation = _pair(argument(node, 3, "stride", 1)), _pair(argument(node, 5, "dilation", 1))
    if not isinstance(padding, str) or ref is None:
        return None
    numbers = symmetric(padding, list(ref.tensor.shape[2:]), stride, dilation)
    if numbers is None:
        return None
    x, weight, bias = argument(node, 0, "input"), argument(node, 1, "weight"), argument(node, 2, "bias")
    return _NAMED[node.target], (x, weight, bias, stride, numbers, dilation, argument(node, 6, "groups", 1))


_RULES: dict[Any, Callable[[fx.GraphModule, fx.Node, Lifted], Call | None]] = {
    **dict.fromkeys(_MATRIX, _linear),
    **dict.fromkeys(_CONVOLUTION, _convolution),
    **dict.fromkeys(_NAMED, _padded),
}


def number_paddings(gm: fx.GraphModule) -> None:
    """Give convolution modules their padding as numbers in place of a name."""
    for module in gm.modules():
        if not isinstance(module, nn.Conv2d) or type(module).forward is not nn.Conv2d.forward:
            continue
        axes = (list(module.kernel_size), list(module.stride), list(module.dilation))
        numbers = symmetric(module.padding, *axes) if module.padding_mode == "zeros" else None
        module.padding = module.padding if numbers is None else (numbers[0], numbers[1])


def unify_products(gm: fx.GraphModule, lifted: Lifted) -> bool:
    """Rewrite products with a layer's weight to ``linear`` and ``conv2d``. Return True if there was one.

    Products with a weight that is not stored as (out, in), those with batched weights, and ``matmul``, which may also
    hold a table of positions, stay: :func:`mpcompile.ir.view.unsupported` reports them.
    """
    changed = False
    for node in list(gm.graph.nodes):
        rule = _RULES.get(node.target) if node.op == "call_function" else None
        call = None if rule is None else rule(gm, node, lifted)
        if call is None:
            continue
        sources = node.all_input_nodes
        node.target, node.args, node.kwargs = call[0], call[1], {}
        for source in sources:
            if source.op != "placeholder" and not source.users:  # the transposition of a weight
                gm.graph.erase_node(source)
        changed = True
    if changed:
        gm.recompile()
    return changed
