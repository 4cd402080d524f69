"""Mask: choose N of every M values of each eligible weight, and freeze the choice into the graph.

Scores (method: sections 4 and 6). Magnitude keeps the N largest |w|. Covariance minimises, in each group, the output
error r' C r of the removed values r on the calibration data: patterns with few masks (2:4) try them all; others start
from the largest w_j^2 C_jj and exchange one kept for one removed value as long as the best such exchange helps.
"""

from __future__ import annotations

import fnmatch
import itertools
import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from mpcompile.config import ROLES
from mpcompile.errors import NotEligibleError
from mpcompile.graph import IRModule, LayerOp, argument, element_count, layers, set_attribute, unsupported
from mpcompile.kernels import ops
from mpcompile.kernels.nm_format import Pattern, check_nm, from_rows, group_axis, to_rows
from mpcompile.layers import MaskedConv2d, MaskedLinear
from mpcompile.passes.base import Context, Pass
from mpcompile.plan import LayerPlan
from mpcompile.roles import roles

_FEW_MASKS = 8  # up to so many masks a group (2:4 has 6), all are tried
_CHUNK = 1 << 22  # values per chunk of the vectorised searches: 16 MiB per temporary


def top_n(score: Tensor, n: int) -> Tensor:
    """The ``n`` largest of the last axis as a boolean mask; ties go to the lower index."""
    order = score.argsort(dim=-1, descending=True, stable=True)
    return torch.zeros_like(score, dtype=torch.bool).scatter_(-1, order[..., :n], True)


def magnitude_mask(weight: Tensor, pattern: Pattern) -> Tensor:
    """Boolean mask of the weight's shape that keeps the largest |w| of every group.

    Example:
        >>> magnitude_mask(torch.tensor([[1.0, -3.0, 2.0, 0.0]]), Pattern(2, 4)).tolist()
        [[False, True, True, False]]
    """
    rows = to_rows(weight.detach())
    groups = rows.abs().unflatten(-1, (-1, pattern.m)).reshape(-1, pattern.m)
    kept = torch.cat([top_n(part, pattern.n) for part in groups.split(max(1, _CHUNK // pattern.m))])
    return from_rows(kept.reshape(rows.shape), weight.shape)


def _swap(u: Tensor, c: Tensor, kept: Tensor) -> Tensor:
    """Best-improvement exchanges until none helps. u (G, M), c (G, M, M), kept (G, M) with N set -> kept."""
    kept = kept.clone()
    active = torch.arange(len(u), device=u.device)
    floor = 1e-7 * (u.square() * c.diagonal(dim1=-2, dim2=-1)).sum(-1)  # below this, an exchange is rounding
    for _ in range(u.shape[1]):
        v, k, ca = u[active], kept[active], c[active]
        g = torch.einsum("gij,gj->gi", ca, v * ~k)  # C r
        own = v.square() * ca.diagonal(dim1=-2, dim2=-1)
        remove, restore = 2 * v * g + own, own - 2 * v * g
        delta = remove[:, :, None] + restore[:, None, :] - 2 * v[:, :, None] * v[:, None, :] * ca
        delta.masked_fill_(~(k[:, :, None] & ~k[:, None, :]), torch.inf)
        best, where = delta.flatten(1).min(-1)
        better = best < -floor[active]
        active, where = active[better], where[better]
        if not len(active):
            break
        kept[active, where // u.shape[1]] = False
        kept[active, where % u.shape[1]] = True
    return kept


def _enumerate(u: Tensor, c: Tensor, n: int) -> Tensor:
    """The best of all masks, for patterns with few of them. u (G, M), c (G, M, M) -> kept (G, M)."""
    m = u.shape[1]
    kept = torch.zeros(math.comb(m, n), m, dtype=torch.bool, device=u.device)
    for row, places in zip(kept, itertools.combinations(range(m), n), strict=True):
        row[list(places)] = True
    removed = (~kept).to(u.dtype)
    pairs = (removed[:, :, None] * removed[:, None, :]).flatten(1)
    cost = (u[:, :, None] * u[:, None, :] * c).flatten(1) @ pairs.T  # r' C r of each mask
    return kept[cost.argmin(-1)]


def covariance_mask(weight: Tensor, moments: Tensor, pattern: Pattern) -> Tensor:
    """Boolean mask that keeps ``pattern.n`` of every group so that r' C r is least (up to single exchanges).

    Args:
        weight: (out, in) or (out, in / groups, kh, kw).
        moments: (groups, K / m, m, m), second moments of the inputs of each group of columns in the execution layout,
            for each of the convolution's groups (1 for linear layers).

    Source: arXiv 2606.02608, the projection cost; search as in method section 4 (a).
    """
    rows = to_rows(weight.detach()).float()
    moments = moments.to(rows.device, torch.float32)
    parts = []
    for block, c in zip(rows.chunk(len(moments)), moments, strict=True):
        groups = block.unflatten(-1, (-1, pattern.m))
        for part in groups.split(max(1, _CHUNK // (groups.shape[1] * pattern.m * pattern.m))):
            u = part.reshape(-1, pattern.m)
            each = c.expand(len(part), -1, -1, -1).reshape(-1, pattern.m, pattern.m)
            if math.comb(pattern.m, pattern.n) <= _FEW_MASKS:
                kept = _enumerate(u, each, pattern.n)
            else:
                kept = _swap(u, each, top_n(u.square() * each.diagonal(dim1=-2, dim2=-1), pattern.n))
            parts.append(kept.reshape(part.shape))
    return from_rows(torch.cat(parts).flatten(1), weight.shape)


def _matches(name: str, role: str | None, words: Iterable[str]) -> bool:
    return any(word == role if word in ROLES and word != name else fnmatch.fnmatch(name, word) for word in words)


class Mask(Pass):
    """N:M masks on every eligible layer; see :class:`mpcompile.Config` for what is excluded."""

    name = "mask"

    def _reason(self, layer: LayerOp, role: str | None, ctx: Context) -> str | None:
        """Why a layer stays dense, or None."""
        config = ctx.config
        wanted = _matches(layer.name, role, config.include)
        if config.pattern == "dense":
            return "pattern is dense"
        if layer.obstacle:
            return layer.obstacle
        if not wanted and role in config.exclude:
            return str(role)
        if not wanted and _matches(layer.name, role, config.exclude):
            return "excluded"
        weight = layer.weight.tensor
        if config.pattern_for(weight) is None:
            return f"K % {config.patterns(weight.device, weight.dtype)[-1].m} (K = {group_axis(weight.shape)})"
        return None

    def plan(self, gm: IRModule, ctx: Context) -> dict[str, Any]:
        config, role = ctx.config, roles(gm, ctx.lifted)
        decision: dict[str, Any] = {"pattern": config.pattern, "masked": {}, "patterns": {}, "dense": {}}
        devices = set()
        for layer in layers(gm, ctx.lifted):
            if layer.name in decision["masked"]:
                continue
            if layer.pattern is not None:
                decision["dense"][layer.name] = "already masked"
                continue
            weight = layer.weight.tensor
            devices.add(weight.device)
            reason = self._reason(layer, role.get(layer.name), ctx)
            if reason is None:
                has_data = config.score == "covariance" and layer.name in ctx.moments
                decision["patterns"][layer.name] = str(config.pattern_for(weight))
                decision["masked"][layer.name] = "covariance" if has_data else "magnitude"
            else:
                decision["dense"][layer.name] = reason
        for name, (_, why) in unsupported(gm, ctx.lifted).items():
            decision["dense"].setdefault(name, why)
        self._check_named(decision, ctx)
        done = decision["masked"] or "already masked" in decision["dense"].values()
        if config.pattern != "dense" and not done:
            reasons = sorted({f"{v}" for v in decision["dense"].values()})
            least = min(config.patterns(device)[-1].m for device in devices or {torch.device("cpu")})
            raise NotEligibleError(
                f"no layer can be masked {config.pattern}",
                expected=f"a linear or convolution layer whose inputs divide by {least}",
                found=("; ".join(reasons) or "a model without linear or 2-d convolution layers"),
                hint="choose another pattern, a narrower exclude, or pattern='dense'",
            )
        fell_back = sum(v == "magnitude" for v in decision["masked"].values())
        decision["fell_back"] = fell_back if config.score == "covariance" else 0
        return decision

    def _check_named(self, decision: dict[str, Any], ctx: Context) -> None:
        everything = {**decision["masked"], **decision["dense"]}
        for word in ctx.config.include:
            if word in ROLES or any(c in word for c in "*?["):
                continue
            if word not in everything:
                raise NotEligibleError(
                    "include names a layer that isn't in the graph",
                    layer=word,
                    hint=f"the layers are {', '.join(list(everything)[:8])}, ...",
                )
            if word in decision["dense"] and ctx.config.pattern != "dense":
                raise NotEligibleError(
                    f"this layer can't be masked {ctx.config.pattern}",
                    layer=word,
                    expected="a layer that can, when include names it",
                    found=decision["dense"][word],
                    hint="take it out of include, or choose another pattern",
                )

    def summary(self, decision: dict[str, Any]) -> str:
        patterns = list(decision["patterns"].values())
        parts = [f"{patterns.count(p)} layers {p}" for p in dict.fromkeys(patterns)]
        text = ", ".join([*(parts or [f"0 layers {decision['pattern']}"]), f"{len(decision['dense'])} dense"])
        if decision["fell_back"]:
            text += f"; no calibration data for {decision['fell_back']}: score is magnitude"
        return text

    @torch.no_grad()
    def apply(self, gm: IRModule, decision: dict[str, Any], ctx: Context) -> bool:
        shapes = {name: shape for name, (shape, _) in unsupported(gm, ctx.lifted).items()}
        found: dict[str, list[LayerOp]] = {}
        for layer in layers(gm, ctx.lifted):
            found.setdefault(layer.name, []).append(layer)
        for name, reason in decision["dense"].items():
            if name not in found:
                ctx.plan.layers[name] = LayerPlan("other", shapes[name], reason=reason)
                continue
            layer = found[name][0]
            entry = ctx.plan.layers.setdefault(name, LayerPlan(layer.kind, tuple(layer.weight.tensor.shape)))
            if reason != "already masked":
                entry.reason = reason
        for name, score in decision["masked"].items():
            uses, pattern = found[name], Pattern.parse(decision["patterns"][name])
            weight = uses[0].weight.tensor
            mask = ctx.masks.get(name)
            if mask is None or mask.shape != weight.shape:
                mask = (
                    covariance_mask(weight, ctx.moments[name], pattern)
                    if score == "covariance"
                    else magnitude_mask(weight, pattern)
                )
                ctx.masks[name] = mask = mask.contiguous()
            energy = weight.detach().square()  # before the masked values are set to zero
            kept = float((energy * mask).sum() / energy.sum().clamp(min=1e-30))
            for use in uses:
                self._mask_use(gm, use, mask, pattern, ctx)
            entry = ctx.plan.layers.setdefault(name, LayerPlan(uses[0].kind, tuple(weight.shape)))
            entry.pattern, entry.density, entry.reason = str(pattern), pattern.density, None
            entry.notes["mask"] = {"score": score, "kept_energy": kept}
        return bool(decision["masked"])

    def _mask_use(self, gm: IRModule, use: LayerOp, mask: Tensor, pattern: Pattern, ctx: Context) -> None:
        node, geometry = use.node, use.geometry
        if node.op == "call_module":
            module = gm.get_submodule(use.name)
            if isinstance(module, (MaskedLinear, MaskedConv2d)):  # an earlier use of a shared layer
                return
            masked: MaskedLinear | MaskedConv2d
            if isinstance(module, torch.nn.Conv2d):
                masked = MaskedConv2d.from_conv(module, mask, pattern)
            else:
                masked = MaskedLinear.from_linear(module, mask, pattern)  # type: ignore[arg-type]
            set_attribute(gm, use.name, masked)
            if ctx.owned:
                masked.apply_mask()
            return
        if use.weight.node is not None and use.weight.node.op == "get_attr":
            owner, _, leaf = use.weight.name.rpartition(".")
            buffer = "mask" if leaf == "weight" else f"{leaf}_mask"
            holder, path = gm.get_submodule(owner), f"{owner}.{buffer}".lstrip(".")
        else:
            buffer = path = "mask_" + use.name.replace(".", "_")
            holder = gm
        holder.register_buffer(buffer, mask)
        with gm.graph.inserting_before(node):
            args: list[Any] = [argument(node, 0, "input"), argument(node, 1, "weight")]  # as they are by now
            args += [gm.graph.get_attr(path), use.bias]
            if geometry is not None:
                args += [geometry.stride, geometry.padding, geometry.dilation, geometry.groups]
            target = ops.masked_linear if geometry is None else ops.masked_conv2d
            new = gm.graph.call_function(target, (*args, pattern.n, pattern.m))
        new.meta = dict(node.meta)
        node.replace_all_uses_with(new)
        gm.graph.erase_node(node)
        if ctx.owned and use.weight.node is not None and use.weight.node.op == "get_attr":
            use.weight.tensor.mul_(mask)


def verify(gm: IRModule, lifted: Any = None) -> dict[str, int]:
    """Masked layer -> groups of its stored weight that violate its pattern (0 where all is well)."""
    return {
        layer.name: check_nm(layer.weight.tensor.detach(), *layer.pattern)
        for layer in layers(gm, lifted)
        if layer.pattern is not None and element_count(layer.weight.tensor.shape)
    }
