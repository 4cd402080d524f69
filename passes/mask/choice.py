"""The decision of Mask: which layers are masked, under which pattern, and why the others stay dense."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch

from mpcompile.calibration.norms import Statistics
from mpcompile.config import ROLES
from mpcompile.errors import NotEligibleError
from mpcompile.ir.module import IRModule
from mpcompile.ir.roles import roles
from mpcompile.ir.view import layers, unsupported
from mpcompile.kernels import ops
from mpcompile.passes.base import UNRECORDED, Context, Decision
from mpcompile.passes.mask.eligibility import pattern_words, reason
from mpcompile.pruning.project import Projection

ALREADY = "already masked"


@dataclass(frozen=True)
class Masked:
    """The result of Mask.

    Attributes:
        projections: masked layer -> its mask and refitted values.
        norms: BatchNorm module -> its mean and variance in the pruned network, if they were computed along the way.
    """

    projections: Mapping[str, Projection] = field(default_factory=dict)
    norms: Statistics = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class Masks(Decision):
    """The layers to mask, with their patterns and masks, and the layers that stay dense.

    Attributes:
        pattern: the pattern, or menu of patterns, that the options request.
        masked: layer name -> the score that the options request; ``"magnitude"`` without calibration data.
        patterns: layer name -> its pattern.
        dense: layer name -> why it stays dense.
        fell_back: number of layers whose score fell back to magnitude.
        projections: masked layer -> its mask and refitted values.
        norms: BatchNorm module -> its mean and variance in the pruned network, if they were computed along the way.
    """

    pattern: str
    masked: dict[str, str]
    patterns: dict[str, str]
    dense: dict[str, str]
    fell_back: int = 0
    projections: dict[str, Projection] = field(default_factory=dict, metadata=UNRECORDED)
    norms: Statistics = field(default_factory=dict, metadata=UNRECORDED)


def choose(gm: IRModule, ctx: Context) -> Masks:
    """Choose the layers to mask, without computing their masks.

    Raises:
        NotEligibleError: no layer can be masked, or a layer that ``include`` names cannot be.
    """
    config, role = ctx.config, roles(gm, ctx.lifted)
    choice = Masks(pattern_words(config), {}, {}, {})
    for layer in layers(gm, ctx.lifted):
        if layer.name in choice.masked:
            continue
        why = ALREADY if layer.pattern is not None else reason(layer, role.get(layer.name), ctx)
        if why is None:
            choice.patterns[layer.name] = str(ctx.pattern_for(layer))
            choice.masked[layer.name] = "magnitude" if ctx.calibration is None else config.score
        else:
            choice.dense[layer.name] = why
    for name, (_, why) in unsupported(gm, ctx.lifted).items():
        choice.dense.setdefault(name, why)
    _check_named(choice, ctx)
    _check_patterns(choice, ctx)
    _check_any(gm, choice, ctx)
    _share(gm, choice, ctx)
    return choice


def _share(gm: IRModule, choice: Masks, ctx: Context) -> None:
    """Give layers that share a weight the same pattern; if one of them stays dense, all do."""
    owners: dict[int, list[str]] = {}
    for layer in layers(gm, ctx.lifted):
        names = owners.setdefault(id(layer.weight.tensor), [])
        names += [layer.name] if layer.name not in names else []
    for names in owners.values():
        dense = next((name for name in names if name not in choice.masked), None)
        for name in [n for n in names if n in choice.masked]:
            if dense is None or choice.dense[dense] == ALREADY:
                choice.patterns[name] = choice.patterns.get(names[0], choice.patterns[name])
                continue
            del choice.masked[name], choice.patterns[name]
            choice.dense[name] = f"its weight is that of {dense}, which stays dense"


def _check_any(gm: IRModule, choice: Masks, ctx: Context) -> None:
    """Refuse a model in which nothing can be masked although a pattern is requested."""
    config = ctx.config
    done = choice.masked or ALREADY in choice.dense.values()
    merged = any(node.target is ops.token_merge for node in gm.graph.nodes)
    if config.pattern == "dense" or done or (ctx.tolerant and merged):
        return
    devices = {layer.weight.tensor.device for layer in layers(gm, ctx.lifted)} or {torch.device("cpu")}
    least = min(p.m for device in devices for p in config.choices(device))
    raise NotEligibleError(
        f"no layer can be masked {pattern_words(config)}",
        expected=f"a linear or convolution layer whose inputs divide by {least}",
        found="; ".join(sorted(set(choice.dense.values()))) or "a model without linear or 2-d convolution layers",
        hint="choose another pattern, a narrower exclude, or pattern='dense'",
    )


def _check_patterns(choice: Masks, ctx: Context) -> None:
    """Refuse a layer that ``layer_patterns`` names without a wildcard if it cannot be masked so."""
    for text in ctx.config.layer_patterns:
        name, _, pattern = text.rpartition("=")
        left = choice.dense.get(name)
        stays = left == ALREADY or (left is not None and pattern == "dense")
        if ctx.tolerant or any(c in name for c in "*?[") or name in choice.masked or stays:
            continue
        raise NotEligibleError(
            f"layer_patterns gives {pattern} to a layer that cannot be masked {pattern}",
            layer=name,
            expected="a layer that can be masked, by its name in the graph",
            found=left or f"no such layer; the layers are {', '.join([*choice.masked, *choice.dense][:8])}, ...",
            hint="remove it from layer_patterns, or give it another pattern",
        )


def _check_named(choice: Masks, ctx: Context) -> None:
    """Refuse a layer that ``include`` names if it cannot be masked, or is not in the graph."""
    names = {**choice.masked, **choice.dense}
    for word in ctx.config.include:
        if word in ROLES or any(c in word for c in "*?[") or choice.dense.get(word) == ALREADY:
            continue
        if word not in names and ctx.tolerant:  # it may be in another graph of the same model
            continue
        if word not in names:
            raise NotEligibleError(
                "include names a layer that is not in the graph",
                layer=word,
                hint=f"the layers are {', '.join(list(names)[:8])}, ...",
            )
        if word in choice.dense and ctx.config.pattern != "dense":
            raise NotEligibleError(
                f"this layer cannot be masked {pattern_words(ctx.config)}",
                layer=word,
                expected="a layer that can be masked, since include names it",
                found=choice.dense[word],
                hint="remove it from include, or choose another pattern",
            )
