"""The operators and layers that are legal after transform, after lower and after fuse: a table, checked between stages.

The table constrains mpcompile's own operators and layers. Everything else that torch.fx can hold is legal at every
stage, so a user's pass may insert any torch operator.

=================  =======================  ======================================================================
family             stages                   arguments that passes and engines rely on
=================  =======================  ======================================================================
masked             transformed              tensors are nodes, N and M are literal
merging            transformed and later    tensors are nodes
packed, native     lowered and later        packed tensors are buffers or graph inputs; sizes, N, M and layout literal
``nm_mlp``         fused                    as native
=================  =======================  ======================================================================

Two further rules: a masked layer may remain after lower only if the plan gives a reason (the graph writes into its
weight), and a native operator has a residual or an activation only after fuse.
"""

from __future__ import annotations

import enum
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import Tensor, fx, nn

from mpcompile.errors import GraphError
from mpcompile.ir.module import IRModule, Lifted
from mpcompile.ir.parts import attribute
from mpcompile.ir.view import layers
from mpcompile.kernels import ops, schema
from mpcompile.kernels.nm_linear.packed import EPILOGUES

if TYPE_CHECKING:
    from mpcompile.plan import Plan


class Stage(enum.IntEnum):
    """How far a graph has been compiled. Stages are ordered: a graph never moves back."""

    TRANSFORMED = 1  # captured, or masked and merged
    LOWERED = 2
    FUSED = 3

    def __str__(self) -> str:
        return self.name.lower()


REACHED_BY = {"lower": Stage.LOWERED, "fuse": Stage.FUSED}
"""Pass name -> the stage that the pass takes a graph to; other passes leave the stage as it is."""


@dataclass(frozen=True)
class Operator:
    """One row of the table.

    Attributes:
        target: the operator.
        family: ``"masked"``, ``"merging"``, ``"packed"``, ``"native"`` or ``"attention"``.
        since: the first stage at which the operator is legal.
        stored: names of arguments that are packed tensors: reads of buffers, or graph inputs.
        literal: names of arguments that are plain numbers or lists of them, because passes and engines read them.
        epilogue: argument -> the value it has before fuse, which sets it.
        matching: True if its MACs are the cost of matching tokens, not the model's own.
    """

    target: Any
    family: str
    since: Stage
    stored: frozenset[str] = frozenset()
    literal: frozenset[str] = frozenset()
    epilogue: tuple[tuple[str, Any], ...] = ()
    matching: bool = False

    @property
    def name(self) -> str:
        """The operator's name in the namespace ``mpcompile``."""
        return schema.operator_name(self.target)


_PACKED_TENSORS = frozenset({"values", "words", "index", "values1", "index1", "values2", "index2"})
_PATTERN = frozenset({"n", "m", "n1", "m1", "n2", "m2"})
_PACKED_NUMBERS = frozenset({"k", "out", "hidden", "shape", "layout", "layout1", "layout2"}) | _PATTERN
_NO_EPILOGUE = (("residual", None), ("activation", "none"))


def _rows() -> Iterator[Operator]:
    for op in ops.MASKED:
        yield Operator(op, "masked", Stage.TRANSFORMED, literal=_PATTERN)
    for op in ops.MERGING:
        yield Operator(op, "merging", Stage.TRANSFORMED, matching=op in ops.MATCHING)
    for op in ops.PACKED:
        yield Operator(
            op,
            "native" if op in ops.NATIVE else "packed",
            Stage.FUSED if op is ops.nm_mlp else Stage.LOWERED,
            stored=_PACKED_TENSORS,
            literal=_PACKED_NUMBERS,
            epilogue=_NO_EPILOGUE if op in (ops.nm_gemm, ops.nm_conv) else (),
        )
    yield Operator(ops.nm_attention, "attention", Stage.LOWERED)


OPERATORS: dict[Any, Operator] = {row.target: row for row in _rows()}
"""Target -> row of the table, for every operator of mpcompile."""


def operator_of(node: fx.Node) -> Operator | None:
    """Return the row of a node's operator, or None for a node that is not one of mpcompile's operators."""
    return OPERATORS.get(node.target) if node.op == "call_function" else None


def family_of(node: fx.Node) -> str | None:
    """Return the family of a node's operator, or None for a node that is not one of mpcompile's operators."""
    row = operator_of(node)
    return None if row is None else row.family


def stage_of(gm: fx.GraphModule) -> Stage:
    """Return the earliest stage at which the operators of a graph are legal.

    Example:
        >>> import torch, mpcompile
        >>> model, x = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Linear(8, 2)).eval(), torch.randn(4, 8)
        >>> gm = mpcompile.transform(model, x, mpcompile.Config("2:4"))
        >>> stage_of(mpcompile.lower(gm, x, mpcompile.Config(engine="reference")))
        <Stage.LOWERED: 2>
    """
    stage = Stage.TRANSFORMED
    for node in gm.graph.nodes:
        row = operator_of(node)
        if row is not None:
            args = schema.try_bind(node)
            fused = args is not None and any(getattr(args, name) != idle for name, idle in row.epilogue)
            stage = max(stage, Stage.FUSED if fused else row.since)
    return stage


def recorded(plan: Plan) -> Stage:
    """Return the stage that a plan's passes have taken their graph to."""
    return max((REACHED_BY[record.name] for record in plan.passes if record.name in REACHED_BY), default=Stage(1))


def check(gm: IRModule, stage: Stage, *, lifted: Lifted | None = None, plan: Plan | None = None) -> None:
    """Check a graph against the table.

    Args:
        gm: the graph.
        stage: the stage that it has reached.
        lifted: parameters that are graph inputs.
        plan: the record of the graph's passes. If it records that lower ran, masked layers are refused, except those
            that lower left masked for a recorded reason.

    Raises:
        GraphError: a node that the table does not allow. The message names the node and the stage, and says what was
            expected and what was found.
    """
    _check_structure(gm, stage)
    for node in gm.graph.nodes:
        row = operator_of(node)
        if row is None:
            continue
        if stage < row.since:
            raise _illegal(node, stage, f"{row.name} at stage {row.since} or later", row.name)
        _check_arguments(gm, row, node, stage)
    if stage > Stage.TRANSFORMED and (plan is None or recorded(plan) > Stage.TRANSFORMED):
        _check_no_masks(gm, stage, lifted, set() if plan is None else _left(plan))


def _illegal(node: fx.Node, stage: Stage, expected: object, found: object) -> GraphError:
    return GraphError(f"node {node.name} is not legal in a {stage} graph", expected=expected, found=found)


def _check_structure(gm: fx.GraphModule, stage: Stage) -> None:
    """Check that there is one output, the last node, that inputs precede calls, and that every path exists."""
    called = False
    nodes = list(gm.graph.nodes)
    outputs = [node for node in nodes if node.op == "output"]
    if len(outputs) != 1 or nodes[-1] is not outputs[0]:
        raise GraphError(
            f"a {stage} graph has {len(outputs)} outputs", expected="one output, the last node", found=str(nodes[-1:])
        )
    for node in nodes:
        called = called or node.op.startswith("call_")
        if node.op == "placeholder" and called:
            raise _illegal(node, stage, "inputs before the first call", "an input after a call")
        if node.op not in ("get_attr", "call_module"):
            continue
        try:
            value = attribute(gm, str(node.target))
        except AttributeError:
            raise _illegal(node, stage, f"something at {node.target}", "nothing") from None
        if node.op == "call_module" and not isinstance(value, nn.Module):
            raise _illegal(node, stage, f"a module at {node.target}", type(value).__name__)


def _check_arguments(gm: fx.GraphModule, row: Operator, node: fx.Node, stage: Stage) -> None:
    try:
        args = schema.bind(node)
    except TypeError as error:
        names = ", ".join(schema.OPERATORS[row.name].names())
        raise _illegal(node, stage, f"the arguments of {row.name}: {names}", error) from error
    for argument, value in zip(row.target._schema.arguments, args, strict=True):
        expected = _violation(gm, row, argument, value)
        if expected is not None:
            raise _illegal(node, stage, f"{expected} as {argument.name!r} of {row.name}", _abridged(value))
    for name, idle in row.epilogue:
        if stage < Stage.FUSED and getattr(args, name) != idle:
            raise _illegal(
                node, stage, f"{name!r} of {row.name} to be {idle!r} before fuse", _abridged(getattr(args, name))
            )


def _violation(gm: fx.GraphModule, row: Operator, argument: Any, value: Any) -> str | None:
    """Return what an argument should be, or None if it is legal."""
    kind = str(argument.real_type)
    if value is None:
        return None if kind.startswith("Optional") else "a value"
    if argument.name in row.stored:
        return None if _is_stored(gm, value) else "a buffer of the graph, or one of its inputs"
    if argument.name in row.literal:
        numbers = value if isinstance(value, (list, tuple)) else [value]
        listed = kind.startswith("List") == isinstance(value, (list, tuple))
        return None if listed and all(type(number) is int for number in numbers) else "literal numbers"
    if argument.name == "activation":
        return None if value in EPILOGUES else f"one of {', '.join(EPILOGUES)}"
    if "Tensor" in kind:
        return None if isinstance(value, fx.Node) else "a node"
    return None


def _is_stored(gm: fx.GraphModule, value: Any) -> bool:
    if not isinstance(value, fx.Node) or value.op == "placeholder":
        return isinstance(value, fx.Node)
    if value.op != "get_attr":
        return False
    tensor = attribute(gm, str(value.target))
    return isinstance(tensor, Tensor) and not isinstance(tensor, nn.Parameter)


def _check_no_masks(gm: IRModule, stage: Stage, lifted: Lifted | None, left: Collection[str]) -> None:
    """Refuse masked layers after lower, except those with a reason in the plan."""
    for layer in layers(gm, lifted):
        if layer.mask is not None and layer.name not in left:
            found = f"the masked layer {layer.name}"
            raise _illegal(layer.node, stage, "packed layers, or a reason in the plan", found)


def _left(plan: Plan) -> set[str]:
    """Return the layers that ``lower`` left masked according to the plan, which holds the reasons."""
    return {name for record in plan.passes if record.name == "lower" for name in record.decision.get("left", {})}


def _abridged(value: Any) -> str:
    text = f"{value.op} {value.target}" if isinstance(value, fx.Node) else repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
