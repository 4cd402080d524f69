"""Mask: choose N of every M values of each eligible weight, and freeze the choice into the graph.

The scores are in pruning/scores.py. With calibration data the layers are decided one after another along the graph,
on the pruned prefix (``calibrate``), refitted on the way if Restore follows; or all from one dense pass.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from mpcompile.calibration.data import as_batches, batches
from mpcompile.calibration.moments import collect
from mpcompile.config import ROLES, Config
from mpcompile.errors import GraphError, InputError, NotEligibleError
from mpcompile.ir.module import Imported, IRModule
from mpcompile.ir.nodes import argument, element_count
from mpcompile.ir.parts import set_attribute
from mpcompile.ir.roles import roles
from mpcompile.ir.view import LayerOp, layers, unsupported
from mpcompile.kernels import ops
from mpcompile.kernels.nm_format import Pattern, check_nm, group_axis
from mpcompile.layers import MaskedConv2d, MaskedLinear
from mpcompile.passes.base import Context, Pass
from mpcompile.plan import LayerPlan, is_lowered
from mpcompile.pruning.project import Projection, in_sequence, project
from mpcompile.pruning.scores import covariance_mask, magnitude_mask, top_n
from mpcompile.pruning.ser import source_masks

_ALREADY = "already masked"

__all__ = ["Mask", "covariance_mask", "eligible", "magnitude_mask", "reason", "top_n", "verify"]


def _matches(name: str, role: str | None, words: Iterable[str]) -> bool:
    return any(word == role if word in ROLES and word != name else fnmatch.fnmatch(name, word) for word in words)


def reason(layer: LayerOp, role: str | None, ctx: Context) -> str | None:
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
        least = min(p.m for p in config.choices(weight.device, weight.dtype))
        return f"K % {least} (K = {group_axis(weight.shape)})"
    return "allocated dense" if ctx.pattern_for(layer) is None else None


def eligible(gm: IRModule, ctx: Context) -> list[str]:
    """Names of the layers that :class:`Mask` would mask."""
    role = roles(gm, ctx.lifted)
    found = [u for u in layers(gm, ctx.lifted) if u.pattern is None and reason(u, role.get(u.name), ctx) is None]
    return list(dict.fromkeys(u.name for u in found))


def _asked(config: Config) -> str:
    """The pattern, or the menu, as an error names it."""
    if config.mac_reduction is None:
        return config.pattern
    return " or ".join(config.patterns) or "with a pattern of its own"


def sources(gm: IRModule, uses: list[LayerOp], ctx: Context) -> dict[str, Tensor]:
    """The source masks of ``score="ser"``, by layer name.

    Raises:
        InputError: the calibration data can be read once only, or the graph takes its weights as inputs.
    """
    if not ctx.again or ctx.lifted.tensors:
        raise InputError(
            "score='ser' trains on the calibration data",
            expected="data that can be read again, and a graph that owns its weights",
            found="an iterator" if not ctx.again else "lifted weights",
            hint="give a list or a DataLoader, and transform the module itself",
        )
    names = {use.weight.name: use.name for use in uses}
    edges = {}
    for use in uses:
        fit = ctx.plan.layers[use.name].notes.get("analyze") if use.name in ctx.plan.layers else None
        edges[use.weight.name] = float((fit or {}).get("edge") or 0.0)
    known = [edge for edge in edges.values() if edge]
    usual = sum(known) / len(known) if known else 1.0
    data = batches(Imported(gm, ctx.inputs, ctx.lifted, []), as_batches(ctx.calibration))
    weights = {use.weight.name: use.weight.tensor for use in uses}
    kept = source_masks(gm, weights, {name: edge or usual for name, edge in edges.items()}, data)
    return {names[name]: mask for name, mask in kept.items()}


class Mask(Pass):
    """N:M masks on every eligible layer; see :class:`mpcompile.Config` for what is excluded."""

    name = "mask"

    def check(self, gm: IRModule, ctx: Context) -> None:
        """A masked layer keeps its mask: another pattern for it is refused, not passed over."""
        config, role = ctx.config, roles(gm, ctx.lifted)
        if config.pattern != "dense" and is_lowered(gm, ctx.plan):
            raise GraphError(
                "a lowered module can't be masked: its weights are packed",
                expected="a module that isn't lowered",
                found="packed weights",
                hint="transform the model that it was made from, then lower that",
            )
        for layer in layers(gm, ctx.lifted):
            if layer.pattern is None or reason(layer, role.get(layer.name), ctx) is not None:
                continue
            if config.mac_reduction is None and config.pattern_for(layer.weight.tensor) == layer.pattern:
                continue
            raise GraphError(
                "this layer is masked already, and a second mask would be chosen among what the first one left",
                layer=layer.name,
                expected=f"pattern='{layer.pattern}' as it is, or pattern='dense' to leave all masks alone",
                found=_asked(config) if config.mac_reduction is None else f"mac_reduction={config.mac_reduction}",
                hint="for another pattern transform the dense model, or leave the layer out with exclude",
            )

    def plan(self, gm: IRModule, ctx: Context) -> dict[str, Any]:
        config, role = ctx.config, roles(gm, ctx.lifted)
        decision: dict[str, Any] = {"pattern": _asked(config), "masked": {}, "patterns": {}, "dense": {}}
        devices = set()
        for layer in layers(gm, ctx.lifted):
            if layer.name in decision["masked"]:
                continue
            if layer.pattern is not None:
                decision["dense"][layer.name] = _ALREADY
                continue
            weight = layer.weight.tensor
            devices.add(weight.device)
            why = reason(layer, role.get(layer.name), ctx)
            if why is None:
                decision["patterns"][layer.name] = str(ctx.pattern_for(layer))
                decision["masked"][layer.name] = "magnitude" if ctx.calibration is None else config.score
            else:
                decision["dense"][layer.name] = why
        for name, (_, why) in unsupported(gm, ctx.lifted).items():
            decision["dense"].setdefault(name, why)
        self._check_named(decision, ctx)
        done = decision["masked"] or _ALREADY in decision["dense"].values()
        merged = any(node.target is ops.token_merge for node in gm.graph.nodes)
        if config.pattern != "dense" and not done and not (ctx.tolerant and merged):
            reasons = sorted({f"{v}" for v in decision["dense"].values()})
            least = min(p.m for device in devices or {torch.device("cpu")} for p in config.choices(device))
            raise NotEligibleError(
                f"no layer can be masked {_asked(config)}",
                expected=f"a linear or convolution layer whose inputs divide by {least}",
                found=("; ".join(reasons) or "a model without linear or 2-d convolution layers"),
                hint="choose another pattern, a narrower exclude, or pattern='dense'",
            )
        self._share(gm, decision, ctx)
        fell_back = sum(v == "magnitude" for v in decision["masked"].values())
        decision["fell_back"] = fell_back if config.score != "magnitude" else 0
        return decision

    @staticmethod
    def _share(gm: IRModule, decision: dict[str, Any], ctx: Context) -> None:
        """Layers that share a weight share its pattern; where one of them stays dense, all do."""
        owners: dict[int, list[str]] = {}
        for layer in layers(gm, ctx.lifted):
            names = owners.setdefault(id(layer.weight.tensor), [])
            names += [layer.name] if layer.name not in names else []
        for names in owners.values():
            dense = next((name for name in names if name not in decision["masked"]), None)
            for name in [n for n in names if n in decision["masked"]]:
                if dense is None or decision["dense"][dense] == _ALREADY:
                    decision["patterns"][name] = decision["patterns"].get(names[0], decision["patterns"][name])
                    continue
                del decision["masked"][name], decision["patterns"][name]
                decision["dense"][name] = f"its weight is that of {dense}, which stays dense"

    def _check_named(self, decision: dict[str, Any], ctx: Context) -> None:
        everything = {**decision["masked"], **decision["dense"]}
        for word in ctx.config.include:
            if word in ROLES or any(c in word for c in "*?[") or decision["dense"].get(word) == _ALREADY:
                continue
            if word not in everything and ctx.tolerant:  # it may stand in another graph of the same model
                continue
            if word not in everything:
                raise NotEligibleError(
                    "include names a layer that isn't in the graph",
                    layer=word,
                    hint=f"the layers are {', '.join(list(everything)[:8])}, ...",
                )
            if word in decision["dense"] and ctx.config.pattern != "dense":
                raise NotEligibleError(
                    f"this layer can't be masked {_asked(ctx.config)}",
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
        for name, why in decision["dense"].items():
            if name not in found:
                ctx.plan.layers[name] = LayerPlan("other", shapes[name], reason=why)
                continue
            layer = found[name][0]
            entry = ctx.plan.layers.setdefault(name, LayerPlan(layer.kind, tuple(layer.weight.tensor.shape)))
            if why != _ALREADY:
                entry.reason = why
        for name, projection in self._projections(gm, found, decision, ctx).items():
            uses, pattern = found[name], Pattern.parse(decision["patterns"][name])
            weight, mask = uses[0].weight.tensor, projection.mask
            ctx.masks[name] = mask
            ctx.projections[name] = projection
            energy = weight.detach().square()  # before the masked values are set to zero
            kept = float((energy * mask).sum() / energy.sum().clamp(min=1e-30))
            if projection.weight is not None and ctx.writable(uses[0]):
                weight.copy_(projection.weight.masked_fill(~mask, 0))
            for use in uses:
                self._mask_use(gm, use, mask, pattern, ctx)
            entry = ctx.plan.layers.setdefault(name, LayerPlan(uses[0].kind, tuple(weight.shape)))
            entry.pattern, entry.density, entry.reason = str(pattern), pattern.density, None
            entry.notes["mask"] = {"score": projection.score, "kept_energy": kept}
        for name in found:  # in the graph's order, whatever passes before told of a layer first
            ctx.plan.layers[name] = ctx.plan.layers.pop(name)
        return bool(decision["masked"])

    def _projections(
        self, gm: IRModule, found: dict[str, list[LayerOp]], decision: dict[str, Any], ctx: Context
    ) -> dict[str, Projection]:
        """What every layer to mask becomes, by name in the graph's order; layers that share a weight share it."""
        config, names = ctx.config, list(decision["masked"])
        patterns = {name: Pattern.parse(decision["patterns"][name]) for name in names}
        weights = {name: found[name][0].weight.tensor for name in names}
        result: dict[str, Projection] = {}
        for name in names:
            mask = ctx.masks.get(name)
            if mask is not None and mask.shape == weights[name].shape:
                result[name] = Projection(mask, None, decision["masked"][name])
        owner: dict[int, str] = {}
        for name in names:
            owner.setdefault(id(weights[name]), name)
        todo = [name for name in names if name not in result and owner[id(weights[name])] == name]
        uses = {first: [u for n in names if owner[id(weights[n])] == first for u in found[n]] for first in todo}

        measure = "covariance" if config.score == "ser" else config.score
        prior_masks = ctx.prior
        if config.score == "ser" and ctx.calibration is not None:
            prior_masks = {**sources(gm, [found[name][0] for name in todo], ctx), **ctx.prior}

        def decide(name: str, moments: Any) -> Projection:
            source = prior_masks.get(name)
            prior = None if source is None else (source.to(weights[name].device), ctx.prior_weight)
            refitted = ctx.refit and ctx.writable(found[name][0])
            result = project(weights[name], moments, patterns[name], measure, refitted, prior)
            if config.score == "ser" and result.score == measure:
                result.score = "ser"
            return result

        if ctx.calibration is None or (config.score == "magnitude" and not ctx.refit):
            result |= {name: decide(name, None) for name in todo}
        elif ctx.calibrate != "dense":
            model = Imported(gm, ctx.inputs, ctx.lifted, [])
            projected, ctx.norms = in_sequence(model, uses, patterns, decide, ctx)
            result |= projected
        else:
            sizes = {u.name: patterns[name].m for name in todo for u in uses[name]}
            model = Imported(gm, ctx.inputs, ctx.lifted, [])
            moments = ctx.moments or collect(model, batches(model, as_batches(ctx.calibration)), sizes, ctx.memory)
            ctx.moments = moments
            result |= {name: decide(name, moments[name]) for name in todo}
        shared = {name: result[owner[id(weights[name])]] for name in names if name not in result}
        return {name: {**result, **shared}[name] for name in names}

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
            use.weight.tensor.masked_fill_(~mask, 0)


def verify(gm: IRModule, lifted: Any = None) -> dict[str, int]:
    """Masked layer -> groups of its stored weight that violate its pattern (0 where all is well)."""
    return {
        layer.name: check_nm(layer.weight.tensor.detach(), *layer.pattern)
        for layer in layers(gm, lifted)
        if layer.pattern is not None and element_count(layer.weight.tensor.shape)
    }
