"""What a saved graph may call: operators, methods and attributes by name. Everything else is refused.

A file is data from somewhere. Nothing in it is imported or looked up by a path of its own: a name stands for something
only if it is in a list below. None of the listed operators reads or writes files, starts processes, or takes code, and
none reads or writes outside its tensors: what torch doesn't check about an operator is checked by guards.py.
Layers have a list of their own in :mod:`mpcompile.artifact.leaves`.
"""

from __future__ import annotations

import functools
import keyword
import math
import operator
import re
import unicodedata
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from mpcompile.artifact import guards
from mpcompile.ir import spec

LISTED = "something on the lists in mpcompile/artifact/"


class Refusal(Exception):
    """Something that a file can't hold or may not say; the caller adds the file and raises an ArtifactError."""

    def __init__(self, message: str, *, expected: object = None, found: object = None, hint: str | None = None) -> None:
        self.message, self.expected, self.found, self.hint = message, expected, found, hint
        super().__init__(message)

    def at(self, place: str) -> Refusal:
        """The same, with the place in front."""
        return Refusal(f"{place}: {self.message}", expected=self.expected, found=self.found, hint=self.hint)


def shown(value: object) -> str:
    """``repr`` cut to a length that fits into a message."""
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


# --- Names that end up in the Python source that fx generates and executes ---

_IDENTIFIER = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_MOST_PARTS, _LONGEST = 64, 1024  # of a path, and of a name in it
_TAKEN = frozenset({"self", "torch", "device", "inf", "nan", "NoneType", "fx_pytree", "pytree"})


def keyword_name(text: object) -> str:
    """``text`` if it can name an argument in generated source."""
    if isinstance(text, str) and _IDENTIFIER.fullmatch(text) and not keyword.iskeyword(text):
        return text
    raise Refusal("a name can't stand in Python source", expected="a plain identifier", found=shown(text))


def identifier(text: object) -> str:
    """``text`` if it can name a value in generated source: also not ``self`` or what fx imports there."""
    if keyword_name(text) not in _TAKEN:
        return str(text)
    raise Refusal("a name would hide one that generated source needs", expected="another name", found=shown(text))


def module_path(text: object) -> str:
    """``text`` if it is a dotted path of names that PyTorch allows and that can't end a text in Python source.

    fx writes a name that is no identifier as ``getattr(self, "name")``: a name with a quotation mark, a backslash or
    a line break could go on as code. An identifier has to be in the form that Python reads it in.
    """
    if isinstance(text, str) and text.count(".") < _MOST_PARTS and all(map(_is_name, text.split("."))):
        return text
    raise Refusal(
        "a path can't name a layer or tensor",
        expected="names of printable characters without quotation marks and backslashes, joined by dots",
        found=shown(text),
    )


def _is_name(text: str) -> bool:
    if not 0 < len(text) <= _LONGEST or not text.isprintable() or any(c in text for c in "\"'\\"):
        return False
    return not text.isidentifier() or unicodedata.normalize("NFKC", text) == text


def words(text: str) -> frozenset[str]:
    """The words of a text."""
    return frozenset(text.split())


# --- Operators. A listed name also stands for its in-place form: ``add`` for ``add_`` ---

ATTRIBUTES = words("shape dtype device ndim T mT H mH real imag is_cuda requires_grad layout")

OPERATOR = words(
    "add sub mul truediv floordiv mod pow neg pos abs matmul getitem eq ne lt le gt ge and_ or_ xor invert not_ "
    "lshift rshift iadd isub imul itruediv ifloordiv imod ipow imatmul iand ior ixor"
)

MATH = words("ceil floor trunc sqrt log log2 exp prod")

_POINTWISE = (
    "abs acos acosh add addcdiv addcmul asin asinh atan atan2 atanh bitwise_and bitwise_not bitwise_or bitwise_xor "
    "ceil clamp clamp_max clamp_min clip clone copysign cos cosh div divide eq erf erfc exp exp2 expm1 floor "
    "floor_divide fmod ge gt isfinite isinf isnan le lerp log log10 log1p log2 logaddexp logical_and logical_not "
    "logical_or logical_xor lt maximum minimum mul multiply nan_to_num ne neg negative pow reciprocal relu remainder "
    "round rsqrt rsub sigmoid sign sin sinh softmax log_softmax sqrt square sub subtract tan tanh true_divide trunc "
    "where"
)
_SHAPING = (
    "broadcast_to cat chunk concat concatenate diag diag_embed diagonal expand expand_as flatten flip gather hsplit "
    "index_add index_copy index_put index_select masked_fill masked_scatter masked_select moveaxis movedim narrow "
    "nonzero permute repeat repeat_interleave reshape reshape_as roll rot90 scatter scatter_add scatter_reduce select "
    "slice_scatter select_scatter sort split split_with_sizes squeeze stack swapaxes swapdims t take take_along_dim "
    "tensor_split tile transpose tril triu unbind unflatten unfold unsqueeze view view_as vsplit"
)
_REDUCING = (
    "all amax amin aminmax any argmax argmin argsort count_nonzero cummax cummin cumprod cumsum dist kthvalue "
    "logsumexp max mean median min norm prod std std_mean sum topk var var_mean"
)
_PRODUCTS = "addbmm addmm addmv baddbmm bmm dot einsum inner kron matmul mm mv outer tensordot"
_CREATING = (
    "arange bernoulli empty_like eye full full_like linspace ones ones_like rand rand_like randint randn randn_like "
    "randperm scalar_tensor zeros zeros_like"
)
_COMMON = f"{_POINTWISE} {_SHAPING} {_REDUCING} {_PRODUCTS} {_CREATING}"
_NEURAL = (
    "adaptive_avg_pool1d adaptive_avg_pool2d adaptive_avg_pool3d adaptive_max_pool1d adaptive_max_pool2d alpha_dropout "
    "avg_pool1d avg_pool2d avg_pool3d batch_norm celu channel_shuffle conv1d conv2d conv3d conv_transpose1d "
    "conv_transpose2d conv_transpose3d dropout elu embedding feature_dropout fold gelu glu grid_sample group_norm "
    "hardshrink hardsigmoid hardswish hardtanh instance_norm interpolate layer_norm leaky_relu linear logsigmoid "
    "lp_pool2d max_pool1d max_pool2d max_pool3d mish native_batch_norm native_dropout native_group_norm "
    "native_layer_norm normalize one_hot pad pixel_shuffle pixel_unshuffle prelu relu6 rms_norm rrelu selu silu "
    "scaled_dot_product_attention softmin softplus softshrink softsign tanhshrink threshold upsample"
)

FUNCTIONAL = words(
    f"{_NEURAL} affine_grid avg_pool1d cosine_similarity dropout1d dropout2d dropout3d feature_alpha_dropout "
    "gumbel_softmax local_response_norm log_softmax multi_head_attention_forward relu sigmoid softmax "
    "tanh unfold"
)

TORCH = words(
    f"{_COMMON} {_NEURAL} _assert atleast_1d atleast_2d atleast_3d block_diag broadcast_tensors cartesian_prod cdist "
    "column_stack cosine_similarity cross deg2rad dstack empty hstack hypot meshgrid numel rad2deg real imag polar "
    "searchsorted sym_float sym_int sym_ite sym_max sym_min sym_not sym_sqrt sym_sum tril_indices triu_indices "
    "unique_consecutive view_as_complex view_as_real vstack"
)

METHODS = words(
    f"{_COMMON} bfloat16 bool contiguous copy cpu cuda detach dim div double element_size erf erfinv exponential fill "
    "float half int is_contiguous is_floating_point long ndimension new_empty new_full new_ones new_tensor new_zeros "
    "normal numel relu short sigmoid size stride sum_to_size tanh to type type_as uniform zero item"
)

ATEN = words(
    f"{_COMMON} {_NEURAL} _adaptive_avg_pool2d _adaptive_avg_pool3d _assert_scalar _assert_tensor_metadata "
    "_log_softmax _native_batch_norm_legit _native_batch_norm_legit_functional _native_batch_norm_legit_no_training "
    "_scaled_dot_product_efficient_attention _scaled_dot_product_flash_attention "
    "_scaled_dot_product_flash_attention_for_cpu _softmax _to_copy _unsafe_view _upsample_bicubic2d_aa "
    "_upsample_bilinear2d_aa alias col2im constant_pad_nd contiguous convolution copy cudnn_batch_norm detach "
    "detach_copy embedding empty expand_copy fill grid_sampler_2d im2col item lift_fresh_copy linalg_vector_norm "
    "masked_fill max_pool2d_with_indices max_pool3d_with_indices new_empty new_full new_ones new_zeros permute_copy "
    "reflection_pad1d reflection_pad2d reflection_pad3d replication_pad1d replication_pad2d replication_pad3d size "
    "slice sym_numel sym_size sym_stride to type_as unsqueeze_copy upsample_bicubic2d upsample_bilinear2d "
    "upsample_linear1d upsample_nearest1d upsample_nearest2d upsample_nearest3d view_copy zero zeros"
)

_HOMES: tuple[tuple[str, Any, frozenset[str]], ...] = (
    ("operator", operator, OPERATOR),
    ("math", math, MATH),
    ("torch.nn.functional", torch.nn.functional, FUNCTIONAL),
    ("torch", torch, TORCH),
    ("torch.linalg", torch.linalg, words("matrix_norm norm vector_norm")),
    ("torch.fft", torch.fft, words("fft fft2 fftn ifft ifft2 ifftn rfft rfft2 rfftn irfft irfft2 irfftn")),
)
_OWN = frozenset(row.name for row in spec.OPERATORS.values())
_PACKETS = {"aten": ATEN, "mpcompile": _OWN}
_SCRIPT = words("size sym_size sym_stride")  # whose overload without an axis is TorchScript's
_OVERLOAD = re.compile(r"(aten|mpcompile)\.([A-Za-z0-9_]+)\.([A-Za-z0-9_]+)")


def _listed(name: str, names: frozenset[str]) -> bool:
    return name in names or (name.endswith("_") and name[:-1] in names)


@functools.cache
def functions() -> dict[str, Callable[..., Any]]:
    """Qualified name -> every plain function that a graph may call."""
    found: dict[str, Callable[..., Any]] = {"builtins.getattr": getattr}
    for home, module, names in _HOMES:
        for name in sorted(names | {f"{n}_" for n in names}):
            if callable(value := getattr(module, name, None)):
                found[f"{home}.{name}"] = value
    return found


@functools.cache
def _names() -> dict[Any, str]:
    """Function -> its first qualified name."""
    return {function: name for name, function in reversed(functions().items())}


def function_name(target: Any) -> str | None:
    """The name that stands for an operator in a file, or None where it isn't listed."""
    target = guards.original(target)
    if isinstance(target, torch._ops.OpOverload):
        name = f"{target._schema.name.replace('::', '.')}.{target._overloadname}"
        return name if guards.original(function_of(name)) is target else None
    try:
        return _names().get(target)
    except TypeError:  # not hashable
        return None


def function_of(name: object) -> Callable[..., Any] | None:
    """Inverse of :func:`function_name`: None for a name that isn't listed. Some come with a guard in front of them."""
    if not isinstance(name, str):
        return None
    match = _OVERLOAD.fullmatch(name)
    found = functions().get(name) if match is None else _overload(*match.groups())
    return None if found is None else guards.GUARDED.get(found, found)


def _overload(space: str, packet: str, overload: str) -> Callable[..., Any] | None:
    if not _listed(packet, _PACKETS[space]):
        return None
    found = getattr(getattr(getattr(torch.ops, space), packet, None), overload, None)
    if not isinstance(found, torch._ops.OpOverload):
        return None
    if any(argument.is_out for argument in found._schema.arguments):  # it resizes a tensor of the caller's
        return None
    return found if packet in _SCRIPT or _dispatched(found) else None


def _dispatched(found: torch._ops.OpOverload) -> bool:
    """Whether the dispatcher knows an overload. The others are TorchScript's: on plain numbers, or unchecked."""
    try:
        torch._C._dispatch_find_schema_or_throw(found._schema.name, found._schema.overload_name)
    except RuntimeError:
        return False
    return True


def call_of(function: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> Callable[..., Any]:
    """What a graph calls for a listed function with these arguments.

    Raises:
        Refusal: an argument that torch takes without a look and goes wrong by.
    """
    _check_arguments(function, args, kwargs)
    mode = kwargs.get("rounding_mode")
    if mode is None or mode == "floor":
        return function
    if function in guards.TRUNCATING and isinstance(mode, str):
        return guards.TRUNCATING[function]
    expected = "'floor', or 'trunc' in torch.div"
    raise Refusal(f"{function_name(function)} has the rounding mode {shown(mode)}", expected=expected)


def _check_arguments(function: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
    if "out" in kwargs:
        raise Refusal("an operator is given an output to write to", expected="operators that return their result")
    function = guards.original(function)
    if not isinstance(function, torch._ops.OpOverload):
        return
    arguments = function._schema.arguments
    given = {**dict(zip((a.name for a in arguments), args, strict=False)), **kwargs}
    for argument in arguments:
        # A dispatcher call takes a number for an enumerator, whether there is one of that number or not.
        kind = str(argument.real_type).removeprefix("Optional[").removesuffix("]")
        value = given.get(argument.name)
        if value is not None and kind in _ENUMERATORS and not isinstance(value, _ENUMERATORS[kind]):
            attribute = isinstance(value, fx.Node) and value.target is getattr and value.args[1] == argument.name
            if not attribute:
                raise Refusal(f"{function} is given {shown(value)} for {argument.name}", expected=f"a {kind}")


_ENUMERATORS: dict[str, Any] = {
    "ScalarType": torch.dtype,
    "MemoryFormat": torch.memory_format,
    "Layout": torch.layout,
}


def is_method(name: object, kwargs: Mapping[str, Any] | None = None) -> bool:
    """Whether a graph may call this method of a tensor, with these arguments by name."""
    rounding = (kwargs or {}).get("rounding_mode")  # see call_of; a method has no guard
    listed = isinstance(name, str) and _listed(name, METHODS) and hasattr(Tensor, name)
    return listed and (rounding is None or rounding == "floor")
