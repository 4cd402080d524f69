"""Functions that hide an attention, or one of its forms for one processor, in their functional form.

dynamo and torch.export leave ``F.multi_head_attention_forward``, torch's fused kernels for inference
(``_native_multi_head_attention``, ``_transformer_encoder_layer_fwd``) and the variants of
``scaled_dot_product_attention`` as single calls.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch.fx.proxy import Proxy

from mpcompile.capture.attention.functional import Attention, Mask
from mpcompile.capture.attention.modules import Expander, Unsupported, bound, flag

_ATEN = torch.ops.aten


def _forward(expand: Expander, args: Any, kwargs: Any) -> tuple[Any, Any]:
    """``F.multi_head_attention_forward``: inputs (N, B, C), or (N, C)."""
    given = bound(F.multi_head_attention_forward, args, kwargs)
    if given["static_k"] is not None or given["static_v"] is not None:
        raise Unsupported("its keys or values are given already projected")
    own = flag(given["use_separate_proj_weight"])
    separate: Any = tuple(given[f"{part}_proj_weight"] for part in "qkv") if own else None
    rate, training = given["dropout_p"], given["training"]
    if isinstance(training, Proxy):  # it follows the mode
        rate = 0.0 if rate == 0 else training * rate
    elif not training:
        rate = 0.0
    extra: Any = (given["bias_k"], given["bias_v"])
    attention = Attention(
        embed=int(expand.fake(given["query"]).shape[-1]),  # the argument may be computed: x.shape[-1]
        heads=given["num_heads"],
        packed=None if own else given["in_proj_weight"],
        separate=separate,
        in_bias=given["in_proj_bias"],
        out_weight=given["out_proj_weight"],
        out_bias=given["out_proj_bias"],
        extra=None if extra[0] is None else extra,
        add_zero=flag(given["add_zero_attn"]),
        dropout=rate,
        dtype=expand.fake(given["query"]).dtype,
    )
    weights = expand.weights(given["need_weights"], given["average_attn_weights"])
    over_keys, plain = expand.mask(given["key_padding_mask"]), expand.mask(given["attn_mask"])
    causal = flag(given["is_causal"]) and over_keys is None and weights is None
    return expand.attend(
        [given["query"], given["key"], given["value"]],
        attention,
        False,
        over_keys=over_keys,
        plain=None if causal else plain,
        causal=causal,
        weights=weights,
    )


def _native_masks(expand: Expander, mask: Any, kind: Any) -> dict[str, Any]:
    """Return the mask of a fused kernel, which takes every value but zero as hidden."""
    if mask is None:
        return {}
    known = expand.mask(mask)
    if known is None or kind not in (0, 1, 2):
        raise Unsupported("its mask is of an unknown kind")
    hidden = Mask(mask if known.boolean else mask.to(torch.bool), known.rank, True)
    return {"over_keys" if kind == 1 else "plain": hidden}


def _native(expand: Expander, args: Any, kwargs: Any) -> tuple[Any, Any]:
    """``_native_multi_head_attention``: inputs (B, N, C)."""
    names = "query key value embed_dim num_head qkv_weight qkv_bias proj_weight proj_bias mask need_weights"
    given = dict(zip(f"{names} average_attn_weights mask_type".split(), args, strict=False)) | kwargs
    attention = Attention(
        embed=given["embed_dim"],
        heads=given["num_head"],
        packed=given["qkv_weight"],
        separate=None,
        in_bias=given["qkv_bias"],
        out_weight=given["proj_weight"],
        out_bias=given["proj_bias"],
        dtype=expand.fake(given["query"]).dtype,
    )
    weights = expand.weights(given.get("need_weights", True), given.get("average_attn_weights", True))
    masks = _native_masks(expand, given.get("mask"), given.get("mask_type"))
    return expand.attend([given[name] for name in ("query", "key", "value")], attention, True, weights=weights, **masks)


def _layer(expand: Expander, args: Any, kwargs: Any) -> Any:
    """``_transformer_encoder_layer_fwd``: a whole layer, (B, N, C)."""
    names = "src embed heads in_weight in_bias out_weight out_bias gelu norm_first eps w1 b1 w2 b2 f1 c1 f2 c2 mask"
    given = dict(zip(f"{names} mask_type".split(), args, strict=False)) | kwargs
    attention = Attention(
        embed=given["embed"],
        heads=given["heads"],
        packed=given["in_weight"],
        separate=None,
        in_bias=given["in_bias"],
        out_weight=given["out_weight"],
        out_bias=given["out_bias"],
        dtype=expand.fake(given["src"]).dtype,
    )
    masks = _native_masks(expand, given.get("mask"), given.get("mask_type"))
    first = flag(given["norm_first"])

    def norm(x: Any, number: int) -> Any:
        return F.layer_norm(x, (given["embed"],), given[f"w{number}"], given[f"b{number}"], given["eps"])

    def attended(x: Any) -> Any:
        return expand.attend([x, x, x], attention, True, **masks)[0]

    def fed(x: Any) -> Any:
        hidden = F.linear(x, given["f1"], given["c1"])
        return F.linear(F.gelu(hidden) if flag(given["gelu"]) else F.relu(hidden), given["f2"], given["c2"])

    x = given["src"]
    for number, branch in ((1, attended), (2, fed)):
        x = x + branch(norm(x, number)) if first else norm(x + branch(x), number)
    return x


def _variant(positions: str) -> Callable[[Expander, Any, Any], tuple[Any, ...]]:
    """Return the rewrite of a variant of ``scaled_dot_product_attention`` with these arguments."""
    names = ["query", "key", "value", *positions.split()]

    def rewrite(expand: Expander, args: Any, kwargs: Any) -> tuple[Any, ...]:
        given = dict(zip(names, args, strict=False)) | kwargs
        inputs = [given.pop(name) for name in ("query", "key", "value")]
        mask = given.pop("attn_bias", None)
        mask = given.pop("attn_mask", None) if mask is None else mask
        options: dict[str, Any] = {} if mask is None else {"attn_mask": mask}
        for name in ("dropout_p", "is_causal", "scale", "enable_gqa"):
            if given.get(name):
                options[name] = given[name]
        if expand.wants_weights:
            raise Unsupported("more than its result is read")
        if given.get("dropout_mask") is not None:
            raise Unsupported("it is given the random numbers of its dropout")
        return (F.scaled_dot_product_attention(*inputs, **options),)

    return rewrite


_PACKETS: dict[str, Callable[[Expander, Any, Any], Any]] = {
    "_native_multi_head_attention": _native,
    "_transformer_encoder_layer_fwd": _layer,
    "_scaled_dot_product_flash_attention": _variant("dropout_p is_causal return_debug_mask"),
    "_scaled_dot_product_flash_attention_for_cpu": _variant("dropout_p is_causal"),
    "_scaled_dot_product_efficient_attention": _variant("attn_bias compute_log_sumexp dropout_p is_causal"),
    "_scaled_dot_product_cudnn_attention": _variant("attn_bias compute_log_sumexp dropout_p is_causal"),
    "_scaled_dot_product_attention_math": _variant("attn_mask dropout_p is_causal dropout_mask"),
    "_scaled_dot_product_fused_attention_overrideable": _variant("attn_bias dropout_p is_causal"),
}

REWRITES: dict[Any, Callable[[Expander, Any, Any], Any]] = {
    F.multi_head_attention_forward: _forward,
    **{getattr(torch, name): rewrite for name, rewrite in _PACKETS.items() if hasattr(torch, name)},
    **{getattr(_ATEN, name).default: rewrite for name, rewrite in _PACKETS.items() if hasattr(_ATEN, name)},
}
"""Function or operator -> its rewrite, which returns the results of the call."""
