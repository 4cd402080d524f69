"""Dense weights with zeros: a state dict that timm, or any other program that reads weights, can load."""

from __future__ import annotations

import logging
import os

from torch import Tensor

from mpcompile._version import __version__
from mpcompile.errors import GraphError
from mpcompile.io.ownership import write_signed
from mpcompile.ir.module import IRModule, masked
from mpcompile.ir.spec import family_of

log = logging.getLogger(__name__)


def dense_state(gm: IRModule) -> dict[str, Tensor]:
    """Return the state dict of the model that ``gm`` was made from, with zeros where masks remove weights.

    It has exactly that model's names, including parts that the graph does not use; masks are left out. Tensors are
    contiguous copies on the CPU. Permuted channels stay permuted, which does not change the model's outputs. A
    state dict cannot express token merging.

    Raises:
        GraphError: ``gm`` is lowered: its weights are packed.

    Example:
        >>> model = nn.Sequential(nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 4)).eval()
        >>> gm = mpcompile.transform(model, torch.randn(2, 16), mpcompile.Config(pattern="2:4"))
        >>> model.load_state_dict(dense_state(gm))
        <All keys matched successfully>
    """
    if any(family_of(node) in ("packed", "native") for node in gm.graph.nodes):
        raise GraphError("a lowered module has no dense weights", hint="use the result of mpcompile.transform")
    removing: dict[int, list[tuple[Tensor, Tensor]]] = {}  # by the parameter, of which a weight may be rows
    masks: set[int] = set()
    held = gm.state_dict(keep_vars=True)
    wholes = {id(tensor) for tensor in held.values()}
    for weight, mask, _ in masked(gm):
        removing.setdefault(id(weight if id(weight) in wholes else weight._base), []).append((weight, mask))
        masks.add(id(mask))
    state = {}
    for name, tensor in held.items():
        if id(tensor) not in masks:
            value = tensor.detach().clone()
            for weight, mask in removing.get(id(tensor), ()):
                start = (weight.storage_offset() - tensor.storage_offset()) // max(1, tensor.stride(0))
                value[start : start + len(weight)].masked_fill_(~mask, 0)
            state[name] = value.cpu().contiguous()
    return state


def save_dense(gm: IRModule, path: str | os.PathLike[str]) -> None:
    """Write :func:`dense_state` to a safetensors file, which timm and other readers load like any weights.

    Raises:
        GraphError: see :func:`dense_state`.
        ArtifactError: the file cannot be written.
    """
    from safetensors.torch import save_file

    if any(family_of(node) == "merging" for node in gm.graph.nodes):
        log.warning("a state dict cannot express token merging: %s computes with all tokens", path)
    metadata = {"format": "pt", "mpcompile": __version__}
    write_signed(path, lambda temporary: save_file(dense_state(gm), temporary, metadata=metadata))
