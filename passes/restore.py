"""Restore: refit the kept values after masking. No fit is implemented: every value is left as it is."""

from __future__ import annotations

from typing import Any

from mpcompile.graph import IRModule
from mpcompile.passes.base import Context, Pass


class Restore(Pass):
    """Leaves every kept value as it is, and says so in the Plan."""

    name = "restore"

    def plan(self, gm: IRModule, ctx: Context) -> dict[str, Any]:
        return {"requested": ctx.config.restore, "restored": []}

    def summary(self, decision: dict[str, Any]) -> str:
        return "identity: no refit of kept values" if decision["requested"] else "off"

    def apply(self, gm: IRModule, decision: dict[str, Any], ctx: Context) -> bool:
        return False
