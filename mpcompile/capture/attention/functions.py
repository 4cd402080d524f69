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


def _given(name: str, args: Any, kwargs: Any) -> dict[str, Any]:
    """Return the arguments of a call of an aten operator by name, defaults included."""
    arguments = getattr(_ATEN, name).default._schema.arguments
    defaults = {argument.name: argument.default_value for argument in arguments}
    return defaults | dict(zip(defaults, args, strict=False)) | kwargs


def _fused(expand: Expander, given: dict[str, Any], query: Any, heads: int) -> tuple[Attention, dict[str, Any]]:
    """Return the attention that a fused kernel computes from ``query``, and its masks."""
    attention = Attention(
        embed=given["embed_dim"],
        heads=heads,
        packed=given["qkv_weight"],
        separate=None,
        in_bias=given["qkv_bias"],
        out_weight=given["proj_weight"],
        out_bias=given["proj_bias"],
        dtype=expand.fake(query).dtype,
    )
    return attention, _native_masks(expand, given["mask"], given["mask_type"])


def _native(expand: Expander, args: Any, kwargs: Any) -> tuple[Any, Any]:
    """``_native_multi_head_attention``: inputs (B, N, C)."""
    given = _given("_native_multi_head_attention", args, kwargs)
    attention, masks = _fused(expand, given, given["query"], given["num_head"])
    weights = expand.weights(given["need_weights"], given["average_attn_weights"])
    return expand.attend([given[name] for name in ("query", "key", "value")], attention, True, weights=weights, **masks)


def _layer(expand: Expander, args: Any, kwargs: Any) -> Any:
    """``_transformer_encoder_layer_fwd``: a whole layer, (B, N, C)."""
    given = _given("_transformer_encoder_layer_fwd", args, kwargs)
    attention, masks = _fused(expand, given, given["src"], given["num_heads"])
    first = flag(given["norm_first"])

    def norm(x: Any, number: int) -> Any:
        weight, bias = given[f"norm_weight_{number}"], given[f"norm_bias_{number}"]
        return F.layer_norm(x, (given["embed_dim"],), weight, bias, given["eps"])

    def attended(x: Any) -> Any:
        return expand.attend([x, x, x], attention, True, **masks)[0]

    def fed(x: Any) -> Any:
        hidden = F.linear(x, given["ffn_weight_1"], given["ffn_bias_1"])
        activated = F.gelu(hidden) if flag(given["use_gelu"]) else F.relu(hidden)
        return F.linear(activated, given["ffn_weight_2"], given["ffn_bias_2"])

    x = given["src"]
    for number, branch in ((1, attended), (2, fed)):
        x = x + branch(norm(x, number)) if first else norm(x + branch(x), number)
    return x


def _variant(name: str) -> Callable[[Expander, Any, Any], tuple[Any, ...]]:
    """Return the rewrite of a variant of ``scaled_dot_product_attention``."""

    def rewrite(expand: Expander, args: Any, kwargs: Any) -> tuple[Any, ...]:
        given = _given(name, args, kwargs)
        inputs = [given.pop(name) for name in ("query", "key", "value")]
        mask = given.pop("attn_bias", None)
        mask = given.pop("attn_mask", None) if mask is None else mask
        options: dict[str, Any] = {} if mask is None else {"attn_mask": mask}
        options |= {key: given[key] for key in ("dropout_p", "is_causal", "scale", "enable_gqa") if given.get(key)}
        if expand.wants_weights:
            raise Unsupported("more than its result is read")
        if given.get("dropout_mask") is not None:
            raise Unsupported("it is given the random numbers of its dropout")
        return (F.scaled_dot_product_attention(*inputs, **options),)

    return rewrite


_VARIANTS = (
    "_scaled_dot_product_flash_attention",
    "_scaled_dot_product_flash_attention_for_cpu",
    "_scaled_dot_product_efficient_attention",
    "_scaled_dot_product_cudnn_attention",
    "_scaled_dot_product_attention_math",
    "_scaled_dot_product_fused_attention_overrideable",
)
_PACKETS: dict[str, Callable[[Expander, Any, Any], Any]] = {
    "_native_multi_head_attention": _native,
    "_transformer_encoder_layer_fwd": _layer,
    **{name: _variant(name) for name in _VARIANTS},
}

REWRITES: dict[Any, Callable[[Expander, Any, Any], Any]] = {
    F.multi_head_attention_forward: _forward,
    **{getattr(torch, name): rewrite for name, rewrite in _PACKETS.items() if hasattr(torch, name)},
    **{getattr(_ATEN, name).default: rewrite for name, rewrite in _PACKETS.items() if hasattr(_ATEN, name)},
}
"""Function or operator -> its rewrite, which returns the results of the call."""
