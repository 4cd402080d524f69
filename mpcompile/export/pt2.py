"""Programs of torch.export: a lowered graph with its weights, for ``torch.export.load``."""

from __future__ import annotations

import inspect
import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from mpcompile.capture.signature import call_like
from mpcompile.config import Config
from mpcompile.errors import GraphError, first_line
from mpcompile.io.ownership import write_signed
from mpcompile.kernels import ops
from mpcompile.pipeline import lower

MAX_BATCH = 4096  # largest batch of a program whose batch size is left free


def program(
    gm: nn.Module, example: Any, *, engine: str = "auto", dynamic_batch: bool = False
) -> torch.export.ExportedProgram:
    """Lower and export a model: packed weights for the engines that are fastest here, BatchNorm folded.

    The program is called as the example is given: with keywords if it is a mapping, else by position. It returns what
    the model returns: a tensor, tuple, dict, namedtuple or dataclass.

    Args:
        gm: from :func:`mpcompile.transform` or :func:`mpcompile.load`.
        example: a batch (batch, channels, height, width), a tuple of inputs, or a mapping of keyword inputs, as in
            :func:`mpcompile.transform`; engines are timed at its size. Sizes of other axes than the batch are fixed,
            and so are the values of inputs that are no tensors.
        engine: see :class:`mpcompile.Config`. ``"dense"`` keeps dense weights with zeros and uses only torch's
            operators, so that the program runs without mpcompile; programs of all other engines need
            ``import mpcompile`` before they are loaded.
        dynamic_batch: leave the batch size free (1 to 4096): axis 0 of every tensor whose axis 0 is as long as that of
            the image, the input with the most axes.

    Raises:
        GraphError: torch.export refuses the graph, or the graph was captured at one batch size and ``dynamic_batch``
            is asked for.
        InputError: the example lacks an input.
        MPCompileError: as :func:`mpcompile.lower`.

    Example:
        >>> model = nn.Sequential(nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 4)).eval()
        >>> gm = mpcompile.transform(model, torch.randn(2, 16), mpcompile.Config(pattern="2:4"))
        >>> exported = program(gm, torch.randn(8, 16), engine="reference", dynamic_batch=True)
        >>> exported.module()(torch.randn(3, 16)).shape
        torch.Size([3, 4])
    """
    lowered = lower(gm, example, Config(engine=engine))
    args, kwargs = call_like(lowered, example)
    leaves, spec = pytree.tree_flatten((args, kwargs))
    batched = _batched(leaves) if dynamic_batch else []
    # torch.export takes two inputs that are one tensor for one input, and a batch of 1 for a constant.
    leaves = [_spread(leaf) if i in batched else leaf.clone() if isinstance(leaf, Tensor) else leaf for i, leaf in enumerate(leaves)]
    args, kwargs = pytree.tree_unflatten(leaves, spec)
    shapes = _shapes(lowered, spec, len(leaves), batched) if dynamic_batch else None
    try:
        with torch.no_grad():
            exported = torch.export.export(lowered, args, kwargs, dynamic_shapes=shapes)
            return exported.run_decompositions(_own_decompositions()) if engine == "dense" else exported
    except Exception as error:
        raise GraphError(
            f"torch.export refuses the graph: {first_line(error):.200}",
            hint="leave the batch size fixed" if dynamic_batch else "run it through torch.compile instead",
        ) from error


def _batched(leaves: list[Any]) -> list[int]:
    """Return the places of the inputs whose axis 0 is the batch."""
    tensors = {i: leaf for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor) and leaf.dim()}
    image = max(tensors.values(), key=Tensor.dim, default=None)
    return [i for i, leaf in tensors.items() if image is not None and len(leaf) == len(image)]


def _spread(leaf: Tensor) -> Tensor:
    return leaf.expand(max(2, len(leaf)), *leaf.shape[1:]).clone(memory_format=torch.contiguous_format)


def _shapes(gm: fx.GraphModule, spec: pytree.TreeSpec, count: int, batched: list[int]) -> dict[str, Any]:
    """Return torch.export's table of free axes: parameter -> tree of its inputs."""
    batch = torch.export.Dim("batch", min=1, max=MAX_BATCH)
    args, kwargs = pytree.tree_unflatten([{0: batch} if i in batched else None for i in range(count)], spec)
    return dict(inspect.signature(gm.forward).bind(*args, **kwargs).arguments)


def _own_decompositions() -> dict[Any, Any]:
    """Return decompositions of our composite operators into torch's; torch's own operators are not decomposed."""
    table = torch.export.default_decompositions().items()
    return {target: rule for target, rule in table if target.namespace == ops.NAMESPACE}


def save_pt2(gm: nn.Module, example: Any, path: str | os.PathLike[str], **options: Any) -> None:
    """Write the result of :func:`program` for ``torch.export.load``; ``options`` go to that function.

    Raises:
        ArtifactError: the file cannot be written.
        GraphError: see :func:`program`.
    """
    exported = program(gm, example, **options)
    write_signed(path, lambda temporary: torch.export.save(exported, temporary), suffix=".pt2")


def run(path: Path, example: Any) -> Any:
    """Return the output of a program file."""
    return torch.export.load(path).module()(example)
