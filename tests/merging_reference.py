"""Token merging in eager mode, written from the conventions alone and sharing no code with the product.

One token at a time, in Python: slow and plain. Works on timm's VisionTransformer with LayerScale and qk-norm.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn


def merge_one(x: Tensor, size: Tensor, metric: Tensor, r: int, prefix: int) -> tuple[Tensor, Tensor]:
    """x (N, C), size (N,), metric (N, D) of one sample -> merged x and size."""
    count = len(x)
    r = min(r, (count - prefix) // 2)
    metric = metric / metric.norm(dim=-1, keepdim=True)
    sources = [i for i in range(prefix, count) if i % 2 == 0]
    targets = [i for i in range(prefix, count) if i % 2 == 1]
    edges = []
    for a in sources:
        scores = [float((metric[a] @ metric[b]).detach()) for b in targets]
        best = max(range(len(targets)), key=lambda k: (scores[k], -k))
        edges.append((scores[best], a, targets[best]))
    chosen = sorted(edges, key=lambda edge: (-edge[0], edge[1]))[:r]
    gone = {a for _, a, _ in chosen}
    total = {b: x[b] * size[b] for b in targets}
    weight = {b: size[b] for b in targets}
    for _, a, b in sorted(chosen, key=lambda edge: edge[1]):
        total[b] = total[b] + x[a] * size[a]
        weight[b] = weight[b] + size[a]
    rows = [x[i] for i in range(prefix)] + [x[a] for a in sources if a not in gone]
    rows += [total[b] / weight[b] for b in targets]
    sizes = [size[i] for i in range(prefix)] + [size[a] for a in sources if a not in gone]
    sizes += [weight[b] for b in targets]
    return torch.stack(rows), torch.stack(sizes)


def forward(model: nn.Module, images: Tensor, r: int, prefix: int) -> Tensor:
    """Logits of a timm VisionTransformer with ``r`` tokens merged in every block."""
    x = model.norm_pre(model._pos_embed(model.patch_embed(images)))
    size = torch.ones(x.shape[:2], dtype=x.dtype)
    for block in model.blocks:
        attention = block.attn
        b, n, c = x.shape
        qkv = attention.qkv(block.norm1(x)).reshape(b, n, 3, attention.num_heads, -1).permute(2, 0, 3, 1, 4)
        q, k, v = attention.q_norm(qkv[0]), attention.k_norm(qkv[1]), qkv[2]
        logits = q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1]) + size.log()[:, None, None, :]
        y = (logits.softmax(-1) @ v).transpose(1, 2).reshape(b, n, c)
        x = x + block.ls1(attention.proj(y))
        merged = [merge_one(x[i], size[i], k[i].mean(0), r, prefix) for i in range(b)]
        x, size = torch.stack([m[0] for m in merged]), torch.stack([m[1] for m in merged])
        x = x + block.ls2(block.mlp(block.norm2(x)))
    x = model.norm(x)
    if model.global_pool == "avg":
        tokens, weight = x[:, prefix:], size[:, prefix:, None]
        return model.head(model.fc_norm((tokens * weight).sum(1) / weight.sum(1)))
    if getattr(model, "head_dist", None) is not None:
        return (model.head(x[:, 0]) + model.head_dist(x[:, 1])) / 2
    return model.head(model.fc_norm(x[:, 0]))
