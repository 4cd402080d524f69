"""The pass contract: ``plan`` decides and touches nothing, ``apply`` changes the owned graph."""

from __future__ import annotations

import abc
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from torch import Tensor, fx
from torch.fx.passes.infra.pass_base import PassBase, PassResult

from mpcompile.config import Config
from mpcompile.ir.module import IRModule, Lifted
from mpcompile.ir.view import LayerOp
from mpcompile.kernels.nm_format import Pattern
from mpcompile.plan import PassRecord, Plan

if TYPE_CHECKING:
    from mpcompile.calibration.moments import Moments
    from mpcompile.pruning.project import Projection


@dataclass
class Context:
    """What the passes of one run share.

    Attributes:
        inputs: example inputs, one a placeholder; they give shapes, not values.
        lifted: parameters that are graph inputs.
        owned: whether the graph owns its weights and may write zeros into them.
        calibration: an iterable of batches, or None.
        again: whether the calibration data can be read more than once.
        statistics: a folder that keeps the moments of layers, or None.
        refit: whether a later pass asks for refitted values.
        renorm: whether a later pass asks for BatchNorm statistics of the pruned network.
        memory: bytes that calibration statistics, and again held activations, may take.
        prior: source masks of the Hamming prior, by layer name.
        prior_weight: alpha of that prior.
        moments: layer name -> moments of its dense inputs, where one pass over the data gathered them.
        calibrate: where the statistics of a layer come from, as in :func:`mpcompile.transform`.
        seed: seeds whatever is random.
        patterns: layer name -> the pattern that was allocated to it, or None where it is to stay dense.
        masks: masks that were decided before (other graphs of the same model), by layer name.
        projections: what each masked layer became, by name.
        norms: BatchNorm node -> mean and variance of its inputs in the pruned network.
        tolerant: whether what finds no place in the graph is noted and left out, and what does is done all the same.
    """

    config: Config
    inputs: list[Any]
    lifted: Lifted = field(default_factory=Lifted)
    owned: bool = True
    calibration: Any = None
    again: bool = False
    statistics: Path | None = None
    refit: bool = False
    renorm: bool = False
    memory: int = 2 << 30
    prior: Mapping[str, Tensor] = field(default_factory=dict)
    prior_weight: float = 0.1
    calibrate: str = "pruned_to_dense"
    seed: int = 0
    patterns: dict[str, Pattern | None] = field(default_factory=dict)
    moments: dict[str, Moments] = field(default_factory=dict)
    masks: dict[str, Tensor] = field(default_factory=dict)
    projections: dict[str, Projection] = field(default_factory=dict)
    norms: dict[fx.Node, tuple[Tensor, Tensor]] = field(default_factory=dict)
    tolerant: bool = False
    plan: Plan = field(default_factory=Plan)

    def pattern_for(self, layer: LayerOp) -> Pattern | None:
        """The pattern of a layer: the one that was allocated to it, else the config's; None for dense."""
        if layer.name in self.patterns:
            return self.patterns[layer.name]
        return self.config.pattern_for(layer.weight.tensor)

    def writable(self, layer: LayerOp) -> bool:
        """Whether the graph may change the values of the layer's weight."""
        node = layer.weight.node
        return self.owned and (node is None or node.op == "get_attr")


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

    def check(self, gm: IRModule, ctx: Context) -> None:
        """Refuse what this pass can't do on the graph as it comes in. Called before any pass of a pipeline runs.

        Raises:
            MPCompileError: it can't.
        """

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
