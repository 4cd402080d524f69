"""The layers that a file may hold, and the tree of layers as a table: class, arguments, flags, which tensor goes where.

A layer is rebuilt by calling the constructor of a listed class, on the meta device, with arguments that are attributes
of the same names; its tensors and parts are put in afterwards and must be those that the constructor made room for.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from mpcompile.artifact.codec import decode, encode
from mpcompile.artifact.opset import LISTED, Refusal, module_path, shown
from mpcompile.ir.module import IRModule
from mpcompile.kernels.nm_format import Pattern
from mpcompile.layers import ByMode, MaskedConv2d, MaskedLinear

# Class -> the constructor arguments to keep, each an attribute of the same name.
_CONV = "in_channels out_channels kernel_size stride padding dilation groups bias padding_mode"
_TRANSPOSED = "in_channels out_channels kernel_size stride padding output_padding groups bias dilation padding_mode"
_BATCH_NORM = "num_features eps momentum affine track_running_stats bias"
_RNN = "input_size hidden_size num_layers bias batch_first dropout bidirectional"
_AXES = ("1d", "2d", "3d")


def _each(classes: str, arguments: str) -> dict[str, str]:
    return dict.fromkeys(classes.split(), arguments)


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
LAYERS: dict[str, dict[str, str]] = {  # by the module that a class is found in
    "torch.nn": _TORCH_NN,
    "torch.nn.modules.linear": {"NonDynamicallyQuantizableLinear": "in_features out_features bias"},
    "timm.layers": _TIMM,
    "timm.layers.activations_me": {"HardMishMe": ""},
    "torchvision.ops": {"StochasticDepth": "p mode"},
    "mpcompile.layers": {
        "MaskedLinear": "n m",
        "MaskedConv2d": "n m stride padding dilation groups",
        "ByMode": "when_training when_evaluating",
    },
}
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_SIMPLE = (bool, int, float, str, tuple, list, torch.dtype, type(None))


def layer_name(module: nn.Module) -> str | None:
    """The name that stands for a layer's class in a file, or None where it isn't listed. Subclasses aren't."""
    cls = type(module)
    for home, names in LAYERS.items():
        if cls.__name__ in names and getattr(sys.modules.get(home), cls.__name__, None) is cls:
            return f"{home}.{cls.__name__}"
    return None


def layer_arguments(module: nn.Module, name: str) -> dict[str, Any]:
    """What to hand to :func:`build_layer` to get the same layer, apart from its tensors."""
    home, _, cls = name.rpartition(".")
    kept = LAYERS[home][cls].split()
    arguments = {key: getattr(module, key) for key in kept if key not in ("bias", "add_bias_kv")}
    plain = not arguments.get("affine", arguments.get("elementwise_affine", True))  # neither weight nor bias
    held: Any = getattr(module, "in_proj_bias" if cls == "MultiheadAttention" else "bias", None)
    if "bias" in kept and not plain and (held is None or held is False):
        arguments["bias"] = False
    if getattr(module, "bias_k", None) is not None:
        arguments["add_bias_kv"] = True
    return arguments


def _numbers(value: Any) -> Iterator[Any]:
    """The items of nested lists and tuples."""
    for item in value if isinstance(value, (list, tuple)) else (value,):
        if isinstance(item, (list, tuple)):
            yield from _numbers(item)
        else:
            yield item


def build_layer(name: object, arguments: Mapping[str, Any], tensors: Mapping[str, Any]) -> nn.Module:
    """A layer of a listed class, with nothing in memory for its tensors; the caller puts them in.

    Raises:
        Refusal: a class or an argument that isn't listed.
    """
    home, _, cls = name.rpartition(".") if isinstance(name, str) else ("", "", "")
    if cls not in LAYERS.get(home, ()):
        raise Refusal(f"class {shown(name)} is not allowed", expected=LISTED)
    unknown = set(arguments) - {*LAYERS[home][cls].split()}
    if unknown:
        raise Refusal(f"a {cls} is given {shown(sorted(unknown))}", expected=LAYERS[home][cls])
    if any(isinstance(number, int) and abs(number) >= 2**31 for number in _numbers(list(arguments.values()))):
        raise Refusal(f"a {cls} has a number that no layer has", expected="less than 2**31", found=shown(arguments))
    if arguments.get("num_layers", 0) > len(tensors):  # the constructor would loop so often
        raise Refusal(f"a {cls} has more layers than tensors", found=shown(arguments["num_layers"]))
    with torch.device("meta"):
        if home != "mpcompile.layers":
            return getattr(importlib.import_module(home), cls)(**arguments)
        if cls == "ByMode":
            return ByMode(arguments["when_training"], arguments["when_evaluating"])
        weight, bias, mask = tensors["weight"], tensors["bias"], tensors["mask"]
        pattern = Pattern.parse(f"{arguments['n']}:{arguments['m']}")
        fits = weight.dim() == (2 if cls == "MaskedLinear" else 4) and weight.shape[1] % pattern.m == 0
        fits = fits and (bias is None or bias.shape == weight.shape[:1])
        if not fits or mask.shape != weight.shape or mask.dtype != torch.bool:
            found = [None if t is None else tuple(t.shape) for t in (weight, bias, mask)]
            raise Refusal(f"weight, bias and mask make no {pattern} {cls}", found=found)
        if cls == "MaskedLinear":
            return MaskedLinear(weight, bias, mask, pattern)
        return MaskedConv2d(weight, bias, mask, pattern, *(arguments[k] for k in _CONV.split() if k in arguments))


def _join(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name


def _dense(shape: Sequence[int], strides: Sequence[int]) -> bool:
    """Whether the strides put the values, in some order of the axes, one behind the other."""
    step = 1
    for stride, size in sorted((stride, size) for stride, size in zip(strides, shape, strict=True) if size != 1):
        if stride != step:
            return False
        step *= size
    return True


class Tree:
    """The tables of one IR.

    Attributes:
        modules: path -> class, arguments, training flag, and the names of its tensors; ``{"same": path}`` for a layer
            that stands in a second place; None for an empty place.
        kinds: tensor name -> parameter, frozen parameter or buffer, and its memory order if that is unusual.
        tensors: tensor name -> tensor, each once, under the first of its names.

    Args:
        left_out: paths of layers to leave out.

    Raises:
        Refusal: a layer or tensor that a file can't hold; it is named.
    """

    def __init__(self, gm: IRModule, left_out: set[str]) -> None:
        self.modules: dict[str, Any] = {}
        self.kinds: dict[str, Any] = {}
        self.tensors: dict[str, Tensor] = {}
        self.left_out = left_out
        self._names: dict[int, str] = {}
        self._paths: dict[int, str] = {}
        self._visit(gm, "", gm)

    def _visit(self, module: nn.Module | None, path: str, gm: IRModule) -> None:
        if module is None:
            self.modules[path] = None
            return
        if id(module) in self._paths:
            self.modules[path] = {"same": self._paths[id(module)]}
            return
        self._paths[id(module)] = path
        group = module is gm or type(module) is nn.Module
        name = "" if group else layer_name(module)
        if name is None:
            cls = f"{type(module).__module__}.{type(module).__qualname__}"
            raise Refusal(
                f"layer {path} is a {cls}, which a file can't hold",
                expected=LISTED,
                hint="build it of torch.nn layers, or save gm.state_dict() and transform again",
            )
        if any(getattr(module, hooks, None) for hooks in _HOOKS) or "forward" in vars(module):
            raise Refusal(
                f"{f'layer {path}' if path else 'the module'} has hooks or a patched forward, which would be lost",
                hint="remove them (handle.remove()) and put them back after loading",
            )
        self.modules[path] = {
            "class": name,
            "args": {} if group else {k: encode(v) for k, v in layer_arguments(module, name).items()},
            "training": module.training,
            "parameters": {k: self._add(path, k, t) for k, t in module._parameters.items()},
            "buffers": {k: self._add(path, k, t) for k, t in module._buffers.items()},
            "transient": sorted(k for k in module._non_persistent_buffers_set if k in module._buffers),
        }
        for key, child in module._modules.items():
            if _join(path, key) not in self.left_out:
                self._visit(child, _join(path, key), gm)

    def _add(self, path: str, key: str, tensor: Tensor | None) -> str | None:
        if tensor is None:
            return None
        if id(tensor) in self._names:
            return self._names[id(tensor)]
        name = self._names[id(tensor)] = module_path(_join(path, key))
        if type(tensor) not in (Tensor, nn.Parameter) or tensor.layout != torch.strided or tensor.is_meta:
            raise Refusal(
                f"tensor {name} can't be stored",
                expected="an ordinary dense tensor with data",
                found=f"{type(tensor).__name__}, {tensor.layout}, device {tensor.device}",
            )
        self.tensors[name] = tensor
        kind: dict[str, Any] = {"kind": "buffer"}
        if isinstance(tensor, nn.Parameter):
            kind = {"kind": "parameter" if tensor.requires_grad else "frozen"}
        contiguous = torch.empty(tensor.shape, device="meta").stride()
        if tensor.stride() != contiguous and _dense(tensor.shape, tensor.stride()):  # e.g. channels_last
            kind["strides"] = tensor.stride()
        self.kinds[name] = kind
        return name


def restore_tensors(kinds: dict[str, Any], tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Parameters and buffers, out of plain contiguous tensors."""
    if kinds.keys() != tensors.keys():
        raise Refusal("the tensors are not those of the tree", found=shown(sorted(kinds.keys() ^ tensors.keys())))
    restored = {}
    for name, kind in kinds.items():
        tensor = tensors[name]
        if "strides" in kind:
            if not _dense(tensor.shape, kind["strides"]):
                raise Refusal(f"tensor {name} has no such strides", found=shown(kind["strides"]))
            apart = torch.empty_strided(tensor.shape, kind["strides"], dtype=tensor.dtype, device=tensor.device)
            tensor = apart.copy_(tensor)
        if kind["kind"] in ("parameter", "frozen"):
            tensor = nn.Parameter(tensor, requires_grad=kind["kind"] == "parameter")
        elif kind["kind"] != "buffer":
            raise Refusal(f"tensor {name} is of an unknown kind", found=shown(kind))
        restored[name] = tensor
    return restored


def restore_modules(gm: IRModule, modules: dict[str, Any], tensors: Mapping[str, Tensor]) -> None:
    """Fill the empty ``gm`` with the tree.

    Raises:
        Refusal: a class, argument or tensor that isn't allowed or doesn't fit.
        KeyError: a name that is an attribute of nn.Module or IRModule already, and other errors on malformed tables.
    """
    built: dict[str, nn.Module | None] = {}
    missing: set[str] = set()  # parts that layers were constructed with and that the table hasn't given yet
    used: set[str] = set()
    for path, entry in modules.items():
        module = gm if path == "" else _restored(path, entry, built, tensors)
        if path != "":
            _attach(module, path, built, missing)
        built[path] = module
        if module is None or "same" in entry:
            continue
        if path != "" and entry["class"] != "":
            missing |= {f"{path}.{name}" for name in module._modules}
        used |= _fill(module, path, entry, tensors)
    if missing or used != tensors.keys():
        raise Refusal("the tree has gaps", found=shown(sorted(missing | (used ^ tensors.keys()))))


def _restored(path: str, entry: Any, built: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> nn.Module | None:
    """The module of one table entry."""
    if entry is None:
        return None
    if "same" in entry:
        if f"{path}.".startswith(f"{entry['same']}.") or entry["same"] == "":
            raise Refusal(f"layer {path} holds itself")
        return built[entry["same"]]
    if entry["class"] == "":
        return nn.Module()
    own = {k: None if n is None else tensors[n] for k, n in {**entry["parameters"], **entry["buffers"]}.items()}
    try:
        return build_layer(entry["class"], {k: decode(v, {}) for k, v in entry["args"].items()}, own)
    except Refusal as error:
        raise error.at(f"layer {path}") from error


def _attach(module: nn.Module | None, path: str, built: Mapping[str, nn.Module | None], missing: set[str]) -> None:
    """Put a module where its path says. A layer takes only the parts that it was constructed with."""
    owner, _, key = module_path(path).rpartition(".")
    parent = built.get(owner)
    if path in missing and parent is not None:
        missing.remove(path)
        parent._modules[key] = module
    elif parent is not None and (owner == "" or type(parent) is nn.Module):
        parent.add_module(key, module)  # refuses names that the class uses for something else
    else:
        raise Refusal(f"layer {path} has no place in the tree")


def _fill(module: nn.Module, path: str, entry: dict[str, Any], tensors: Mapping[str, Tensor]) -> set[str]:
    """Put its tensors into a module. For a layer they must be those that its class has. Returns their names."""
    parameters = {k: None if n is None else tensors[n] for k, n in entry["parameters"].items()}
    buffers = {k: None if n is None else tensors[n] for k, n in entry["buffers"].items()}
    if path == "" or entry["class"] == "":
        for key, parameter in parameters.items():
            module.register_parameter(module_path(key), parameter)  # type: ignore[arg-type]
        for key, buffer in buffers.items():
            module.register_buffer(module_path(key), buffer, persistent=key not in entry["transient"])
    else:
        expected, found = (
            {k: None if t is None else tuple(t.shape) for k, t in {**p, **b}.items()}
            for p, b in ((module._parameters, module._buffers), (parameters, buffers))
        )
        if expected != found or module._buffers.keys() != buffers.keys():
            raise Refusal(f"layer {path}: the tensors don't fit its class", expected=expected, found=found)
        dtypes = {t.dtype for t in parameters.values() if t is not None}
        if len(dtypes) > 1:  # some layers look at the first one's alone
            raise Refusal(f"layer {path} has parameters of several dtypes", found=", ".join(sorted(map(str, dtypes))))
        module._buffers.update(buffers)
        module._non_persistent_buffers_set = set(entry["transient"])
        for key, parameter in parameters.items():
            setattr(module, key, parameter)  # recurrent layers keep a list of their own
    if type(entry["training"]) is not bool:
        raise Refusal(f"layer {path} has no training flag", found=shown(entry["training"]))
    module.training = entry["training"]
    return {n for n in (*entry["parameters"].values(), *entry["buffers"].values()) if n is not None}


def compare(gm: IRModule, twin: IRModule, left_out: set[str]) -> None:
    """Refuse a layer with a setting that its constructor arguments don't carry to ``twin``, what would be loaded.

    Raises:
        Refusal: names the layer and the setting.
    """
    for path, module in gm.named_modules():
        if module is gm or type(module) is nn.Module or path in left_out:
            continue
        for key, value in vars(twin.get_submodule(path)).items():
            if key.startswith("_") or not isinstance(value, _SIMPLE):
                continue
            found = getattr(module, key, None)
            if type(found) is not type(value) or found != value:
                raise Refusal(
                    f"layer {path} ({type(module).__name__}) has {key} = {shown(found)}, which would be lost",
                    expected=f"{shown(value)}, as its constructor sets it",
                    hint="construct the layer with that setting",
                )
