"""Loading: the texts and tensors of a container become the IR, with every name in them checked."""

from __future__ import annotations

import os
from collections.abc import Mapping

from torch import Tensor, fx, nn
from torch.fx.graph import _PyTreeCodeGen

from mpcompile.artifact.codec import decode_nodes
from mpcompile.artifact.container import MAX_HEADER, PLAN, WEIGHTS, naming, parse, read, readable, resolve
from mpcompile.artifact.opset import Refusal, identifier, shown
from mpcompile.artifact.packed.nodes import check_packed
from mpcompile.artifact.packed.tensors import unpack_tensors
from mpcompile.artifact.structures import decode_signature
from mpcompile.artifact.tree import restore_modules, restore_tensors
from mpcompile.errors import GraphError, summary
from mpcompile.io.reading import read_bytes
from mpcompile.ir import spec
from mpcompile.ir.module import IRModule
from mpcompile.ir.numerics import with_ordinary_tensors
from mpcompile.plan import Plan


@with_ordinary_tensors
def load(path: str | os.PathLike[str]) -> IRModule:
    """Load a file or folder of :func:`mpcompile.save`: the same graph, weights, plan and training flags, on the CPU.

    Checksum, format version and structure are checked before anything is returned. Untrusted files are safe to
    load: a graph can call only the operators listed in opset.py and the layers listed in leaves.py. The checksum
    detects damage, not forgery: it says nothing about who made the file.

    Args:
        path: the file, or the folder that holds it.

    Raises:
        ArtifactError: the file is missing, of another kind, of a newer format, damaged or truncated, or it names an
            operator or layer that is not allowed.

    Example:
        >>> model = nn.Sequential(nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 4)).eval()
        >>> gm = mpcompile.transform(model, torch.randn(2, 16), mpcompile.Config(pattern="2:4"))
        >>> mpcompile.save(gm, "model.mpc")
        >>> load("model.mpc").plan.masked
        ['0']
    """
    target = resolve(path)
    with naming(target, "cannot be loaded"):
        if not os.path.isdir(target):
            return assemble(*read(target))
        if not os.path.exists(os.path.join(target, WEIGHTS)):
            raise Refusal(
                f"it is a folder without {WEIGHTS}",
                expected="a folder that mpcompile.save wrote",
                hint="check the path",
            )
        metadata, tensors = read(os.path.join(target, WEIGHTS))
        _compare_plan(os.path.join(target, PLAN), metadata)
        return assemble(metadata, tensors)


def assemble(texts: Mapping[str, str], tensors: Mapping[str, Tensor]) -> IRModule:
    """Build the IR from its texts and tensors, the inverse of :func:`mpcompile.artifact.saving.describe`.

    Raises:
        Refusal: the texts name something that is not allowed, or do not describe a module.
    """
    try:
        graph, modules, kinds = (parse(texts[key]) for key in ("graph", "modules", "tensors"))
        gm = IRModule(nn.Module(), fx.Graph(), class_name=identifier(graph["class"]))
        restore_modules(gm, modules, restore_tensors(kinds, unpack_tensors(kinds, tensors)))
        nodes = decode_nodes(gm, graph["nodes"])
        codegen = decode_signature(graph["signature"])
        if codegen is not None:
            _check_fit(nodes, codegen)
            nodes.set_codegen(codegen)
        gm.graph = nodes  # generates and compiles the source
        gm.graph.lint()
        if type(graph["locked"]) not in (bool, type(None)):
            raise Refusal("the mode in which the graph was captured is malformed", found=shown(graph["locked"]))
        gm.locked_mode = graph["locked"]
        check_packed(gm)
        plan = None if texts["plan"] == "null" else Plan.from_json(texts["plan"])
        if plan is not None:
            gm.plan = plan
        _check_stage(gm, plan)
    except Refusal:
        raise
    except Exception as error:  # any error that malformed tables cause in constructors and in fx
        raise Refusal(
            f"its parts do not make a module ({summary(error)})", expected="a file that mpcompile.save wrote"
        ) from error
    return gm


def _check_fit(graph: fx.Graph, codegen: _PyTreeCodeGen) -> None:
    """Refuse trees of inputs and outputs that have more or fewer leaves than the graph."""
    _, into, out = codegen.pytree_info
    inputs = sum(node.op == "placeholder" for node in graph.nodes)
    if into.num_leaves != inputs:
        raise Refusal("the signature does not fit the graph", expected=f"{inputs} inputs", found=into.num_leaves)
    results = graph.output_node().args[0]
    count = len(results) if isinstance(results, (tuple, list)) else 1
    if out is not None and out.num_leaves != count:
        raise Refusal("the signature does not fit the graph", expected=f"{count} outputs", found=out.num_leaves)


def _check_stage(gm: IRModule, plan: Plan | None) -> None:
    """Refuse a graph that is not legal after the passes that its plan records."""
    stage = max(spec.stage_of(gm), spec.recorded(plan) if plan is not None else spec.Stage.TRANSFORMED)
    try:
        spec.check(gm, stage, plan=plan)
    except GraphError as error:
        raise Refusal(error.message, expected=error.expected, found=error.found) from error


def _compare_plan(path: str, metadata: Mapping[str, str]) -> None:
    """Check that the plan.json of a folder, if it exists, belongs to its weights."""
    if not os.path.exists(path):
        return
    try:
        text = read_bytes(path, MAX_HEADER)
    except OSError as error:
        hint = f"remove it: {WEIGHTS} holds the plan, too"
        raise Refusal(f"its {PLAN} cannot be read", found=error.strerror or str(error), hint=hint) from error
    if parse(text, PLAN) != readable(metadata):
        raise Refusal(
            f"{PLAN} does not belong to {WEIGHTS}",
            expected=f"the plan of the file with sha256 {metadata['sha256']}",
            hint=f"remove {PLAN}: {WEIGHTS} holds the plan, too; or copy both again",
        )
