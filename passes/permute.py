"""Permute: reorder channels so that the masks keep more. No search is implemented: every order is left as it is."""

from __future__ import annotations

from typing import Any

from mpcompile.graph import IRModule
from mpcompile.passes.base import Context, Pass


class Permute(Pass):
    """Leaves every channel where it is, and says so in the Plan."""

    name = "permute"

    def plan(self, gm: IRModule, ctx: Context) -> dict[str, Any]:
        return {"requested": ctx.config.permute, "permuted": []}

    def summary(self, decision: dict[str, Any]) -> str:
        return "identity: no permutation search" if decision["requested"] else "off"

    def apply(self, gm: IRModule, decision: dict[str, Any], ctx: Context) -> bool:
        return False
