"""Token merging (ToMe) in plain torch: bipartite matching and size-weighted averages.

Conventions: the first ``prefix`` tokens (class, distillation, registers) stay first, in order, and take no part in
merging; the last ``suffix`` tokens (detection) likewise stay last. The others are split by their index in the whole
sequence: even indices form set A, odd indices set B. The ``r`` tokens of A that are most similar to a token of B are
averaged into it. New order: prefix, the rest of A, B, suffix, each in ascending order. Source: Bolya et al., "Token
Merging: Your ViT But Faster", section 3.

Pairs have scores. The score of a token ``a`` of A with a token ``b`` of B is the cosine of their keys, summed over
heads, less two penalties that are off by default: ``saliency_weight`` times the saliency of ``a``, the token that would
go, and ``size_weight`` times ``log(size_a * size_b)``. Equal keys have scores that differ in the last bits, depending
on the order in which a processor adds products. To break ties by index alone on every processor and in every engine,
scores that differ by at most ``TIE`` count as equal:

- A token of A is matched with the first token of B whose score is within ``TIE`` of its highest.
- The r-th highest of these highest scores is the cut. Tokens of A above it by more than ``TIE`` merge; of those within
  ``TIE`` of it, the first ones merge, until r have merged.

Both rules measure from one value that does not depend on the order of comparisons, so "equal" need not be transitive.
Rounding scores to a grid would not help: two that differ in the last bit can be on either side of a grid's edge.
A key with NaN or infinity has similarity 0 to every token, and such a saliency counts as 0.

Tokens that take no part are unchanged, bit for bit. Sums use no atomics, so that two runs agree.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from mpcompile import _moved

__getattr__ = _moved.renamed(
    __name__,
    {name: f"kernels.token_merge.attention.{name}" for name in ("token_bias", "token_attention")},
)
# In fp32, the order of addition changes a cosine over D channels by at most 4 D 2^-24: 2^-14 for 256 channels, 2^-12
# for 1024. Keys in bf16 only resolve about 2^-9: the tolerance loses nothing that a model relies on.
TIE = 2.0**-12
TINY = torch.finfo(torch.float32).tiny


_Operator = TypeVar("_Operator", bound=Callable[..., Any])


def without_autocast(operator: _Operator) -> _Operator:
    """Run an operator without autocast, whose products in half precision differ by more than ``TIE``."""

    @functools.wraps(operator)
    def run(x: Tensor, *args: Any) -> Any:
        device = x.device.type
        if not (torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)):
            return operator(x, *args)
        with torch.autocast(device, enabled=False):
            return operator(x, *args)

    return run  # type: ignore[return-value]


def token_size(x: Tensor, mask: Tensor | None = None) -> Tensor:
    """Return the number of input tokens that each token represents, before any merge.

    Args:
        x: (B, N, C).
        mask: attention mask over keys, (B or 1, 1, 1, N): boolean, or added to the logits. A token counts as much as in
            attention: exp(mask), and 0 if hidden.

    Returns:
        (B, N, 1) in float32; ones without a mask.
    """
    if mask is None:
        return torch.ones_like(x[..., :1], dtype=torch.float32)
    weight = mask.float() if mask.dtype is torch.bool else mask.float().exp()
    return weight[:, 0, 0, :, None].expand(x.shape[0], -1, -1)


def sizes_from(size: Tensor, start: int) -> Tensor:
    """Return the sizes (B, N, 1) of the tokens from number ``start``; a negative start prepends tokens of size 1."""
    return F.pad(size, (0, 0, -start, 0), value=1.0) if start < 0 else size[:, start:]


def merged_count(tokens: int, r: int, prefix: int) -> int:
    """Return the number of tokens left after merging ``r``; at most half of the tokens outside the prefix can merge."""
    return tokens - max(0, min(r, (tokens - prefix) // 2))


@without_autocast
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
    """Merge ``r`` tokens of x.

    Args:
        x: (B, N, C) tokens.
        keys: (B, heads, N, D), whose cosines pair the tokens: keys as attention used them, or x as one head.
        size: (B, N, 1) number of input tokens that each token represents.
        r: tokens to merge away, clamped to half of those that take part.
        prefix, suffix: tokens at the front and at the end that take no part.
        saliency: (B, N), see :func:`token_saliency`; None for none.
        saliency_weight: penalty for the saliency of a token that goes.
        size_weight: penalty for the log of the two sizes' product; sizes below 1 (hidden tokens) count as 1.
        keep_norm: scale a merged token to the mean norm of its parts, weighted by their sizes.

    Returns:
        x (B, N - r, C), size (B, N - r, 1), and (B, N) int64: the position of each old token in the new sequence.
    """
    if suffix:
        pairs = (saliency_weight, size_weight, keep_norm)
        return with_suffix(token_merge, x, keys, size, r, prefix, suffix, saliency, *pairs)
    batch, tokens, _ = x.shape
    r = tokens - merged_count(tokens, r, prefix)
    if r <= 0:
        return x.clone(), size.clone(), torch.arange(tokens, device=x.device).expand(batch, -1).clone()
    even, odd = prefix + prefix % 2, prefix + 1 - prefix % 2
    best, target = _match(keys, even, odd, *penalties(size, even, odd, saliency, saliency_weight, size_weight))
    of_a, listed = _split(best, r)
    sources, rest = even + 2 * listed[:, -r:, None], even + 2 * listed[:, :-r, None]

    chosen = target.unsqueeze(1).gather(-1, listed[:, None, -r:])  # (B, 1, r)
    share = (chosen == torch.arange(len(range(odd, tokens, 2)), device=x.device).view(1, -1, 1)).float()
    share = share * size.gather(1, sources).transpose(-1, -2)  # (B, odd tokens, r): weight that each token receives
    received = share.sum(-1, keepdim=True)
    grown = size[:, odd::2] + received
    # The weighted average as a step from the target's value, so that a target that receives nothing is unchanged.
    into, arriving = x[:, odd::2].float(), gathered_rows(x, sources).float()
    total = grown.clamp(min=TINY)
    average = into + (share @ arriving - received * into) / total
    if keep_norm:
        norm = _norm(into)
        norm = norm + (share @ _norm(arriving) - received * norm) / total
        average = torch.where(received > 0, average * (norm / _norm(average).clamp(min=TINY)), average)
    merged = torch.cat([x[:, :prefix], gathered_rows(x, rest), average.to(x.dtype)], 1)
    sizes = torch.cat([size[:, :prefix], size.gather(1, rest), grown], 1)
    of_a = torch.where(of_a < rest.shape[1], of_a, rest.shape[1] + target)
    return merged, sizes, places(of_a, rest.shape[1], prefix, tokens)


def with_suffix(
    merge: Callable[..., tuple[Tensor, Tensor, Tensor]],
    x: Tensor,
    keys: Tensor,
    size: Tensor,
    r: int,
    prefix: int,
    suffix: int,
    saliency: Tensor | None = None,
    *pairs: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    """Merge all tokens but the last ``suffix`` by ``merge``, which takes the other arguments; the last ones stay."""
    inner = x.shape[1] - suffix
    saliency = None if saliency is None else saliency[:, :inner]
    merged, sizes, place = merge(x[:, :inner], keys[:, :, :inner], size[:, :inner], r, prefix, 0, saliency, *pairs)
    behind = torch.arange(merged.shape[1], merged.shape[1] + suffix, device=x.device).expand(len(x), -1)
    ends = (torch.cat([merged, x[:, inner:]], 1), torch.cat([sizes, size[:, inner:]], 1))
    return *ends, torch.cat([place, behind], 1)


def gathered_rows(x: Tensor, index: Tensor) -> Tensor:
    """Gather rows: x (B, N, C), index (B, n, 1) -> (B, n, C)."""
    first = x.shape[1] * torch.arange(x.shape[0], device=x.device).view(-1, 1, 1)
    return x.flatten(0, 1).index_select(0, (first + index).flatten()).unflatten(0, index.shape[:2])


def _norm(x: Tensor) -> Tensor:
    return torch.linalg.vector_norm(x, dim=-1, keepdim=True)


def penalties(
    size: Tensor, even: int, odd: int, saliency: Tensor | None, saliency_weight: float, size_weight: float
) -> tuple[Tensor | None, Tensor | None]:
    """Return what the scores of the tokens of A (B, A) and of those of B (B, B) lose; None for nothing."""
    of_a = of_b = None
    if size_weight:
        lost = size_weight * size.detach().squeeze(-1).float().clamp(min=1).log()
        of_a, of_b = lost[:, even::2], lost[:, odd::2]
    if saliency is not None and saliency_weight:
        known = saliency.detach()[:, even::2].float()
        known = torch.where(known.abs() < torch.inf, known, 0.0)  # false for NaN
        of_a = saliency_weight * known if of_a is None else of_a + saliency_weight * known
    return of_a, of_b


def _match(
    keys: Tensor, even: int, odd: int, of_a: Tensor | None = None, of_b: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Return the highest score of each token of A, and the token of B that it is matched with; both (B, A).

    Args:
        keys: (B, heads, N, D).
        even, odd: the first tokens of A and of B.
        of_a, of_b: what their scores lose, see :func:`penalties`.
    """
    # Head by head: Tensor.sum adds some columns in another order, so equal keys would differ where heads cancel.
    total = functools.reduce(torch.add, keys.float().unbind(1))
    metric = F.normalize(total, dim=-1)
    metric = torch.where(metric == metric, metric, 0.0)  # false for NaN
    scores = metric[:, even::2] @ metric[:, odd::2].transpose(-1, -2)
    if of_b is not None:
        scores = scores - of_b.unsqueeze(1)
    best = scores.amax(-1, keepdim=True)
    index = torch.arange(scores.shape[-1], device=scores.device, dtype=torch.float32)
    first = torch.where(scores >= best - TIE, index, scores.shape[-1]).amin(-1)
    best = best.squeeze(-1)
    return best if of_a is None else best - of_a, first.long()


def _split(best: Tensor, r: int) -> tuple[Tensor, Tensor]:
    """Order the tokens of A: first those that stay, then the ``r`` that merge, each part in its old order.

    The cut is found by comparing and counting instead of sorting: Inductor compiles this into a small fused loop.

    Args:
        best: (B, A), finite.

    Returns:
        The new place of each token, and the tokens in their new order; both (B, A) int64.
    """
    higher = (best.unsqueeze(-2) > best.unsqueeze(-1)).sum(-1)
    cut = torch.where(higher < r, best, torch.inf).amin(-1, keepdim=True)
    sure = best > cut + TIE
    near = (best >= cut - TIE) & ~sure
    sure_so_far, near_so_far = torch.stack([sure, near]).cumsum(-1)
    room = r - sure_so_far[:, -1:]
    merged = sure | (near & (near_so_far <= room))
    merged_so_far = sure_so_far + near_so_far.minimum(room)
    index = torch.arange(best.shape[1], device=best.device)
    place = torch.where(merged, best.shape[1] - r - 1 + merged_so_far, index - merged_so_far)
    return place, torch.zeros_like(place).scatter(1, place, index.expand_as(place))


def places(of_a: Tensor, left: int, prefix: int, tokens: int) -> Tensor:
    """Return the new places of all tokens (B, tokens), given those of A after the prefix; ``left`` tokens of A stay."""
    batch, device = of_a.shape[0], of_a.device
    odd = prefix + 1 - prefix % 2
    of_b = left + torch.arange(len(range(odd, tokens, 2)), device=device).expand(batch, -1)
    first, second = (of_b, of_a) if prefix % 2 else (of_a, of_b)
    second = F.pad(second, (0, first.shape[1] - second.shape[1]))
    moved = prefix + torch.stack([first, second], -1).flatten(1)[:, : tokens - prefix]
    return torch.cat([torch.arange(prefix, device=device).expand(batch, -1), moved], 1)


def token_mean(x: Tensor, size: Tensor, start: int, dim: int, keepdim: bool) -> Tensor:
    """Return the mean over the tokens of x along ``dim``, each weighted by the input tokens it represents.

    Args:
        x: (B, ..., T, ...) with T = N - start tokens along ``dim``.
        size: (B, N, 1), the sizes of all N tokens.
        start: number of the first token in x; negative if other tokens, each of size 1, precede the tokens in x.
    """
    shape = [1] * x.dim()
    shape[0], shape[dim] = x.shape[0], x.shape[dim]
    weight = sizes_from(size, start).reshape(shape)
    mean = (x.float() * weight).sum(dim, keepdim=keepdim) / weight.sum(dim, keepdim=keepdim)
    return mean.to(x.dtype)


@without_autocast
def token_follow(table: Tensor, place: Tensor, before: Tensor, size: Tensor, start: int, dim: int, rank: int) -> Tensor:
    """Average a value per input token (a position embedding, a rotary table) over the tokens that merged.

    A merged token represents several similar tokens. Operations that are linear in the value (adding it, rotating by
    it) act on the merged token as on their average.

    Args:
        table: T = N0 - start values along ``dim``; broadcasts to ``rank`` axes, the first of them the batch.
        place: (B, N0): the current place of each input token.
        before: (B, N0, 1) sizes of the input tokens.
        size: (B, N, 1) sizes of the merged tokens.
        start: number of the table's first token.
        dim: the axis of tokens, counted from the last (-1).
        rank: number of axes of the tensor that the table is combined with.

    Returns:
        A tensor of ``rank`` axes: batch B, N - start along ``dim``, the others as in the table.
    """
    count = size.shape[1] - start
    rows = torch.arange(start, start + count, device=place.device).view(1, -1, 1)
    mean = (place[:, start:].unsqueeze(1) == rows) * before[:, start:].transpose(-1, -2)
    mean = mean / size[:, start:].clamp(min=TINY)  # (B, N - start, T)
    table = table.reshape((1,) * (rank - table.dim()) + tuple(table.shape))
    values = table.unsqueeze(-1) if dim == -1 else table.movedim(dim, -2)
    mean = mean.reshape(mean.shape[:1] + (1,) * (values.dim() - 3) + mean.shape[1:])
    result = (mean @ values.float()).to(table.dtype)
    return result.squeeze(-1) if dim == -1 else result.movedim(-2, dim)


def token_spread(x: Tensor, place: Tensor, start: int, dim: int) -> Tensor:
    """Give every input token the value of the merged token that holds it.

    Args:
        x: (B, ..., T, ...) with T = N - start values along ``dim``, one per merged token.
        place: (B, N0): the current place of each input token.
        start: as in :func:`token_mean`.
        dim: the axis of tokens, which is not the first.

    Returns:
        x with N0 - start values along ``dim``.
    """
    index = place[:, max(start, 0) :] - start
    if start < 0:
        index = torch.cat([torch.arange(-start, device=place.device).expand(len(place), -1), index], 1)
    shape = [1] * x.dim()
    shape[0], shape[dim] = index.shape
    sizes = [*x.shape[:dim], index.shape[1], *x.shape[dim + 1 :]]
    return x.gather(dim, index.reshape(shape).expand(sizes))
