"""The layers that a file may hold, by class, and how each is rebuilt.

A layer is rebuilt on the meta device by calling the constructor of a listed class; each argument is stored from the
attribute of the same name. Its tensors are set afterwards, and must have the names and shapes of those that the
constructor made (tree.py).
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from mpcompile import _moved
from mpcompile.artifact.opset import LISTED, Refusal, shown
from mpcompile.kernels.nm_format import Pattern
from mpcompile.layers import OPERATIONS, ByMode, InputGuard, MaskedConv2d, MaskedLinear

_CONV = "in_channels out_channels kernel_size stride padding dilation groups bias padding_mode"
_TRANSPOSED = "in_channels out_channels kernel_size stride padding output_padding groups bias dilation padding_mode"
_BATCH_NORM = "num_features eps momentum affine track_running_stats bias"
_RNN = "input_size hidden_size num_layers bias batch_first dropout bidirectional"
_AXES = ("1d", "2d", "3d")


_MOVED = ("Tree", "restore_modules", "restore_tensors", "compare")
__getattr__ = _moved.renamed(__name__, {name: f"artifact.tree.{name}" for name in _MOVED})


def _each(classes: str, arguments: str) -> dict[str, str]:
    return dict.fromkeys(classes.split(), arguments)


# Class -> the constructor arguments that are stored. Each is also an attribute of that name.
_TORCH_NN = {
    "Linear": "in_features out_features bias",
    **{f"Conv{d}": _CONV for d in _AXES},
    **{f"ConvTranspose{d}": _TRANSPOSED for d in _AXES},
    **{f"{kind}Norm{d}": _BATCH_NORM for kind in ("Batch", "Instance") for d in _AXES},
    "LayerNorm": "normalized_shape eps elementwise_affine bias",
    "RMSNorm": "normalized_shape eps elementwise_affine",
    "GroupNorm": "num_groups num_channels eps affine bias",
    "LocalResponseNorm": "size alpha beta k",
    "Embedding": "num_embeddings embedding_dim padding_idx max_norm norm_type scale_grad_by_freq sparse",
    "MultiheadAttention": "embed_dim num_heads dropout bias add_bias_kv add_zero_attn kdim vdim batch_first",
    "LSTM": f"{_RNN} proj_size",
    "GRU": _RNN,
    "RNN": f"{_RNN} nonlinearity",
    **_each("Identity Sigmoid Tanh LogSigmoid Softsign Tanhshrink Softmax2d", ""),
    **_each("ReLU ReLU6 SELU SiLU Mish Hardswish Hardsigmoid", "inplace"),
    **_each("ELU CELU", "alpha inplace"),
    **_each("Softmin Softmax LogSoftmax GLU", "dim"),
    **_each("Softshrink Hardshrink", "lambd"),
    "GELU": "approximate",
    "Hardtanh": "min_val max_val inplace",
    "LeakyReLU": "negative_slope inplace",
    "PReLU": "num_parameters",
    "RReLU": "lower upper inplace",
    "Softplus": "beta threshold",
    "Threshold": "threshold value inplace",
    **_each("Dropout Dropout1d Dropout2d Dropout3d AlphaDropout FeatureAlphaDropout", "p inplace"),
    **{f"MaxPool{d}": "kernel_size stride padding dilation return_indices ceil_mode" for d in _AXES},
    "AvgPool1d": "kernel_size stride padding ceil_mode count_include_pad",
    **{f"AvgPool{d}": "kernel_size stride padding ceil_mode count_include_pad divisor_override" for d in _AXES[1:]},
    **{f"AdaptiveAvgPool{d}": "output_size" for d in _AXES},
    **{f"AdaptiveMaxPool{d}": "output_size return_indices" for d in _AXES},
    **_each("LPPool1d LPPool2d", "norm_type kernel_size stride ceil_mode"),
    "Flatten": "start_dim end_dim",
    "Unflatten": "dim unflattened_size",
    "Fold": "output_size kernel_size dilation padding stride",
    "Unfold": "kernel_size dilation padding stride",
    "Upsample": "size scale_factor mode align_corners recompute_scale_factor",
    **_each("UpsamplingNearest2d UpsamplingBilinear2d", "size scale_factor"),
    "PixelShuffle": "upscale_factor",
    "PixelUnshuffle": "downscale_factor",
    "ChannelShuffle": "groups",
    **{f"{kind}Pad{d}": "padding" for kind in ("Reflection", "Replication", "Zero", "Circular") for d in _AXES},
    **{f"ConstantPad{d}": "padding value" for d in _AXES},
}
_TIMM = {
    "BatchNormAct2d": "num_features eps momentum affine track_running_stats",
    "DropPath": "drop_prob scale_by_keep",
    "DropBlock2d": "drop_prob block_size gamma_scale with_noise inplace couple_channels scale_by_keep",
    **_each("PatchDropout PatchDropoutWithIndices", "prob num_prefix_tokens ordered"),
    **_each("Swish HardSwish HardSigmoid HardMish Sigmoid Tanh", "inplace"),
    **_each("Mish GELU GELUTanh QuickGELU", ""),
    "PReLU": "num_parameters",
}
LAYERS: dict[str, dict[str, str]] = {  # by the module in which a class is looked up
    "torch.nn": _TORCH_NN,
    "torch.nn.modules.linear": {"NonDynamicallyQuantizableLinear": "in_features out_features bias"},
    "timm.layers": _TIMM,
    "timm.layers.activations_me": {"HardMishMe": ""},
    "torchvision.ops": {"StochasticDepth": "p mode"},
    "mpcompile.layers": {
        "MaskedLinear": "n m",
        "MaskedConv2d": "n m stride padding dilation groups",
        "ByMode": "when_training when_evaluating",
        "InputGuard": "inputs symbols conditions",
    },
}


def layer_name(module: nn.Module) -> str | None:
    """Return the name of a layer's class in a file, or None if it is not listed. Subclasses of a listed class are not.

    Example:
        >>> layer_name(nn.ReLU())
        'torch.nn.ReLU'
    """
    cls = type(module)
    for home, names in LAYERS.items():
        if cls.__name__ in names and getattr(sys.modules.get(home), cls.__name__, None) is cls:
            return f"{home}.{cls.__name__}"
    return None


def layer_arguments(module: nn.Module, name: str) -> dict[str, Any]:
    """Return the arguments with which :func:`build_layer` builds the same layer, apart from its tensors."""
    home, _, cls = name.rpartition(".")
    stored = LAYERS[home][cls].split()
    arguments = {key: getattr(module, key) for key in stored if key not in ("bias", "add_bias_kv")}
    affine = arguments.get("affine", arguments.get("elementwise_affine", True))  # else there is no bias
    bias: Any = getattr(module, "in_proj_bias" if cls == "MultiheadAttention" else "bias", None)
    if "bias" in stored and affine and (bias is None or bias is False):
        arguments["bias"] = False
    if getattr(module, "bias_k", None) is not None:
        arguments["add_bias_kv"] = True
    return arguments


def build_layer(name: object, arguments: Mapping[str, Any], tensors: Mapping[str, Any]) -> nn.Module:
    """Build a layer of a listed class without memory for its tensors; the caller sets them.

    Args:
        name: a name from :func:`layer_name`, as read from a file.
        arguments: arguments from :func:`layer_arguments`, as read from a file.
        tensors: the layer's parameters and buffers by attribute; None for an absent one.

    Raises:
        Refusal: a class or an argument that is not listed, or a number that no layer has.
    """
    home, _, cls = name.rpartition(".") if isinstance(name, str) else ("", "", "")
    if cls not in LAYERS.get(home, ()):
        raise Refusal(f"class {shown(name)} is not allowed", expected=LISTED)
    unknown = set(arguments) - {*LAYERS[home][cls].split()}
    if unknown:
        raise Refusal(f"a {cls} does not take {shown(sorted(unknown))}", expected=LAYERS[home][cls])
    if any(isinstance(number, int) and abs(number) >= 2**31 for number in _scalars(list(arguments.values()))):
        raise Refusal(f"a {cls} has a number that no layer has", expected="less than 2**31", found=shown(arguments))
    if arguments.get("num_layers", 0) > len(tensors):  # the constructor would loop that many times
        raise Refusal(f"a {cls} has more layers than tensors", found=shown(arguments["num_layers"]))
    with torch.device("meta"):
        if home == "mpcompile.layers":
            return _OWN[cls](arguments, tensors)
        return getattr(importlib.import_module(home), cls)(**arguments)


def _scalars(value: Any) -> Iterator[Any]:
    """Yield the leaves of nested lists and tuples."""
    for part in value if isinstance(value, (list, tuple)) else (value,):
        if isinstance(part, (list, tuple)):
            yield from _scalars(part)
        else:
            yield part


# --- Our own layers, whose constructors take tensors ---


def _by_mode(arguments: Mapping[str, Any], _tensors: Mapping[str, Any]) -> nn.Module:
    return ByMode(arguments["when_training"], arguments["when_evaluating"])


def _masked_linear(arguments: Mapping[str, Any], tensors: Mapping[str, Any]) -> nn.Module:
    return MaskedLinear(*_masked_parts("MaskedLinear", 2, arguments, tensors))


def _masked_conv2d(arguments: Mapping[str, Any], tensors: Mapping[str, Any]) -> nn.Module:
    geometry = (arguments[key] for key in ("stride", "padding", "dilation", "groups"))
    return MaskedConv2d(*_masked_parts("MaskedConv2d", 4, arguments, tensors), *geometry)


def _masked_parts(cls: str, rank: int, arguments: Mapping[str, Any], tensors: Mapping[str, Any]) -> tuple[Any, ...]:
    """Return weight, bias, mask and pattern of a masked layer whose weight has ``rank`` axes, if they fit together."""
    weight, bias, mask = tensors["weight"], tensors["bias"], tensors["mask"]
    pattern = Pattern.parse(f"{arguments['n']}:{arguments['m']}")
    fits = weight.dim() == rank and weight.shape[1] % pattern.m == 0
    fits = fits and (bias is None or bias.shape == weight.shape[:1])
    if not fits or mask.shape != weight.shape or mask.dtype != torch.bool:
        shapes = [None if t is None else tuple(t.shape) for t in (weight, bias, mask)]
        raise Refusal(f"weight, bias and mask do not make a {pattern} {cls}", found=shapes)
    return weight, bias, mask, pattern


def _input_guard(arguments: Mapping[str, Any], _tensors: Mapping[str, Any]) -> nn.Module:
    inputs, symbols, conditions = (arguments[key] for key in ("inputs", "symbols", "conditions"))
    listed = all(isinstance(part, (tuple, list)) for part in (inputs, conditions)) and isinstance(symbols, dict)
    if not listed or not all(_is_entry(entry, symbols) for entry in inputs):
        raise Refusal("an InputGuard has a malformed input", found=shown(inputs))
    for source in symbols.values():
        if not _is_source(source, inputs):
            raise Refusal("an InputGuard reads a size that no input has", found=shown(source))
    if not all(_is_expression(condition, symbols) for condition in conditions):
        raise Refusal("an InputGuard has a malformed condition", found=shown(conditions))
    return InputGuard(inputs, symbols, conditions)


def _is_entry(entry: Any, symbols: Mapping[str, Any]) -> bool:
    """Return True if ``entry`` is legal among the inputs of an InputGuard."""
    if entry is None:
        return True
    if not isinstance(entry, tuple) or len(entry) < 3 or not isinstance(entry[1], str):
        return False
    kind, _, wanted, *sizes = entry
    if kind == "tensor":
        tensor = isinstance(wanted, torch.dtype) and len(sizes) == 1 and isinstance(sizes[0], tuple)
        return tensor and all(_is_expression(size, symbols) for size in sizes[0])
    if kind == "size":
        return not sizes and _is_expression(wanted, symbols)
    return kind == "value" and not sizes and (wanted is None or type(wanted) in (bool, int, float, str))


def _is_source(source: Any, inputs: Sequence[Any]) -> bool:
    """Return True if a symbol of an InputGuard can be read where its source says."""
    if not isinstance(source, tuple) or len(source) != 4 or any(type(n) not in (int, type(None)) for n in source):
        return False
    place, axis, scale, offset = source
    if None in (place, scale, offset) or not 0 <= place < len(inputs) or scale < 1 or inputs[place] is None:
        return False
    entry = inputs[place]
    return entry[0] == "size" if axis is None else entry[0] == "tensor" and 0 <= axis < len(entry[3])


def _is_expression(value: Any, symbols: Mapping[str, Any]) -> bool:
    """Return True if ``value`` is a number, a known symbol, or an operation on two such expressions."""
    if type(value) is int or isinstance(value, str):
        return type(value) is int or value in symbols
    operation = isinstance(value, tuple) and len(value) == 3 and value[0] in OPERATIONS
    return operation and all(_is_expression(operand, symbols) for operand in value[1:])


_OWN: dict[str, Callable[[Mapping[str, Any], Mapping[str, Any]], nn.Module]] = {
    "MaskedLinear": _masked_linear,
    "MaskedConv2d": _masked_conv2d,
    "ByMode": _by_mode,
    "InputGuard": _input_guard,
}
