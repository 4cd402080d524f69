"""Token merging (ToMe) in plain torch: bipartite matching on the keys, size-weighted averages, proportional attention.

Conventions: the first ``prefix`` tokens (class, distillation, registers) stay first, in their order, and neither merge
nor receive. The others alternate by their index in the whole sequence: even indices form A, odd ones B. The ``r``
tokens of A that are most similar to a token of B are averaged into it. New order: prefix, the rest of A ascending, B
ascending. Ties go to the lower index. Source: Bolya et al., "Token Merging: Your ViT But Faster", section 3.
"""

from __future__ import annotations

import torch
from torch import Tensor


def token_size(x: Tensor) -> Tensor:
    """x (B, N, C) -> (B, N, 1) of ones: how many input tokens each token stands for."""
    return torch.ones_like(x[..., :1])


def token_bias(size: Tensor, query: Tensor) -> Tensor:
    """size (B, N, 1) -> log(size) as (B, 1, 1, N) in the query's dtype, to be added to attention logits."""
    return size.float().log().to(query.dtype).transpose(-1, -2).unsqueeze(1)


def merged_count(tokens: int, r: int, prefix: int) -> int:
    """Tokens left after merging ``r`` of ``tokens``; at most half of those that aren't prefix can go."""
    return tokens - max(0, min(r, (tokens - prefix) // 2))


def token_merge(x: Tensor, keys: Tensor, size: Tensor, r: int, prefix: int) -> tuple[Tensor, Tensor]:
    """Merge ``r`` tokens of x.

    Args:
        x: (B, N, C) tokens.
        keys: (B, heads, N, D), as attention saw them.
        size: (B, N, 1) input tokens each token stands for.
        r: tokens to merge away, clamped to half of the tokens that are not prefix.
        prefix: tokens at the front that take no part.

    Returns:
        x (B, N - r, C) and size (B, N - r, 1).
    """
    tokens = x.shape[1]
    r = tokens - merged_count(tokens, r, prefix)
    if r <= 0:
        return x.clone(), size.clone()
    even, odd = prefix + prefix % 2, prefix + 1 - prefix % 2
    metric = torch.nn.functional.normalize(keys.float().mean(1), dim=-1)
    scores = metric[:, even::2] @ metric[:, odd::2].transpose(-1, -2)
    target = scores.argmax(-1)
    best = scores.gather(-1, target.unsqueeze(-1)).squeeze(-1)
    order = best.argsort(dim=-1, descending=True, stable=True)
    merged = order[:, :r, None]
    kept = order[:, r:].sort(-1).values.unsqueeze(-1)
    target = target.unsqueeze(-1).gather(1, merged)

    # Values and sizes travel as one tensor: the last channel is the size.
    weighted = torch.cat([x.float() * size, size.float()], -1)
    channels = weighted.shape[-1]
    a, b = weighted[:, even::2], weighted[:, odd::2]
    b = b.scatter_add(1, target.expand(-1, -1, channels), a.gather(1, merged.expand(-1, -1, channels)))
    a = a.gather(1, kept.expand(-1, -1, channels))
    weighted = torch.cat([weighted[:, :prefix], a, b], 1)
    new_size = weighted[..., -1:]
    return (weighted[..., :-1] / new_size).to(x.dtype), new_size.to(size.dtype)


def token_mean(x: Tensor, size: Tensor, start: int, dim: int, keepdim: bool) -> Tensor:
    """Mean over the tokens of x along ``dim``, each weighted by the input tokens it stands for.

    Args:
        x: (..., T, ...) with T = N - start tokens along ``dim``; axis 0 is the batch.
        size: (B, N, 1), the sizes of all N tokens.
    """
    shape = [1] * x.dim()
    shape[0], shape[dim] = x.shape[0], x.shape[dim]
    weight = size[:, start:, 0].reshape(shape).to(x.dtype)
    return (x * weight).sum(dim, keepdim=keepdim) / weight.sum(dim, keepdim=keepdim)
