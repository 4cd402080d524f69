"""Token merging in eager mode, written only from the conventions and sharing no code with the product.

The model runs unchanged under a function mode that tracks the input tokens that every token represents. The mode merges
tokens where a block adds its attention to its input, one token at a time in Python, and weighs attention, mean pooling
and tables of one value per input token accordingly. Slow and plain.

Similarities that differ by at most ``EQUAL`` count as equal, and the lower index wins. If a difference is so close to
that bound that rounding decides, the right answer is unknown, and ``Undecided`` is raised: choose other inputs.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map

Members = list[list[int]]  # for every token of one sample, the input tokens that it represents
ADD = ("add", "add_", "__add__", "__radd__", "__iadd__")
MUL = ("mul", "mul_", "__mul__", "__rmul__", "__imul__")
EQUAL = 1 / 4096
ROUNDING = 2e-6  # larger than the change of a similarity by fp32 rounding of the keys of a few blocks


@dataclass(frozen=True)
class Terms:
    """What the score of a pair takes into account besides cosines; the defaults are ToMe's.

    ``tokens``: compare the tokens, not their keys. ``saliency``: weight of the attention of the tokens ``rows`` to the
    token that goes, times the number of tokens. ``size``: weight of the log of both sizes. ``norm``: a merged token has
    the mean norm of its parts.
    """

    tokens: bool = False
    saliency: float = 0.0
    rows: tuple[int, ...] = ()
    size: float = 0.0
    norm: bool = False


TOME = Terms()


class Undecided(Exception):
    """Rounding decides which tokens merge."""


def _decided(differences: Iterable[float]) -> None:
    nearest = min(abs(difference - EQUAL) for difference in differences)
    if nearest < ROUNDING:
        raise Undecided(f"a similarity is {nearest:.1g} from the bound below which two are equal; choose another seed")


def merge_one(
    x: Tensor,
    members: Members,
    weights: Sequence[float],
    metric: Tensor,
    r: int,
    prefix: int,
    terms: Terms = TOME,
    saliency: Sequence[float] | None = None,
) -> tuple[Tensor, Members]:
    """Merge x (N, C) of one sample by its metric (N, D); return it and the input tokens that each token represents.

    ``weights``: weights of the input tokens. ``saliency``: of each token, relative to the average token's.
    """
    count = len(x)
    r = min(r, (count - prefix) // 2)
    if r <= 0:
        return x, members
    unit = F.normalize(metric.double(), dim=-1)
    scores = (unit @ unit.T).tolist()
    sources = [i for i in range(prefix, count) if i % 2 == 0]
    targets = [i for i in range(prefix, count) if i % 2 == 1]
    log = [math.log(max(1.0, sum(weights[m] for m in group))) for group in members]
    for a in sources:
        spared = 0.0 if saliency is None else terms.saliency * saliency[a]
        for t in targets:
            scores[a][t] -= spared + terms.size * (log[a] + log[t])
    edges = []
    for a in sources:
        best = max(scores[a][t] for t in targets)
        _decided(best - scores[a][t] for t in targets)
        edges.append((best, a, next(t for t in targets if best - scores[a][t] <= EQUAL)))
    last = sorted((best for best, _, _ in edges), reverse=True)[r - 1]
    _decided(abs(best - last) for best, _, _ in edges)
    above = [(a, b) for best, a, b in edges if best - last > EQUAL]
    level = [(a, b) for best, a, b in edges if abs(best - last) <= EQUAL]
    chosen = dict([*above, *level][:r])
    order = [*range(prefix), *[a for a in sources if a not in chosen], *targets]
    rows, stand_for = [], []
    for token in order:
        group = [token, *[a for a, b in chosen.items() if b == token]]
        sizes = [sum(weights[m] for m in members[i]) for i in group]
        total = sum(x[i].double() * size for i, size in zip(group, sizes, strict=True))
        mean = total / sum(sizes) if sum(sizes) > 0 else x[token].double()
        if terms.norm and sum(sizes) > sizes[0]:
            norm = sum(x[i].double().norm() * size for i, size in zip(group, sizes, strict=True)) / sum(sizes)
            mean = mean * (norm / mean.norm())
        rows.append(mean)
        stand_for.append([m for i in group for m in members[i]])
    return torch.stack(rows).to(x.dtype), stand_for


class Merging(TorchFunctionMode):
    """Merges ``r[i]`` tokens in block ``i`` of the model that runs inside."""

    def __init__(
        self,
        blocks: Sequence[nn.Module],
        r: Sequence[int],
        prefix: int,
        proportional: bool = True,
        suffix: int = 0,
        terms: Terms = TOME,
    ) -> None:
        super().__init__()
        self.terms = terms
        self.attended: list[list[list[float]]] = []  # attention of the block -> sample -> saliency of each token
        self.r, self.prefix, self.proportional, self.suffix = list(r), prefix, proportional, suffix
        self.by_count: dict[int, Members] = {}  # number of merged tokens -> what they represented
        self.members: list[Members] | None = None
        self.weights: list[list[float]] = []  # per input token: 0 if a mask hides it, else 1
        self.inputs = 0
        self.block, self.entered = -1, None
        self.keys: list[Tensor] = []
        self.handles = [block.register_forward_pre_hook(self._enter) for block in blocks]

    def _enter(self, _: nn.Module, args: tuple[Any, ...]) -> None:
        self.block, self.entered, self.keys, self.attended = self.block + 1, args[0], [], []

    def __exit__(self, *args: Any) -> None:
        for handle in self.handles:
            handle.remove()
        super().__exit__(*args)

    def sizes(self, count: int) -> Tensor | None:
        """Sizes of the last ``count`` tokens as (B, count), 1 for prefix tokens; None before the first merge."""
        if self.members is None:
            return None
        rows = [
            [sum(weights[m] for m in group) for group in sample]
            for sample, weights in zip(self.members, self.weights, strict=True)
        ]
        return torch.tensor([[1.0] * (count - len(row)) + row[max(0, len(row) - count) :] for row in rows])

    def average(self, table: Tensor, like: Tensor) -> Tensor:
        """Average a table of one value per input token along its axis of tokens, for every sample of ``like``."""
        assert self.members is not None
        table = table.reshape((1,) * (like.dim() - table.dim()) + tuple(table.shape))
        pairs = zip(table.shape, like.shape, strict=True)
        (axis,) = [i for i, (a, b) in enumerate(pairs) if i > 0 and 1 != a != b]
        start = self.inputs - table.shape[axis]
        samples = []
        for number, sample in enumerate(self.members):
            own = table[number : number + 1] if len(table) > 1 else table
            own = own.movedim(axis, 0)
            rows = [own[[m - start for m in group]].mean(0) for group in sample[start:]]
            samples.append(torch.stack(rows).movedim(0, axis))
        assert samples[0].shape[axis] == like.shape[axis]
        return torch.cat(samples)

    def merge(self, x: Tensor) -> Tensor:
        """Merge the tokens of the sum that ends a block's attention."""
        if self.members is None:
            self.inputs = x.shape[1]
            self.members = [[[i] for i in range(x.shape[1])] for _ in x]
            self.weights = self.weights or [[1.0] * x.shape[1] for _ in x]
        metric = x.detach() if self.terms.tokens else torch.cat([k.detach().float() for k in self.keys], 1).mean(1)
        salient = (
            [None] * len(x)
            if not self.attended
            else [
                [sum(each) / len(each) for each in zip(*heads, strict=True)]
                for heads in zip(*self.attended, strict=True)
            ]
        )
        self.entered, self.keys, self.attended = None, [], []
        merged = []
        for sample, members, weights, m, s in zip(x, self.members, self.weights, metric, salient, strict=True):
            end = len(sample) - self.suffix  # of the tokens that may merge
            r = self.r[self.block]
            inner = merge_one(sample[:end], members[:end], weights, m[:end], r, self.prefix, self.terms, s)
            merged.append((torch.cat([inner[0], sample[end:]]), [*inner[1], *members[end:]]))
        self.members = [members for _, members in merged]
        self.by_count[len(self.members[0])] = self.members
        return torch.stack([sample for sample, _ in merged])

    def spread(self, values: Any) -> Any:
        """Return values per merged token as values per input token."""
        if not isinstance(values, Tensor) or values.dim() < 3 or values.shape[1] not in self.by_count:
            return values
        result = values.new_empty(len(values), self.inputs, *values.shape[2:])
        for sample, groups in enumerate(self.by_count[values.shape[1]]):
            for token, group in enumerate(groups):
                result[sample, group] = values[sample, token]
        return result

    def multi_head(self, query: Tensor, key: Tensor, value: Tensor, heads: int, weight: Tensor, bias: Tensor) -> Tensor:
        """Return what the heads of ``multi_head_attention_forward`` yield, (L, B, C), before the output projection."""
        parts = zip((query, key, value), weight.chunk(3), bias.chunk(3), strict=True)
        q, k, v = (F.linear(x, w, b).unflatten(-1, (heads, -1)).permute(1, 2, 0, 3) for x, w, b in parts)
        if q.shape[-2] == k.shape[-2]:
            self.keys.append(k)
        return self.attention(q, k, v).permute(2, 0, 1, 3).flatten(2)

    def attention(self, q: Tensor, k: Tensor, v: Tensor, scale: float | None = None) -> Tensor:
        logits = q @ k.transpose(-1, -2) * (1 / math.sqrt(q.shape[-1]) if scale is None else scale)
        return self.softmax(logits) @ v

    def softmax(self, logits: Tensor) -> Tensor:
        size = self.sizes(logits.shape[-1]) if self.proportional else None
        if size is not None:
            logits = logits + size.log().to(logits.dtype)[:, None, None, :]
        if self.terms.rows and logits.shape[-1] == logits.shape[-2]:
            self._attend(logits.detach().double(), size)
        return logits.softmax(-1)

    def _attend(self, logits: Tensor, size: Tensor | None) -> None:
        """Note the attention to each token of one attention of the block, by the number of tokens."""
        rows, heads, count = self.terms.rows, logits.shape[1], logits.shape[-1]
        samples = []
        for number, sample in enumerate(logits):
            total = [0.0] * count
            for head in sample:
                for row in rows:
                    for token, weight in enumerate(head[row].softmax(0).tolist()):
                        total[token] += weight / (heads * len(rows))
            if size is not None:
                total = [t / s if s > 0 else 0.0 for t, s in zip(total, size[number].tolist(), strict=True)]
            samples.append([count * t for t in total])
        self.attended.append(samples)

    def __torch_function__(self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        if func is F.scaled_dot_product_attention:
            q, k, v = args[:3]
            if q.shape[-2] == k.shape[-2]:
                self.keys.append(k)
            mask = kwargs.get("attn_mask")
            if mask is not None and self.members is None:
                self.weights = mask[:, 0, 0].float().tolist()
                if self.terms.rows:
                    logits = q.detach().double() @ k.detach().double().transpose(-1, -2) / math.sqrt(q.shape[-1])
                    shown = mask[:, 0, 0].double()
                    self._attend(logits + shown.log()[:, None, None], shown)
                return func(*args, **kwargs)
            return self.attention(q, k, v, kwargs.get("scale"))
        if func is F.multi_head_attention_forward:
            query, key, value, _, heads, weight, bias, *rest = args
            return F.linear(self.multi_head(query, key, value, heads, weight, bias), rest[4], rest[5]), None
        if name == "split" and self.members is not None and kwargs.get("dim") == -2:
            # Prefix tokens from patches, whose number DINOv3 takes from a table.
            return func(args[0], (self.prefix, args[0].shape[-2] - self.prefix), dim=-2)
        if name in ("softmax", "__matmul__", "matmul") and args[0].dim() == 4:
            if name == "softmax":
                return self.softmax(args[0])
            if args[0].shape[-2] == args[1].shape[-1]:
                self.keys.append(args[1].transpose(-1, -2))
        if name == "mean" and args[0].dim() == 3 and (args[1:] == (1,) or kwargs == {"dim": 1}):
            size = self.sizes(args[0].shape[1])
            if size is not None:
                size = size.to(args[0].dtype)
                return (args[0] * size[..., None]).sum(1) / size.sum(1, keepdim=True)
        if name in ADD + MUL and self.members is not None and all(isinstance(a, Tensor) for a in args):
            x, table = args
            ends = zip(reversed(table.shape), reversed(x.shape[1:]), strict=False)
            if table.dim() <= x.dim() >= 3 and any(1 != a != b for a, b in ends):
                args = (x, self.average(table, x))
        result = func(*args, **kwargs)
        if name in ADD and self.keys and any(a is self.entered for a in args) and result.dim() == 3:
            return self.merge(result)
        return result


def forward(
    model: nn.Module,
    images: Tensor,
    r: int | Sequence[int],
    prefix: int,
    blocks: Iterable[nn.Module] | None = None,
    proportional: bool = True,
    suffix: int = 0,
    terms: Terms = TOME,
    **inputs: Any,
) -> Any:
    """Return the output of a transformer, timm's unless ``blocks`` are given, with ``r`` tokens merged in every block.

    A value per token is returned for every input token.
    """
    blocks = list(model.blocks if blocks is None else blocks)
    r = [r] * len(blocks) if isinstance(r, int) else r
    with Merging(blocks, r, prefix, proportional, suffix, terms) as mode:
        output = model(images, **inputs)
    return output if isinstance(output, Tensor) and output.dim() < 3 else tree_map(mode.spread, output)
