"""Token merging for runtimes in which every operator is a call of its own: few operators, which ONNX has.

``reference`` finds ranks by comparing and counting, which Inductor fuses into a few loops. ONNX Runtime runs each of
those steps by itself: over a thousand small calls in a ViT. Here selection is ``topk``, and a merged token is a sum
that one product computes, together with its size and its parts' norms.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from mpcompile.kernels.token_merge import reference
from mpcompile.kernels.token_merge.reference import TIE, TINY


def token_merge(
    x: Tensor,
    keys: Tensor,
    size: Tensor,
    r: int,
    prefix: int,
    suffix: int = 0,
    saliency: Tensor | None = None,
    saliency_weight: float = 0.0,
    size_weight: float = 0.0,
    keep_norm: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """Merge as ``reference.token_merge`` does, to rounding, for finite inputs without gradients.

    A token of size 0 (hidden by a mask) into which another could have merged becomes zero.

    Returns:
        x (B, N - r, C), size (B, N - r, 1), and (B, N) int64: the position of each old token in the new sequence.
    """
    if suffix:
        pairs = (saliency_weight, size_weight, keep_norm)
        return reference.with_suffix(token_merge, x, keys, size, r, prefix, suffix, saliency, *pairs)
    tokens, channels = x.shape[1:]
    r = tokens - reference.merged_count(tokens, r, prefix)
    if r <= 0:
        return reference.token_merge(x, keys, size, 0, prefix)
    even, odd = prefix + prefix % 2, prefix + 1 - prefix % 2
    value, target = _match(keys, size, even, odd, saliency, saliency_weight, size_weight)
    merged, staying = _choose(value, r)

    whole = x.float()
    norm = torch.linalg.vector_norm(whole, dim=-1, keepdim=True)
    row = torch.cat([whole, norm, torch.ones_like(norm), size], -1)  # what is averaged; their weights; sizes
    of_a, of_b = row[:, even::2], row[:, odd::2]
    share = torch.where(merged, of_a[..., -1:], 0.0)
    share = torch.where(target == torch.arange(of_b.shape[1], device=x.device), share, 0.0)  # (B, A, B)
    sums = of_b * of_b[..., -1:] + share.transpose(1, 2) @ of_a
    average, norm, grown, _ = sums.split([channels, 1, 1, 1], -1)
    if keep_norm:
        average = average * (norm / (torch.linalg.vector_norm(average, dim=-1, keepdim=True) * grown).clamp(min=TINY))
    else:
        average = average / grown.clamp(min=TINY)
    parts, sizes = [x[:, :prefix], average.to(x.dtype)], [size[:, :prefix], grown]
    if staying is not None:
        stay = _rows(of_a, staying)
        parts.insert(1, stay[..., :channels].to(x.dtype))
        sizes.insert(1, stay[..., -1:])
    places = _places(merged, target, prefix, tokens, of_a.shape[1] - r)
    return torch.cat(parts, 1), torch.cat(sizes, 1), places


def _match(
    keys: Tensor, size: Tensor, even: int, odd: int, saliency: Tensor | None, saliency_weight: float, size_weight: float
) -> tuple[Tensor, Tensor]:
    """Return the score of each token of A with the token of B that it is matched with, and that token; both (B, A, 1).

    Args:
        keys: (B, heads, N, D).
        size, saliency, saliency_weight, size_weight: as in ``reference.token_merge``.
        even, odd: the first tokens of A and of B.
    """
    total = functools.reduce(torch.add, keys.float().unbind(1))
    metric = total / torch.linalg.vector_norm(total, dim=-1, keepdim=True).clamp(min=1e-12)
    scores = metric[:, even::2] @ metric[:, odd::2].transpose(-1, -2)
    lost = None
    if size_weight:
        log = size_weight * size.float().clamp(min=1).log()
        scores, lost = scores - log[:, odd::2].transpose(-1, -2), log[:, even::2]
    if saliency is not None and saliency_weight:
        known = saliency_weight * saliency.float()[:, even::2].unsqueeze(-1)
        lost = known if lost is None else lost + known
    best = scores.amax(-1, keepdim=True)
    target = torch.minimum(scores, best - TIE).argmax(-1, keepdim=True)  # argmax takes the first of equal ones
    return best if lost is None else best - lost, target


def _choose(value: Tensor, r: int) -> tuple[Tensor, Tensor | None]:
    """Return which tokens of A merge, (B, A, 1), and the numbers of the others in ascending order, (B, A - r, 1).

    The second is None if all of them merge.

    A token's key tells its class (above the cut, equal to it, below), then its index. Keys differ from each other, so
    that no runtime has to break ties.
    """
    count = value.shape[1]
    index = torch.arange(count, device=value.device, dtype=torch.float32).view(-1, 1)
    cut = value.topk(r, 1).values[:, -1:]
    near = torch.where(value >= cut - TIE, count - index, -index)
    key = torch.where(value > cut + TIE, 2 * count - index, near)
    merged = key >= key.topk(r, 1).values[:, -1:]
    if r == count:
        return merged, None
    return merged, torch.where(merged, count + index, index).topk(count - r, 1, largest=False).indices


def _rows(x: Tensor, index: Tensor) -> Tensor:
    """Gather rows: x (B, N, C), index (B, n, 1) -> (B, n, C)."""
    if isinstance(x.shape[0], int) and x.shape[0] == 1:
        return x.index_select(1, index.flatten())
    return reference.gathered_rows(x, index)


def _places(merged: Tensor, target: Tensor, prefix: int, tokens: int, left: int) -> Tensor:
    """Return the new places of all tokens (B, tokens); ``left`` tokens of A stay."""
    merged, target = merged.squeeze(-1), target.squeeze(-1)
    index = torch.arange(merged.shape[1], device=merged.device)
    of_a = torch.where(merged, left + target, index - merged.long().cumsum(-1))
    return reference.places(of_a, left, prefix, tokens)
