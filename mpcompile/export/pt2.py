"""Programs of torch.export: a lowered graph with its weights, for ``torch.export.load``."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mpcompile.config import Config
from mpcompile.errors import GraphError, first_line
from mpcompile.io.ownership import write_signed
from mpcompile.kernels import ops
from mpcompile.pipeline import lower

MAX_BATCH = 4096  # largest batch of a program whose batch size is left free


def program(
    gm: nn.Module, example: Tensor, *, engine: str = "auto", dynamic_batch: bool = False
) -> torch.export.ExportedProgram:
    """Lower and export a model: packed weights for the engines that are fastest here, BatchNorm folded.

    Args:
        gm: from :func:`mpcompile.transform` or :func:`mpcompile.load`.
        example: a batch (batch, channels, height, width); engines are timed at its size.
        engine: see :class:`mpcompile.Config`. ``"dense"`` keeps dense weights with zeros and uses only torch's
            operators, so that the program runs without mpcompile; programs of all other engines need
            ``import mpcompile`` before they are loaded.
        dynamic_batch: leave the batch size free (1 to 4096).

    Raises:
        GraphError: torch.export refuses the graph.
        MPCompileError: as :func:`mpcompile.lower`.

    Example:
        >>> model = nn.Sequential(nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 4)).eval()
        >>> gm = mpcompile.transform(model, torch.randn(2, 16), mpcompile.Config(pattern="2:4"))
        >>> exported = program(gm, torch.randn(8, 16), engine="reference", dynamic_batch=True)
        >>> exported.module()(torch.randn(3, 16)).shape
        torch.Size([3, 4])
    """
    lowered = lower(gm, example, Config(engine=engine))
    shapes = ({0: torch.export.Dim("batch", min=1, max=MAX_BATCH)},) if dynamic_batch else None
    inputs = (example.expand(max(2, len(example)), *example.shape[1:]).contiguous() if dynamic_batch else example,)
    try:
        with torch.no_grad():
            exported = torch.export.export(lowered, inputs, dynamic_shapes=shapes)
            return exported.run_decompositions(_own_decompositions()) if engine == "dense" else exported
    except Exception as error:
        raise GraphError(
            f"torch.export refuses the graph: {first_line(error):.200}",
            hint="leave the batch size fixed" if dynamic_batch else "run it through torch.compile instead",
        ) from error


def _own_decompositions() -> dict[Any, Any]:
    """Return decompositions of our composite operators into torch's; torch's own operators are not decomposed."""
    table = torch.export.default_decompositions().items()
    return {target: rule for target, rule in table if target.namespace == ops.NAMESPACE}


def save_pt2(gm: nn.Module, example: Tensor, path: str | os.PathLike[str], **options: Any) -> None:
    """Write the result of :func:`program` for ``torch.export.load``; ``options`` go to that function.

    Raises:
        ArtifactError: the file cannot be written.
        GraphError: see :func:`program`.
    """
    exported = program(gm, example, **options)
    write_signed(path, lambda temporary: torch.export.save(exported, temporary), suffix=".pt2")


def run(path: Path, example: Tensor) -> Tensor:
    """Return the output of a program file."""
    return torch.export.load(path).module()(example)
