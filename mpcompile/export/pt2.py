"""Programs of torch.export: a lowered graph with its weights, for ``torch.export.load``."""

from __future__ import annotations

import inspect
import logging
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._dynamo.exc import UserErrorType
from torch.fx.graph import _PyTreeCodeGen
from torch.utils import _pytree as pytree

from mpcompile.capture.inputs import call_for
from mpcompile.capture.signature import call_like, plain
from mpcompile.config import Config
from mpcompile.errors import GraphError, first_line
from mpcompile.io.ownership import write_signed
from mpcompile.kernels import ops
from mpcompile.pipeline import lower

log = logging.getLogger(__name__)

MAX_BATCH = 4096  # largest batch of a program whose batch size is left free


def program(
    gm: nn.Module, example: Any, *, engine: str = "auto", dynamic_batch: bool = False
) -> torch.export.ExportedProgram:
    """Lower and export a model: packed weights for the engines that are fastest here, BatchNorm folded.

    The program is called in the form of the example, and returns what the model returns: a tensor, tuple, dict,
    namedtuple or dataclass.

    Args:
        gm: from :func:`mpcompile.transform` or :func:`mpcompile.load`.
        example: a batch (batch, channels, height, width), a tuple of inputs, or a mapping of keyword inputs, as in
            :func:`mpcompile.transform`; engines are timed at its size. A mapping makes a program that is called with
            keywords, anything else one that is called by position. The program takes other values of tensors only,
            at the sizes of the example.
        engine: see :class:`mpcompile.Config`. ``"dense"`` keeps dense weights with zeros and uses only torch's
            operators, so that the program runs without mpcompile; programs of all other engines need
            ``import mpcompile`` before they are loaded.
        dynamic_batch: leave the batch size free (1 to 4096): axis 0 of every input in which it has the same length as
            in the image, the input with the most axes.

    Raises:
        GraphError: torch.export refuses the graph; or ``dynamic_batch`` is set, and the graph was captured for a single
            batch size.
        InputError: the example lacks an input.
        MPCompileError: as :func:`mpcompile.lower`.

    Example:
        >>> model = nn.Sequential(nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 4)).eval()
        >>> gm = mpcompile.transform(model, torch.randn(2, 16), mpcompile.Config(pattern="2:4"))
        >>> exported = program(gm, torch.randn(8, 16), engine="reference", dynamic_batch=True)
        >>> exported.module()(torch.randn(3, 16)).shape
        torch.Size([3, 4])
        >>> named = program(gm, {"input": torch.randn(8, 16)}, engine="dense")
        >>> named.module()(input=torch.randn(8, 16)).shape
        torch.Size([8, 4])
    """
    lowered = lower(gm, example, Config(engine=engine))
    if "pytree_info" not in vars(lowered.graph._codegen):  # the graph returns fx's own dicts and lists
        finish(lowered, plain)
    return export_lowered(lowered, example, engine, dynamic_batch)


def finish(gm: fx.GraphModule, function: Callable[[Any], Any]) -> None:
    """Make a graph return what a function makes of its outputs: of the flat list of them, if torch.export made it."""
    output, codegen = gm.graph.output_node(), gm.graph._codegen
    with gm.graph.inserting_before(output):
        output.args = (gm.graph.call_function(function, output.args),)
    if isinstance(codegen, _PyTreeCodeGen):
        codegen.pytree_info = codegen.pytree_info._replace(out_spec=None)
    gm.recompile()


def export_lowered(
    lowered: fx.GraphModule,
    example: Any,
    engine: str,
    dynamic_batch: bool,
    rules: Mapping[Any, Callable[..., Any]] | None = None,
) -> torch.export.ExportedProgram:
    """Export a graph that is lowered already; see :func:`program`.

    Args:
        rules: for the engine ``"dense"``, decompositions of our operators that replace the usual ones.
    """
    leaves, spec = pytree.tree_flatten(call_like(lowered, example))
    batched = _batched(leaves) if dynamic_batch else set()
    # torch.export merges two inputs that are the same tensor, and makes a batch of 1 a constant.
    inputs = [_at_least_two(leaf) if i in batched else _copy(leaf) for i, leaf in enumerate(leaves)]
    args, kwargs = pytree.tree_unflatten(inputs, spec)
    try:
        with torch.no_grad():
            shapes = _free_axes(lowered, spec, len(leaves), batched) if dynamic_batch else None
            exported = torch.export.export(lowered, args, kwargs, dynamic_shapes=shapes)
            return (
                exported.run_decompositions(_own_decompositions() | dict(rules or {}))
                if engine == "dense"
                else exported
            )
    except Exception as error:
        if not dynamic_batch:
            hint = "run it through torch.compile instead"
            raise GraphError(f"torch.export refuses the graph: {first_line(error):.200}", hint=hint) from error
        fixed = getattr(error, "error_type", None) is UserErrorType.CONSTRAINT_VIOLATION
        size = len(leaves[min(batched)]) if batched else None
        raise GraphError(
            f"the batch size cannot be left free: {first_line(error):.200}",
            expected="a graph that was captured with a free batch size",
            found=f"a graph for batches of {size}" if fixed else None,
            hint="transform the model itself, or give torch.export.export its dynamic_shapes, or fix the batch size",
        ) from error


def _batched(leaves: list[Any]) -> set[int]:
    """Return the places of the inputs whose axis 0 is the batch."""
    tensors = {i: leaf for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor) and leaf.dim()}
    image = max(tensors.values(), key=Tensor.dim, default=None)
    return {i for i, leaf in tensors.items() if image is not None and len(leaf) == len(image)}


def _at_least_two(leaf: Tensor) -> Tensor:
    return leaf.expand(max(2, len(leaf)), *leaf.shape[1:]).clone(memory_format=torch.contiguous_format)


def _copy(leaf: Any) -> Any:
    return leaf.clone() if isinstance(leaf, Tensor) else leaf


def _free_axes(gm: fx.GraphModule, spec: pytree.TreeSpec, count: int, batched: set[int]) -> Mapping[str, Any]:
    """Return ``dynamic_shapes`` for torch.export: parameter of ``forward`` -> tree of its free axes."""
    batch = torch.export.Dim("batch", min=1, max=MAX_BATCH)
    args, kwargs = pytree.tree_unflatten([{0: batch} if i in batched else None for i in range(count)], spec)
    return inspect.signature(gm.forward).bind(*args, **kwargs).arguments


def _own_decompositions() -> dict[Any, Any]:
    """Return decompositions of our composite operators into torch's; torch's own operators are not decomposed."""
    table = torch.export.default_decompositions().items()
    return {target: rule for target, rule in table if target.namespace == ops.NAMESPACE}


def registered(exported: torch.export.ExportedProgram) -> torch.export.ExportedProgram:
    """Register the namedtuples that a program takes or returns, so that a file can name them.

    Raises:
        GraphError: another class of inputs or outputs, which torch cannot name in a file.
    """
    spec = exported.call_spec
    for cls in sorted(_namedtuples(spec.in_spec) | _namedtuples(spec.out_spec), key=str):
        name = f"{cls.__module__}.{cls.__qualname__}"
        if cls not in pytree.SUPPORTED_SERIALIZED_TYPES:
            pytree._register_namedtuple(cls, serialized_type_name=name)
            log.warning(
                "a process that loads this file must run torch.utils._pytree._register_namedtuple(%s, "
                "serialized_type_name=%r) first",
                cls.__qualname__,
                name,
            )
    try:
        pytree.treespec_dumps(spec.in_spec), pytree.treespec_dumps(spec.out_spec)
    except Exception as error:
        hint = "register the class (torch.export.register_dataclass), or return a dict"
        raise GraphError(f"a file cannot name the outputs' class: {first_line(error):.200}", hint=hint) from error
    return exported


def _namedtuples(spec: pytree.TreeSpec) -> set[Any]:
    own = {spec.context} if pytree.is_namedtuple_class(spec.context) else set()
    return own.union(*map(_namedtuples, spec.children()))


def save_pt2(gm: nn.Module, example: Any, path: str | os.PathLike[str], **options: Any) -> None:
    """Write the result of :func:`program` for ``torch.export.load``; ``options`` go to that function.

    Raises:
        ArtifactError: the file cannot be written.
        GraphError: see :func:`program`.
        InputError: see :func:`program`.

    Example:
        >>> model = nn.Sequential(nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 4)).eval()
        >>> gm = mpcompile.transform(model, torch.randn(2, 16), mpcompile.Config(pattern="2:4"))
        >>> save_pt2(gm, {"input": torch.randn(8, 16)}, "model.pt2", engine="dense")
        >>> torch.export.load("model.pt2").module()(input=torch.randn(8, 16)).shape
        torch.Size([8, 4])
    """
    exported = registered(program(gm, example, **options))
    write_signed(path, lambda temporary: torch.export.save(exported, temporary), suffix=".pt2")


def run(path: Path, example: Any) -> Any:
    """Return the output of a program file."""
    module = torch.export.load(path).module()
    call = call_for(module, example)
    return module(*call.args, **call.kwargs)


def call_arguments(example: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return ``(args, kwargs)`` of an example: a mapping holds keywords, a tuple or list positional inputs."""
    if isinstance(example, Mapping):
        return (), dict(example)
    return (tuple(example), {}) if isinstance(example, (tuple, list)) else ((example,), {})
