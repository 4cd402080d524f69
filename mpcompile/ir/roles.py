"""Roles of layers (stem, head, depthwise), determined by data flow, not by name.

A head is a layer whose values are the model's result: nothing behind it computes with weights. What may stand between
it and the output moves values (reshaping, cutting, joining several scales), resamples them (upsampling, pixel shuffle,
pooling), maps each of them (softmax, scaling, the decoding of boxes), or chooses among them (topk, argmax, suppression
of overlapping boxes). So the classifiers and box heads of segmentation and detection, the last convolution of depth and
super-resolution models, and the projections of CLIP, whose products are its logits, are heads. A layer whose values
other layers read, too, is none; a choice carries no values, so that scores which only select proposals are a head.
"""

from __future__ import annotations

import operator
import re
from dataclasses import dataclass, field

import torch
from torch import Tensor, fx, nn

from mpcompile.ir.module import Lifted
from mpcompile.ir.nodes import argument, fake_value, reads_form, real_inputs, shape_of, target_name
from mpcompile.ir.view import LayerOp, layers, multiplies, parameter_read, unentered

# Operations that compute new features, so that what stands before them is not the model's result yet.
_FEATURES = re.compile(
    r"\w*((layer|batch|group|instance|rms|response)_?norm|gelu|silu|swish|mish|attention|multi_?head|embedding)\w*"
    r"|_*(elu|selu|celu|leaky_?relu|p_?relu|r_?relu|glu|lstm|gru|rnn|tanhshrink|hardshrink|softshrink)_*",
    re.IGNORECASE,
)
# Operations that select: their result holds no values of the operand.
_CHOICE = re.compile(r"_*(arg(max|min|sort|where)|nonzero|nms|batched_nms|eq|ne|gt|ge|lt|le|isin|searchsorted)_*")
_INDEXED = re.compile(r"topk|sort|max|min|median|mode|kthvalue")  # yield values and their indices
_BOXED = re.compile(r"\w*roi_(align|pool)\w*", re.IGNORECASE)  # read the features of the first operand inside boxes
_JOINED = re.compile(
    r"(_unsafe_)?index(_select)?|cat|concat|concatenate|[hvd]?stack|getitem|gather|setitem|masked_fill_?|where"
)
_SUM = re.compile(r"_*i?add_*")
_PRODUCT = re.compile(r"_*(r?matmul|bmm|baddbmm|einsum|mm)_*")
_MOVED = re.compile(
    r"getitem|expand|_unsafe_view|i?mul_?|i?truediv|div_?|to|_to_copy|float|[dD]ropout|clone|contiguous|reshape|view|permute|transpose|"
    r"flatten|squeeze|unsqueeze"
)
_RELU = re.compile(r"relu_?", re.IGNORECASE)
_POOLED = re.compile(r"\w*pool\w*|mean", re.IGNORECASE)
_RESAMPLED = re.compile(r"interpolate|_*upsample\w*")


def _is_size(node: fx.Node) -> bool:
    """Return True for a placeholder or node that holds a number of a shape, in a graph with free sizes."""
    value = fake_value(node)
    return isinstance(value, (int, torch.SymInt)) and not isinstance(value, bool)


def _data_sources(gm: fx.GraphModule, node: fx.Node) -> list[fx.Node]:
    """Return the inputs of a node that give it values. The size that a tensor is resampled to gives none."""
    if _RESAMPLED.fullmatch(target_name(gm, node)):
        return node.all_input_nodes[:1]
    return [n for n in node.all_input_nodes if target_name(gm, n) != "sym_size"]


def _image(gm: fx.GraphModule, node: fx.Node, stops: set[fx.Node], images: set[fx.Node], sizes: bool) -> fx.Node | None:
    """Return the graph input from which data reaches ``node`` without passing through a weighted layer, or None.

    Args:
        sizes: count the sizes of the input, which a tensor may be reshaped to, as data.
    """
    stack, seen = [node], set()
    while stack:
        current = stack.pop()
        if current in images:
            return current
        if current in seen or current in stops or (not sizes and reads_form(current)):
            continue
        seen.add(current)
        stack.extend(_data_sources(gm, current))
    return None


def _is_stem(gm: fx.GraphModule, layer: LayerOp, stops: set[fx.Node], images: set[fx.Node]) -> bool:
    """Return True for the first layer behind an image: a convolution, or a linear layer of the image's patches."""
    if layer.kind == "conv2d":
        return _image(gm, layer.input, stops, images, sizes=True) is not None
    image = _image(gm, layer.input, stops, images, sizes=False)
    pixels, tokens = None if image is None else shape_of(image), shape_of(layer.input)
    return pixels is not None and tokens is not None and len(pixels) >= 4 and len(tokens) >= 3 and tokens != pixels


def roles(gm: fx.GraphModule, lifted: Lifted | None = None) -> dict[str, str]:
    """Return layer name -> ``"stem"``, ``"head"`` or ``"depthwise"``; other layers are absent.

    Stem: a convolution that reads a graph input with no weighted layer before it, or a linear layer that reads the
    patches of an image. Head: a layer whose result reaches outputs alone, and on the way is moved, resampled, mapped
    or chosen from, but not used to compute features.
    """
    lifted = lifted or Lifted()
    uses = layers(gm, lifted)
    stops = {layer.node for layer in uses}
    images = {node for node in real_inputs(gm, lifted) if not _is_size(node)}
    result: dict[str, str] = {}
    for layer in uses:
        if layer.depthwise:
            result[layer.name] = "depthwise"
        elif _is_stem(gm, layer, stops, images):
            result[layer.name] = "stem"
    ends = _Tail(gm, lifted, {layer.node: layer for layer in uses}).heads()
    inner = {layer.name for layer in uses if layer.node not in ends}
    result.update({layer.name: "head" for layer in uses if layer.name not in inner})
    return result


@dataclass
class _Tail:
    """The part of a graph behind its last layers.

    Attributes:
        layers: node -> the layer that it calls.
        computed: nodes whose values depend on a weighted layer.
        mixing: nodes that combine a result with features.
    """

    gm: fx.GraphModule
    lifted: Lifted
    layers: dict[fx.Node, LayerOp]
    computed: set[fx.Node] = field(default_factory=set)
    mixing: set[fx.Node] = field(default_factory=set)

    def heads(self) -> set[fx.Node]:
        """Return the nodes of layers whose result is only moved, mapped or chosen from before it is output."""
        passing = {node for node in self.gm.graph.nodes if self._passes(node)}
        for node in self.gm.graph.nodes:
            if node.op.startswith("call") and (node not in passing or self.computed & {*node.all_input_nodes}):
                self.computed.add(node)
        while True:
            final = self._final(passing)
            mixed = {node for node in passing & final.keys() - self.mixing if self._mixes(node, final)}
            if not mixed:
                return {node for node in self.layers if final.get(node)}
            self.mixing |= mixed
            passing -= mixed

    def _final(self, passing: set[fx.Node]) -> dict[fx.Node, bool]:
        """Return the nodes whose values reach no layer -> whether they reach an output, or decide a choice.

        What a layer reads behind ``detach``, such as the boxes that a decoder starts from, does not count.
        """
        final: dict[fx.Node, bool] = {}
        for node in reversed(self.gm.graph.nodes):
            reached, inner = False, False
            for user in node.users:
                if user.op == "output" or self._chooses(user, node):
                    reached = True
                elif not reads_form(user):
                    read = user not in passing or user not in final
                    inner = inner or (read and target_name(self.gm, user) != "detach")
                    reached = reached or (not read and final[user])
            if not inner:
                final[node] = reached
        return final

    def _passes(self, node: fx.Node) -> bool:
        """Return True if a node moves, resamples or maps values, and computes no features."""
        if not node.op.startswith("call"):
            return False
        if node in self.layers:
            return self._expects(self.layers[node])
        name = target_name(self.gm, node)
        if _FEATURES.fullmatch(name) or (_RELU.fullmatch(name) and not self._bounds(node)):
            return False
        if node.op == "call_module":
            module = self.gm.get_submodule(str(node.target))
            return next(module.parameters(), None) is None or self._upsamples(node, module)
        if not multiplies(self.gm, node):
            return not (unentered(node) and any(self._is_weight(n) for n in node.all_input_nodes))
        return self._is_inner_product(node) or self._upsamples(node)

    def _bounds(self, node: fx.Node) -> bool:
        """Return True for a ReLU that keeps a result positive, such as a depth, or the scores of positions to pool.

        Behind a layer that widens its input, it activates features.
        """
        if any(_POOLED.fullmatch(target_name(self.gm, user)) for user in node.users):
            return True
        while node not in self.layers and node.all_input_nodes:
            node = node.all_input_nodes[0]
        if node not in self.layers:
            return False
        layer = self.layers[node]
        groups = layer.geometry.groups if layer.geometry else 1
        return layer.weight.tensor.shape[0] < layer.weight.tensor.shape[1] * groups

    def _is_weight(self, node: fx.Node) -> bool:
        ref = parameter_read(self.gm, node, self.lifted)
        return ref is not None and ref.tensor.dim() >= 2

    def _expects(self, layer: LayerOp) -> bool:
        """Return True for a layer that computes the mean of a distribution, as the decoding of YOLO's boxes does."""
        return layer.weight.tensor.shape[0] == 1 and self._behind(layer.input, "softmax")

    def _upsamples(self, node: fx.Node, module: nn.Module | None = None) -> bool:
        """Return True for a transposed convolution that only enlarges: each class has one channel before and after."""
        if isinstance(module, nn.ConvTranspose2d):
            return module.in_channels == module.out_channels
        name, weight = target_name(self.gm, node), parameter_read(self.gm, argument(node, 1, "weight"), self.lifted)
        transposed = name == "conv_transpose2d" or (name == "convolution" and argument(node, 6, "transposed") is True)
        groups = argument(node, 6 if name == "conv_transpose2d" else 8, "groups", 1)
        return transposed and weight is not None and weight.tensor.shape[0] == weight.tensor.shape[1] * groups

    def _is_inner_product(self, node: fx.Node) -> bool:
        """Return True for a product of two computed tensors that is not attention: the logits of CLIP."""
        if not _PRODUCT.fullmatch(target_name(self.gm, node)):
            return False
        return not any(self._is_weight(n) or self._behind(n, "softmax") for n in node.all_input_nodes)

    def _behind(self, node: fx.Node, word: str) -> bool:
        """Return True if a node yields the values of an operation of that name, moved or scaled."""
        while _MOVED.fullmatch(target_name(self.gm, node)) and node.all_input_nodes:
            node = node.all_input_nodes[0]
        return word in target_name(self.gm, node).lower()

    def _mixes(self, node: fx.Node, final: dict[fx.Node, bool]) -> bool:
        """Return True if a node combines several computed values of which one also goes to other layers.

        That is a residual addition, or a gate. A sum of scores counts only if none is a maximum over positions.
        """
        name = target_name(self.gm, node)
        operands = [n for n in node.all_input_nodes if n in self.computed and not reads_form(n)]
        if len(operands) < 2 or _JOINED.fullmatch(name) or isinstance(node.target, type):  # such as a named tuple
            return False
        if _SUM.fullmatch(name) and any(self._behind(n, "max") for n in operands if not self._behind(n, "softmax")):
            return True
        return any(n not in final for n in operands)

    def _chooses(self, user: fx.Node, node: fx.Node) -> bool:
        """Return True if ``user`` takes no values from ``node``, but decides or counts by them."""
        value, name = fake_value(user), target_name(self.gm, user)
        if isinstance(value, Tensor) and not value.is_floating_point() and not value.is_complex():
            return True
        if _BOXED.fullmatch(name):
            return node is not user.all_input_nodes[0]
        indices = user.target is operator.getitem and user.args[1:] == (1,)
        return bool(_CHOICE.fullmatch(name)) or (indices and bool(_INDEXED.fullmatch(target_name(self.gm, node))))
