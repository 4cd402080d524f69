"""The pass contract: ``plan`` decides and touches nothing, ``apply`` changes the owned graph."""

from __future__ import annotations

import abc
from dataclasses import dataclass, field
from typing import Any, ClassVar

from torch import Tensor
from torch.fx.passes.infra.pass_base import PassBase, PassResult

from mpcompile.config import Config
from mpcompile.graph import IRModule, Lifted
from mpcompile.plan import PassRecord, Plan


@dataclass
class Context:
    """What the passes of one run share.

    Attributes:
        inputs: example inputs, one a placeholder; they give shapes, not values.
        lifted: parameters that are graph inputs.
        owned: whether the graph owns its weights and may write zeros into them.
        moments: layer name -> second moments of its input within each group, (kernel taps, groups, m, m), in the
            column order of the execution layout; empty without calibration.
        masks: masks that were decided before (other graphs of the same model), by layer name.
    """

    config: Config
    inputs: list[Any]
    lifted: Lifted = field(default_factory=Lifted)
    owned: bool = True
    calibration: Any = None
    moments: dict[str, Tensor] = field(default_factory=dict)
    masks: dict[str, Tensor] = field(default_factory=dict)
    plan: Plan = field(default_factory=Plan)


class Pass(PassBase):
    """One transformation of the graph.

    Subclasses give :attr:`name`, :meth:`plan` and :meth:`apply`. A pass that leaves a node alone says why, in the
    layer's reason or in its summary.

    Example:
        A pass that removes dropout::

            class DropDropout(Pass):
                name = "drop_dropout"

                def plan(self, gm, ctx):
                    return {"nodes": [n.name for n in gm.graph.nodes if "drop" in n.name]}

                def apply(self, gm, decision, ctx):
                    for node in list(gm.graph.nodes):
                        if node.name in decision["nodes"]:
                            node.replace_all_uses_with(node.args[0])
                            gm.graph.erase_node(node)
                    return bool(decision["nodes"])
    """

    name: ClassVar[str]

    def __init__(self) -> None:
        self.context: Context | None = None

    @abc.abstractmethod
    def plan(self, gm: IRModule, ctx: Context) -> dict[str, Any]:
        """The decision, as JSON values. Changes nothing."""

    @abc.abstractmethod
    def apply(self, gm: IRModule, decision: dict[str, Any], ctx: Context) -> bool:
        """Carry the decision out on the graph; True if it changed."""

    def summary(self, decision: dict[str, Any]) -> str:
        """The decision in a sentence."""
        return ", ".join(f"{k}: {v}" for k, v in decision.items())

    def run(self, gm: IRModule, ctx: Context) -> PassResult:
        """Plan, apply, record; afterwards lint and recompile if the graph changed."""
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
        ctx.plan.passes.append(PassRecord(self.name, decision, self.summary(decision)))
        return PassResult(gm, modified)
