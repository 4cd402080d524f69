"""The contract of a pass: ``plan`` decides and changes nothing; ``apply`` carries the decision out on the graph."""

from __future__ import annotations

import abc
from collections.abc import Callable
from typing import Any, ClassVar

from torch.fx.passes.infra.pass_base import PassBase, PassResult

from mpcompile.dump import readable
from mpcompile.ir.module import IRModule
from mpcompile.passes.context import Allocated, Calibration, Context, Dense, Inputs, Request, Results
from mpcompile.passes.decision import UNRECORDED, Decision
from mpcompile.plan import PassRecord

__all__ = [
    "UNRECORDED",
    "Allocated",
    "Calibration",
    "Context",
    "Decision",
    "Dense",
    "Inputs",
    "Pass",
    "Request",
    "Results",
]


class Pass(PassBase):
    """One transformation of the graph.

    Subclasses define :attr:`name`, :meth:`plan` and :meth:`apply`. A pass that leaves a node alone gives the reason, in
    the layer's ``reason`` or in its summary.

    ``plan`` is pure: it changes neither the graph, nor the context, nor the pass, so that planning twice gives the same
    decision. Everything that depends on data is computed there. ``apply`` reads nothing but the graph, the decision and
    the inputs of the run: given a decision read back from JSON, a fresh pass produces the same graph.

    Attributes:
        name: name of the pass in the Plan.
        decision_type: class that ``plan`` returns, for reading a decision from JSON; None if ``plan`` returns a dict.
        provides: types of the results that ``apply`` puts into ``ctx.results``.
        needs: pairs of an option of :class:`mpcompile.Config` and the type of result that an earlier pass must provide
            if the option is given.
        requests: what earlier passes are to compute for this one.
        decides: True if the pass carries out the options that shape the model (patterns, merging), so that the Plan
            records this run's values of them.
        closes_accounts: True if multiply-accumulates cannot be counted after the pass; they are counted before it.

    Example:
        A pass that removes dropout::

            @dataclass(frozen=True, eq=False)
            class Dropped(Decision):
                nodes: tuple[str, ...]

            class DropDropout(Pass):
                name = "drop_dropout"
                decision_type = Dropped

                def plan(self, gm, ctx):
                    return Dropped(tuple(n.name for n in gm.graph.nodes if "drop" in n.name))

                def apply(self, gm, decision, ctx):
                    for node in list(gm.graph.nodes):
                        if node.name in decision.nodes:
                            node.replace_all_uses_with(node.args[0])
                            gm.graph.erase_node(node)
                    return bool(decision.nodes)

        A decision may be a plain dict of JSON values, too.
    """

    name: ClassVar[str]
    decision_type: ClassVar[type[Decision] | None] = None
    provides: ClassVar[tuple[type, ...]] = ()
    needs: ClassVar[tuple[tuple[str, type], ...]] = ()
    requests: ClassVar[frozenset[Request]] = frozenset()
    decides: ClassVar[bool] = False
    closes_accounts: ClassVar[bool] = False

    def __init__(self) -> None:
        self.context: Context | None = None

    @abc.abstractmethod
    def plan(self, gm: IRModule, ctx: Context) -> Any:
        """Return the decision, a :class:`Decision` or a dict of JSON values, and change nothing."""

    @abc.abstractmethod
    def apply(self, gm: IRModule, decision: Any, ctx: Context) -> bool:
        """Carry the decision out on the graph, and return True if the graph changed."""

    def check(self, gm: IRModule, ctx: Context) -> None:
        """Refuse a graph on which this pass cannot run. Called before any pass of a pipeline runs.

        Raises:
            MPCompileError: the pass cannot run on this graph.
        """

    def summary(self, decision: Any) -> str:
        """Return a sentence about the decision."""
        values = decision.record() if isinstance(decision, Decision) else decision
        return ", ".join(f"{k}: {v}" for k, v in values.items())

    def run(self, gm: IRModule, ctx: Context) -> PassResult:
        """Plan, apply, lint and recompile if the graph changed, and record the decision in the Plan."""
        self.context = ctx
        try:
            result = self(gm)
        finally:
            self.context = None
        assert result is not None  # call() below always returns one
        return result

    def call(self, gm: IRModule) -> PassResult:  # type: ignore[override]
        ctx = self.context
        if ctx is None:
            raise RuntimeError("a pass runs through Pass.run(gm, ctx) or a Pipeline")
        decision = self.plan(gm, ctx)
        modified = self.apply(gm, decision, ctx)
        if modified:
            gm.graph.lint()
            gm.recompile()
        record = decision.record() if isinstance(decision, Decision) else decision
        ctx.plan.passes.append(PassRecord(self.name, record, self.summary(decision)))
        return Applied(gm, modified, decision)


class Applied(PassResult):
    """A PassResult that also holds the decision that was applied."""

    decision: Any

    def __new__(cls, gm: IRModule, modified: bool, decision: Any) -> Applied:
        self: Any = super().__new__(cls, gm, modified)
        self.decision = decision
        return self


def run_pass(step: Pass, gm: IRModule, ctx: Context, check: Callable[[PassResult], None] | None = None) -> PassResult:
    """Run one pass and call the observers of the run.

    Args:
        check: called with the result before the observers are; they are called even if it raises.
    """
    if not ctx.observers:
        result = step.run(gm, ctx)
        if check is not None:
            check(result)
        return result
    before = readable(gm)
    result = step.run(gm, ctx)
    try:
        if check is not None:
            check(result)
    finally:
        for observer in ctx.observers:
            observer(step, before, result.graph_module, getattr(result, "decision", {}))
    return result
