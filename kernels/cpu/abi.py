"""The parameter structs of the CPU kernels, field by field as ``abi.h`` declares them."""

from __future__ import annotations

import ctypes

_POINTER, _INT32, _INT64, _FLOAT = ctypes.c_void_p, ctypes.c_int32, ctypes.c_int64, ctypes.c_float


class Weight(ctypes.Structure):
    """``NmWeight``: a packed weight and its bias."""

    _fields_ = (
        ("values", _POINTER),
        ("index", _POINTER),
        ("bias", _POINTER),
        ("inputs", _INT32),
        ("outputs", _INT32),
        ("n", _INT32),
        ("m", _INT32),
        ("layout", _INT32),
    )


class Linear(ctypes.Structure):
    """``NmLinear``: the parameters of ``nm_linear``."""

    _fields_ = (
        ("x", _POINTER),
        ("residual", _POINTER),
        ("y", _POINTER),
        ("weight", Weight),
        ("tokens", _INT64),
        ("pixels", _INT64),
        ("bf16", _INT32),
        ("format", _INT32),
        ("activation", _INT32),
        ("threads", _INT32),
    )


class Mlp(ctypes.Structure):
    """``NmMlp``: the parameters of ``nm_mlp``."""

    _fields_ = (
        ("x", _POINTER),
        ("residual", _POINTER),
        ("y", _POINTER),
        ("first", Weight),
        ("second", Weight),
        ("tokens", _INT64),
        ("bf16", _INT32),
        ("activation", _INT32),
        ("threads", _INT32),
    )


class Conv(ctypes.Structure):
    """``NmConv``: the parameters of ``nm_conv``."""

    _fields_ = (
        ("x", _POINTER),
        ("residual", _POINTER),
        ("y", _POINTER),
        ("weight", Weight),
        ("images", _INT64),
        ("height", _INT64),
        ("width", _INT64),
        ("kernel_h", _INT32),
        ("kernel_w", _INT32),
        ("stride_h", _INT32),
        ("stride_w", _INT32),
        ("pad_h", _INT32),
        ("pad_w", _INT32),
        ("dilation_h", _INT32),
        ("dilation_w", _INT32),
        ("groups", _INT32),
        ("activation", _INT32),
        ("channels_last", _INT32),
        ("threads", _INT32),
    )


class Heads(ctypes.Structure):
    """``NmHeads``: a tensor of heads by its strides."""

    _fields_ = (("data", _POINTER), ("batch", _INT64), ("head", _INT64), ("token", _INT64))


class Attention(ctypes.Structure):
    """``NmAttention``: the parameters of ``nm_attention``."""

    _fields_ = (
        ("query", Heads),
        ("key", Heads),
        ("value", Heads),
        ("bias", Heads),
        ("y", _POINTER),
        ("batch", _INT64),
        ("heads", _INT64),
        ("queries", _INT64),
        ("keys", _INT64),
        ("dim", _INT32),
        ("value_dim", _INT32),
        ("scale", _FLOAT),
        ("threads", _INT32),
    )


STRUCTS: dict[str, type[ctypes.Structure]] = {
    "NmWeight": Weight,
    "NmLinear": Linear,
    "NmMlp": Mlp,
    "NmConv": Conv,
    "NmHeads": Heads,
    "NmAttention": Attention,
}
"""Name in ``abi.h`` -> its mirror here."""
