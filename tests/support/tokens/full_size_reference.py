"""Token merging without removing a token, written only from the conventions and sharing no code with the product.

The model runs unchanged, in eager mode, on all of its input tokens. To merge is to overwrite: each token of a group is
replaced by the mean of the group. Every op that follows (a convolution on the grid, pooling, a mean, attention with as
many equal keys as a merged token has parts) then does by itself what merging has to arrive at with fewer tokens. Only
what differs within a group is averaged here: tables of one value per token, and biases for pairs of tokens.

This suits models whose tokens return to a grid, with several stages, or with streams of shape (B, C, H, W).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from tests.support.merging_reference import ADD, MUL, Members, Undecided, merge_one

__all__ = ["Undecided", "forward"]

IN_PLACE = {name: torch.add if name in ADD else torch.mul for name in ("add_", "__iadd__", "mul_", "__imul__")}


def _as_tokens(x: Tensor, count: int) -> Tensor:
    """Return (B, N, C), (B, C, H, W) or (B, H, W, C) as (B, N, C)."""
    if x.dim() == 3:
        return x
    return x.flatten(2).transpose(1, 2) if x.shape[2] * x.shape[3] == count else x.flatten(1, 2)


def _like(tokens: Tensor, x: Tensor) -> Tensor:
    """Return (B, N, C) in the layout of ``x``."""
    grid = x.dim() == 4 and x.shape[2] * x.shape[3] == tokens.shape[1]
    return (tokens.transpose(1, 2) if grid else tokens).reshape(x.shape)


def _count(x: Tensor, counts: Iterable[int]) -> int | None:
    """Return the number of tokens of a stream's tensor, which is one of ``counts``."""
    found = {3: [x.shape[1]], 4: [x.shape[2] * x.shape[-1], x.shape[1] * x.shape[2]]}.get(x.dim(), [])
    return next((count for count in found if count in counts), None)


def _grouped(x: Tensor, groups: Sequence[Members], axis: int) -> Tensor:
    """Average x over the tokens of every group, along an axis of input tokens."""
    x = x.expand(len(groups), *x.shape[1:]).movedim(axis, 1)
    result = torch.empty_like(x)
    for out, sample, members in zip(result, x, groups, strict=True):
        for group in members:
            out[group] = sample[group].double().mean(0).to(x.dtype)
    return result.movedim(1, axis)


class Merging(TorchFunctionMode):
    """Merges ``r`` tokens at every site: where a block adds its attention over all of its tokens to its input.

    Args:
        blocks: the modules that hold sites.
        streams: for every site in the order of execution, the number of its stream; None if nothing merges there.
        prefixes: for every stream, its tokens in front that never merge.
    """

    def __init__(
        self, blocks: Iterable[nn.Module], r: int, streams: Sequence[int | None], prefixes: Sequence[int]
    ) -> None:
        super().__init__()
        self.r, self.streams, self.prefixes, self.site = r, list(streams), list(prefixes), 0
        self.groups: dict[int, list[Members]] = {}
        self.entered: list[torch.Size] = []
        self.keys: list[Tensor] = []
        self.product: Tensor | None = None  # of queries and keys, scaled, in attention that is written out
        self.weights: Tensor | None = None  # its result
        self.handles = [block.register_forward_pre_hook(self._enter) for block in blocks]

    def __exit__(self, *args: Any) -> None:
        for handle in self.handles:
            handle.remove()
        super().__exit__(*args)

    def _enter(self, _: nn.Module, args: tuple[Any, ...]) -> None:
        self.keys = []
        self.entered = [x.shape for x in args if isinstance(x, Tensor)]

    def merge(self, x: Tensor) -> Tensor:
        keys = torch.cat(self.keys, 1)
        count, stream = keys.shape[2], self.streams[self.site]
        self.keys = []
        self.site += 1
        if stream is None:
            return x
        tokens, metric = _as_tokens(x, count), keys.float().mean(1)
        before = self.groups.get(stream) or [[[i] for i in range(count)] for _ in tokens]
        tokens, metric = _grouped(tokens, before, 1), _grouped(metric, before, 1)
        result, self.groups[stream] = tokens.clone(), []
        for out, sample, members, m in zip(result, tokens, before, metric, strict=True):
            first = [group[0] for group in members]
            rows, groups = merge_one(sample[first], members, [1.0] * count, m[first], self.r, self.prefixes[stream])
            for row, group in zip(rows, groups, strict=True):
                out[group] = row
            self.groups[stream].append(groups)
        return _like(result, x)

    def known(self, count: int) -> Iterable[list[Members]]:
        """Yield the groups of every stream of ``count`` tokens, with or without its tokens in front."""
        for stream, groups in self.groups.items():
            start = sum(map(len, groups[0])) - count
            if start in (0, self.prefixes[stream]):
                yield [[[m - start for m in group] for group in sample[start:]] for sample in groups]

    def equal(self, x: Tensor, axis: int) -> list[Members] | None:
        """Return the groups over whose tokens x is equal along an axis; None if there are none."""
        for groups in self.known(x.shape[axis]):
            same = len(groups) == len(x) and (_grouped(x, groups, axis) - x).abs().max() <= 1e-4 * x.abs().max()
            if bool(same):
                return groups
        return None

    def added(self, result: Tensor, operands: Sequence[Tensor]) -> Tensor:
        """Average over groups a value per token that has been added to merged tokens."""
        for count in {result.shape[1], math.prod(result.shape[2:]), math.prod(result.shape[1:3])}:
            if _count(result, [count]):
                tokens = [_as_tokens(x, count) for x in operands]
                groups = [self.equal(x, 1) for x in tokens]
                if sum(g is None for g in groups) == 1:
                    held = next(g for g in groups if g is not None)
                    return _like(_grouped(_as_tokens(result, count), held, 1), result)
        return result

    def bias(self, table: Tensor, product: Tensor) -> Tensor:
        """Return a bias (B, heads, Q, N) whose values are equal where queries and keys are, as ``product`` has them.

        Softmax makes priors of a row. A merged key has the sum of its parts', a merged query the mean of them.
        """
        table = table.reshape((1,) * (4 - table.dim()) + tuple(table.shape))
        prior = table.double().softmax(-1)
        for axis in (3, 2):
            groups = self.equal(product, axis)
            prior = _grouped(prior, groups, axis) if groups else prior
        return prior.log().to(product.dtype)

    def attention(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float | None) -> Tensor:
        if q.shape[-2] == k.shape[-2]:
            self.keys.append(k)
        logits = q @ k.transpose(-1, -2) * (1 / math.sqrt(q.shape[-1]) if scale is None else scale)
        if mask is not None:
            logits = logits + self.bias(mask, logits)
        return logits.softmax(-1) @ v

    def written_out(self, logits: Tensor) -> Tensor:
        product, self.product = self.product, None
        if product is not None and product is not logits and product.shape == logits.shape:
            logits = product + self.bias(logits - product, product)
        self.weights = logits.softmax(-1)
        return self.weights

    def written(self, x: Tensor, func: Callable[..., Any], args: Any, kwargs: Any) -> Tensor:
        """Add to or multiply ``x`` in place, once the sum or product of both operands as they were is known."""
        scores = x is self.product
        before = x.clone() if scores else x
        self.product = before if scores else self.product
        result = self.__torch_function__(func, (), (before, *args), kwargs)
        x.copy_(result)
        if scores and self.product is result:
            self.product = x
        return x

    def table(self, x: Tensor, table: Tensor) -> Tensor:
        """Average a table of one row per input token, (..., N, D), that multiplies x (B, ..., N, D)."""
        rows = table.shape[-2] if table.dim() > 1 else 1
        if rows != x.shape[-2] or not 2 <= table.dim() <= x.dim() or table.shape == x.shape:
            return table
        groups = self.equal(x, x.dim() - 2)
        if groups is None:
            return table
        table = table.reshape((1,) * (x.dim() - table.dim()) + tuple(table.shape))
        return _grouped(table, groups, x.dim() - 2)

    def __torch_function__(self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        if func is F.scaled_dot_product_attention:
            mask = args[3] if len(args) > 3 else kwargs.get("attn_mask")
            return self.attention(*args[:3], mask, kwargs.get("scale"))
        tensors = [a for a in args if isinstance(a, Tensor)]
        if name == "softmax" and args[0].dim() == 4 and args[0].shape[-1] == args[0].shape[-2]:
            return self.written_out(args[0])
        if name in MUL and len(tensors) == 2 and tensors[0].dim() > 2:
            args = (args[0], self.table(*args))
        if name in IN_PLACE and isinstance(args[0], Tensor):
            return self.written(args[0], IN_PLACE[name], args[1:], kwargs)
        result = func(*args, **kwargs)
        if name in ("matmul", "__matmul__") and result.dim() == 4 and result.shape[-1] == result.shape[-2]:
            if self.weights is None or self.weights.data_ptr() not in [t.data_ptr() for t in tensors]:
                self.keys.append(args[1].transpose(-1, -2))
                self.product = result
        elif name in MUL and any(a is self.product for a in tensors):
            self.product = result
        elif name in ADD and [t.shape for t in tensors] == [result.shape] * 2 and result.dim() in (3, 4):
            if self.keys and result.shape in self.entered and _count(result, [self.keys[-1].shape[2]]):
                return self.merge(result)
            return self.added(result, tensors)
        return result


def forward(
    model: nn.Module,
    images: Tensor,
    r: int,
    streams: Sequence[int | None],
    prefixes: Sequence[int],
    blocks: Iterable[nn.Module],
) -> Tensor:
    """Return the output of a model with ``r`` tokens merged at every site."""
    with Merging(blocks, r, streams, prefixes) as mode:
        output = model(images)
    assert mode.site == len(streams), f"{mode.site} sites, not {len(streams)}"
    return output
