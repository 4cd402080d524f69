"""Attention of merged tokens in plain torch: log(size) in its logits, and the attention that single tokens pay."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from mpcompile.kernels.token_merge.reference import TINY, sizes_from, without_autocast

CHANNELS = 8  # channels added to keys that carry log(size): flash attention reads multiples of 8


def token_bias(size: Tensor, logits: Tensor, start: int, dim: int, rows: int = 1) -> Tensor:
    """Return log(size), shaped to be added to attention logits (B * rows, ..., T, ...) whose keys are along ``dim``."""
    shape = [1] * logits.dim()
    shape[0], shape[dim] = size.shape[0] * rows, -1
    log = sizes_from(size, start).log()
    if rows > 1:
        log = log.unsqueeze(1).expand(-1, rows, -1, -1)
    return log.reshape(shape).to(logits.dtype)


@without_autocast
def token_saliency(
    query: Tensor,
    key: Tensor | None,
    size: Tensor | None,
    rows: list[int],
    scale: float | None = None,
    bias: Tensor | None = None,
) -> Tensor:
    """Return how much attention some tokens pay to each token, relative to an average token.

    The attention of the tokens ``rows`` to every input token that a token represents, averaged over rows and heads,
    times the number of tokens T. Computed for these rows alone, in fp32; no gradient flows through it.

    Args:
        query: (B, heads, T, D); or, with no key, attention weights (B, heads, T, T).
        key: (B, heads, T, D), or as many heads as divide those of the query; None if the weights are given.
        size: (B, T, 1), the input tokens that each represents; None if attention counts every token once.
        rows: numbers of the tokens that attend.
        scale: of the products; None for D ** -0.5.
        bias: (..., T or 1, T), broadcast to the logits and added to them. It holds log(size), which is added without.

    Returns:
        (B, T) in float32; hidden tokens (of size 0) have 0.
    """
    weights = _rows(query, rows)
    if key is not None:
        weights = _logits(weights * (key.shape[-1] ** -0.5 if scale is None else scale), key.detach())
        if bias is not None:
            weights = weights + (bias.detach().float() if bias.shape[-2] == 1 else _rows(bias, rows))
        elif size is not None:
            weights = weights + size.float().log().transpose(-1, -2).unsqueeze(1)
        weights = weights.softmax(-1)
    share = weights.mean((1, 2))
    if size is not None:
        share = share / size.float().squeeze(-1).clamp(min=TINY)
    return share * share.shape[1]


def _rows(x: Tensor, rows: list[int]) -> Tensor:
    """Return some rows of x (..., T, C) in float32; slices cannot reach outside of a tensor."""
    return torch.cat([x.detach()[..., row : row + 1, :] for row in rows], -2).float()


def _logits(query: Tensor, key: Tensor) -> Tensor:
    """Return the products of a few rows (B, heads, rows, D) with all keys, of which several heads may share one."""
    if key.shape[1] != query.shape[1]:
        key = key.repeat_interleave(query.shape[1] // key.shape[1], 1)
    if query.is_cuda:  # Inductor reads keys in half precision once; a product would be of a copy in fp32
        return (query.unsqueeze(-2) * key.unsqueeze(-3)).sum(-1)
    return query @ key.float().transpose(-1, -2)


def _attention_by_channel(
    query: Tensor, key: Tensor, value: Tensor, bias: Tensor, dropout: float, scale: float
) -> Tensor:
    """Attention with a bias per key (B, 1, 1, T), carried by two extra key channels: a high part and a low part.

    A mask would rule out flash attention on CUDA. Queries are one in both channels. The low part is the rounding error
    of the high part in half precision.
    """
    bias = (bias.float() / scale).transpose(-1, -2).expand(-1, key.shape[1], -1, -1)
    high = bias.to(key.dtype)
    low = (bias - high.float()).to(key.dtype)
    pad = (0, CHANNELS - 2)
    key = torch.cat([key, F.pad(torch.cat([high, low], -1), pad)], -1)
    query = torch.cat([query, F.pad(torch.ones_like(query[..., :2]), pad)], -1)
    size = value.shape[-1]
    result = F.scaled_dot_product_attention(query, key, F.pad(value, (0, CHANNELS)), dropout_p=dropout, scale=scale)
    return result[..., :size]


def token_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    size: Tensor,
    start: int,
    dropout_p: float,
    scale: float | None,
    enable_gqa: bool,
) -> Tensor:
    """Proportional attention: log(size) is added to the logits of merged keys.

    Args:
        query: (B, heads, L, D).
        key, value: (B, heads, T, D), of the tokens from number ``start``.
        size: (B, N, 1).
        start: as in :func:`token_mean`.
        dropout_p, scale, enable_gqa: as in ``scaled_dot_product_attention``.

    Source: Bolya et al., section 3, equation 1.
    """
    bias = sizes_from(size, start).log().transpose(-1, -2).unsqueeze(1)  # (B, 1, 1, T)
    flash = query.is_cuda and query.dtype in (torch.float16, torch.bfloat16) and not enable_gqa
    if flash and query.shape[-1] == value.shape[-1] and query.shape[-1] % 8 == 0 and query.shape[-1] <= 256 - CHANNELS:
        scale = query.shape[-1] ** -0.5 if scale is None else scale
        return _attention_by_channel(query, key, value, bias, dropout_p, scale)
    return F.scaled_dot_product_attention(
        query, key, value, attn_mask=bias.to(query.dtype), dropout_p=dropout_p, scale=scale, enable_gqa=enable_gqa
    )
