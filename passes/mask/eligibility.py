"""Which layers can be masked, and why the others stay dense."""

from __future__ import annotations

import fnmatch
from collections.abc import Iterable
from typing import Any

from mpcompile.config import ROLES, Config
from mpcompile.ir.module import IRModule
from mpcompile.ir.nodes import element_count
from mpcompile.ir.roles import roles
from mpcompile.ir.view import LayerOp, layers
from mpcompile.kernels.nm_format import Pattern, check_nm, group_axis
from mpcompile.passes.base import Context


def _matches(name: str, role: str | None, words: Iterable[str]) -> bool:
    return any(word == role if word in ROLES and word != name else fnmatch.fnmatch(name, word) for word in words)


def reason(layer: LayerOp, role: str | None, ctx: Context) -> str | None:
    """Return why a layer stays dense, or None if it can be masked."""
    config = ctx.config
    included = _matches(layer.name, role, config.include)
    if config.pattern == "dense":
        return "pattern is dense"
    if layer.obstacle:
        return layer.obstacle
    if not included and role in config.exclude:
        return str(role)
    if not included and _matches(layer.name, role, config.exclude):
        return "excluded"
    weight = layer.weight.tensor
    named = config.named_pattern(layer.name)
    if named == "dense":
        return "dense in layer_patterns"
    if named is not None:
        m = Pattern.parse(named).m
        return f"K % {m} (K = {group_axis(weight.shape)})" if group_axis(weight.shape) % m else None
    if config.pattern_for(weight) is None:
        least = min(p.m for p in config.choices(weight.device, weight.dtype))
        return f"K % {least} (K = {group_axis(weight.shape)})"
    return "allocated dense" if ctx.pattern_for(layer) is None else None


def eligible(gm: IRModule, ctx: Context) -> list[str]:
    """Return the names of the layers that :class:`Mask` would mask, in graph order."""
    role = roles(gm, ctx.lifted)
    uses = [use for use in layers(gm, ctx.lifted) if use.pattern is None]
    return list(dict.fromkeys(use.name for use in uses if reason(use, role.get(use.name), ctx) is None))


def pattern_words(config: Config) -> str:
    """Return the pattern, or the menu of patterns, in words for error messages."""
    if config.mac_reduction is None:
        return config.pattern
    return " or ".join(config.patterns) or "with a pattern of its own"


def verify(gm: IRModule, lifted: Any = None) -> dict[str, int]:
    """Return masked layer -> number of groups of its stored weight that violate its pattern (0 if it is legal)."""
    return {
        layer.name: check_nm(layer.weight.tensor.detach(), *layer.pattern)
        for layer in layers(gm, lifted)
        if layer.pattern is not None and element_count(layer.weight.tensor.shape)
    }
