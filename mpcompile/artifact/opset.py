"""The operators, methods and attributes that a saved graph may use, by name. Everything else is refused.

A file is untrusted data. Nothing in it is imported or looked up by a path that the file gives: a name has a meaning
only if it is listed below. No listed operator reads or writes files, starts processes, or takes code, and none reads or
writes outside its tensors: where torch does not check that, guards.py does. Layers are listed in
:mod:`mpcompile.artifact.leaves`.
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
    """Raised for anything that a file cannot or may not contain.

    The caller turns it into an ArtifactError that names the file.
    """

    def __init__(self, message: str, *, expected: object = None, found: object = None, hint: str | None = None) -> None:
        self.message, self.expected, self.found, self.hint = message, expected, found, hint
        super().__init__(message)

    def at(self, place: str) -> Refusal:
        """Return the same refusal with the place before its message."""
        return Refusal(f"{place}: {self.message}", expected=self.expected, found=self.found, hint=self.hint)


def shown(value: object) -> str:
    """Return the ``repr`` of a value, cut to 80 characters for a message."""
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


# --- Names that end up in the Python source that fx generates and executes ---

_IDENTIFIER = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_MAX_PARTS, _MAX_NAME = 64, 1024  # names in a path, characters in a name
_TAKEN = frozenset({"self", "torch", "device", "inf", "nan", "NoneType", "fx_pytree", "pytree"})


def keyword_name(text: object) -> str:
    """Return ``text`` if it can name an argument in generated source, else raise Refusal."""
    if isinstance(text, str) and _IDENTIFIER.fullmatch(text) and not keyword.iskeyword(text):
        return text
    raise Refusal("a name cannot be used in Python source", expected="a plain identifier", found=shown(text))


def identifier(text: object) -> str:
    """Return ``text`` if it can name a value in generated source, else raise Refusal.

    ``self``, and the names that fx imports there, are reserved.
    """
    if keyword_name(text) not in _TAKEN:
        return str(text)
    raise Refusal("a name would hide one that generated source needs", expected="another name", found=shown(text))


def module_path(text: object) -> str:
    """Return ``text`` if it is a dotted path of names that are safe in generated source, else raise Refusal.

    fx writes a name that is not an identifier as ``getattr(self, "name")``: a quotation mark, a backslash or a line
    break in it could end the string and continue as code. An identifier has to be NFKC-normalised, as Python reads it.
    """
    if isinstance(text, str) and text.count(".") < _MAX_PARTS and all(map(_is_name, text.split("."))):
        return text
    raise Refusal(
        "a path cannot name a layer or tensor",
        expected="names of printable characters without quotation marks and backslashes, joined by dots",
        found=shown(text),
    )


def _is_name(text: str) -> bool:
    if not 0 < len(text) <= _MAX_NAME or not text.isprintable() or any(c in text for c in "\"'\\"):
        return False
    return not text.isidentifier() or unicodedata.normalize("NFKC", text) == text


def words(text: str) -> frozenset[str]:
    """Return the words of a text."""
    return frozenset(text.split())


# --- Operators. A listed name includes its in-place form: ``add`` allows ``add_`` ---

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
    f"{_COMMON} {_NEURAL} __and__ __or__ __xor__ _adaptive_avg_pool2d _adaptive_avg_pool3d _assert_scalar "
    "_assert_tensor_metadata _log_softmax _native_batch_norm_legit _native_batch_norm_legit_functional "
    "_native_batch_norm_legit_no_training _scaled_dot_product_efficient_attention _scaled_dot_product_flash_attention "
    "_scaled_dot_product_flash_attention_for_cpu _softmax _to_copy _unsafe_view _upsample_bicubic2d_aa "
    "_upsample_bilinear2d_aa alias broadcast_tensors col2im column_stack constant_pad_nd contiguous convolution copy "
    "cosine_similarity cudnn_batch_norm detach detach_copy embedding empty expand_copy fill grid_sampler "
    "grid_sampler_2d hstack im2col index item lift_fresh_copy linalg_vector_norm mT masked_fill "
    "max_pool2d_with_indices max_pool3d_with_indices meshgrid new_empty new_full new_ones new_zeros numpy_T "
    "permute_copy polar reflection_pad1d reflection_pad2d reflection_pad3d replication_pad1d replication_pad2d "
    "replication_pad3d size slice sym_numel sym_size sym_stride to type_as unsqueeze_copy upsample_bicubic2d "
    "upsample_bilinear2d upsample_linear1d upsample_nearest1d upsample_nearest2d upsample_nearest3d view_as_complex "
    "view_as_real view_copy vstack zero zeros"
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
_SCRIPT = words("size sym_size sym_stride")  # their overloads without an axis are TorchScript's
_OVERLOAD = re.compile(r"(aten|mpcompile)\.([A-Za-z0-9_]+)\.([A-Za-z0-9_]+)")


def _listed(name: str, names: frozenset[str]) -> bool:
    return name in names or (name.endswith("_") and name[:-1] in names)


@functools.cache
def functions() -> dict[str, Callable[..., Any]]:
    """Return every plain function that a graph may call, by qualified name."""
    callables: dict[str, Callable[..., Any]] = {"builtins.getattr": getattr}
    for home, module, names in _HOMES:
        for name in sorted(names | {f"{n}_" for n in names}):
            if callable(value := getattr(module, name, None)):
                callables[f"{home}.{name}"] = value
    return callables


@functools.cache
def _names() -> dict[Any, str]:
    """Function -> its first qualified name."""
    return {function: name for name, function in reversed(functions().items())}


def function_name(target: Any) -> str | None:
    """Return the name of an operator in a file, or None if it is not listed."""
    target = guards.original(target)
    if isinstance(target, torch._ops.OpOverload):
        name = f"{target._schema.name.replace('::', '.')}.{target._overloadname}"
        return name if guards.original(function_of(name)) is target else None
    try:
        return _names().get(target)
    except TypeError:  # not hashable
        return None


def function_of(name: object) -> Callable[..., Any] | None:
    """Return the operator with a name, or the guard that replaces it (guards.py); None if it is not listed."""
    if not isinstance(name, str):
        return None
    match = _OVERLOAD.fullmatch(name)
    function = functions().get(name) if match is None else _overload(*match.groups())
    return None if function is None else guards.GUARDED.get(function, function)


def _overload(space: str, packet: str, overload: str) -> Callable[..., Any] | None:
    if not _listed(packet, _PACKETS[space]):
        return None
    candidate = getattr(getattr(getattr(torch.ops, space), packet, None), overload, None)
    if not isinstance(candidate, torch._ops.OpOverload):
        return None
    if any(argument.is_out for argument in candidate._schema.arguments):  # it resizes a tensor of the caller
        return None
    return candidate if packet in _SCRIPT or _is_dispatched(candidate) else None


def _is_dispatched(overload: torch._ops.OpOverload) -> bool:
    """Return True if the dispatcher knows an overload. The others are TorchScript's, for plain numbers or unchecked."""
    try:
        torch._C._dispatch_find_schema_or_throw(overload._schema.name, overload._schema.overload_name)
    except RuntimeError:
        return False
    return True


def call_of(function: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> Callable[..., Any]:
    """Return the function that a graph calls for a listed function with these arguments; it may be a guard.

    Raises:
        Refusal: an argument that torch accepts unchecked, with undefined results.
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
    if kwargs.get("out") is not None:  # tracing F.normalize records out=None
        raise Refusal("an operator is given an output to write to", expected="operators that return their result")
    function = guards.original(function)
    if not isinstance(function, torch._ops.OpOverload):
        return
    arguments = function._schema.arguments
    values = {**dict(zip((a.name for a in arguments), args, strict=False)), **kwargs}
    for argument in arguments:
        # The dispatcher accepts a number for an enumerator, even if no enumerator has that number.
        kind = str(argument.real_type).removeprefix("Optional[").removesuffix("]")
        value = values.get(argument.name)
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
    """Return True if a graph may call this method of a tensor, with these keyword arguments."""
    rounding = (kwargs or {}).get("rounding_mode")  # see call_of; methods have no guards
    listed = isinstance(name, str) and _listed(name, METHODS) and hasattr(Tensor, name)
    return listed and (rounding is None or rounding == "floor")
