"""Multiply-accumulates of a run, as the Plan reports them."""

from __future__ import annotations

from mpcompile.ir import spec
from mpcompile.ir.macs import count, node_macs
from mpcompile.ir.module import IRModule
from mpcompile.passes.base import Context
from mpcompile.plan import Macs, Plan, is_lowered


class Accounts:
    """Multiply-accumulates of one run: of the dense model, and of the graph with its masks and merges.

    Packed layers show no patterns, and merged tokens can't be counted any more. So figures of the dense model are taken
    from the plan that the graph came with, and nothing is counted behind a pass that closes the accounts.
    """

    def __init__(self, gm: IRModule, ctx: Context) -> None:
        plan = ctx.plan
        known = plan.macs.dense > 0
        lowered = is_lowered(gm, plan)
        self.lifted = ctx.lifted
        self.macs: Macs | None = plan.macs if known and lowered else None
        self.executed = {name: entry.macs_executed for name, entry in plan.layers.items()} if self.macs else {}
        self.dense, self.layers = count(gm, lifted=ctx.lifted)[0].dense, node_macs(gm, ctx.lifted)
        if known and (lowered or any(spec.family_of(node) not in (None, "masked") for node in gm.graph.nodes)):
            self.dense = plan.macs.dense
            self.layers |= {name: entry.macs_dense for name, entry in plan.layers.items() if entry.macs_dense}

    def close(self, gm: IRModule) -> None:
        """Count the graph, at the first call only."""
        if self.macs is None:
            self.macs, self.executed = count(gm, self.dense, self.lifted)

    def enter(self, plan: Plan) -> None:
        """Put the figures into a plan."""
        assert self.macs is not None  # close() comes first
        plan.macs = self.macs
        for name, entry in plan.layers.items():
            entry.macs_dense = self.layers.get(name, 0)
            entry.macs_executed = self.executed.get(name, entry.macs_dense)
