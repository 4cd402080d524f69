"""What must hold after every pass: a consistent graph whose outputs have the shapes that they had before."""

from __future__ import annotations

from typing import Any

import torch
from torch.fx.passes.infra.pass_base import PassResult

from mpcompile.errors import GraphError
from mpcompile.ir import spec
from mpcompile.ir.module import IRModule
from mpcompile.ir.shapes import propagate
from mpcompile.passes.base import Context, Pass


class Consistency:
    """Refuses a changed graph if it is inconsistent, or if the shapes of its output have changed."""

    def __init__(self, gm: IRModule, ctx: Context, output: Any) -> None:
        self.ctx, self.output, self.stage = ctx, output, spec.stage_of(gm)

    def __call__(self, step: Pass, result: PassResult) -> None:
        if not result.modified:
            return
        ctx, gm = self.ctx, result.graph_module
        self.stage = max(self.stage, spec.REACHED_BY.get(step.name, self.stage))
        try:
            shapes = output_shapes(propagate(gm, ctx.inputs))
            spec.check(gm, self.stage, lifted=ctx.lifted, plan=ctx.plan)
        except GraphError as error:
            raise GraphError(f"pass {step.name!r} broke the graph: {error}") from error
        if shapes != self.output:
            raise GraphError(f"pass {step.name!r} changed the output", expected=self.output, found=shapes)


def output_shapes(value: Any) -> Any:
    """Return the shapes of everything that a graph returns."""
    if isinstance(value, torch.Tensor):
        return tuple(value.shape)
    if isinstance(value, (tuple, list)):
        return tuple(output_shapes(v) for v in value)
    if isinstance(value, dict):
        return {k: output_shapes(v) for k, v in value.items()}
    return None
