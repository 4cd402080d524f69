"""Classes of channels that must be permuted together, and applying their orders to parameters and buffers.

If channels are split into heads or convolution groups, each head or group has its own order.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from mpcompile.ir.view import LayerOp
from mpcompile.passes.channels.axes import Atoms, ChannelAnalysis

Orders = dict[int, tuple[int | None, Tensor]]  # atom -> its owner, and one order for each index of the owner


@dataclass
class ChannelClass:
    """Channels that are permuted together.

    Attributes:
        atom: the atom of these channels in the analysis.
        owner: the atom (heads or groups) that splits the channels: each of its indices may have its own order; or None.
        readers: layer name -> a layer that reads the channels: axis 1 of its weight ends in ``atom``.
    """

    atom: int
    owner: int | None
    readers: dict[str, LayerOp] = field(default_factory=dict)


def _sets(analysis: ChannelAnalysis) -> list[list[int]]:
    """Return the atoms of each tensor; of a tensor with sliced atoms, one list for each part."""
    atoms, sets = analysis.atoms, []
    for dims in analysis.tensors:
        stack = [atoms.expand(a for axis in dims for a in axis)]
        while stack:
            flat = stack.pop()
            sliced = next((a for a in flat if a in atoms.slices), None)
            if sliced is None:
                sets.append(flat)
                continue
            selector = atoms.find(atoms.slices[sliced][0])
            for i in range(atoms.size[selector] if selector in flat else 1):
                stack.append(_at(flat, selector, i, atoms))
    return sets


def _at(flat: Sequence[int], selector: int, place: int, atoms: Atoms) -> list[int]:
    """Return the atoms, with those that ``selector`` slices replaced by their children at index ``place`` of it."""
    result = []
    for a in flat:
        if a in atoms.slices and atoms.find(atoms.slices[a][0]) == selector:
            result += atoms.expand([atoms.slices[a][1][place]])
        else:
            result.append(a)
    return result


def classes(analysis: ChannelAnalysis, uses: dict[str, LayerOp]) -> list[ChannelClass]:
    """Return the classes of channels that may be permuted, with those of ``uses`` whose input axis ends in them."""
    atoms = analysis.atoms
    by_atom: dict[int, ChannelClass] = {}
    for name, layer in uses.items():
        dims = analysis.dims.get(layer.weight.name)
        axis = atoms.expand(dims[1]) if dims else []
        if axis and not atoms.frozen[axis[-1]] and axis[-1] not in atoms.slices:
            by_atom.setdefault(axis[-1], ChannelClass(axis[-1], None)).readers[name] = layer
    sets = _sets(analysis)
    for candidate in by_atom.values():
        holding = [flat for flat in sets if candidate.atom in flat]
        if any(flat.count(candidate.atom) > 1 for flat in holding):
            continue
        together = set.intersection(*(set(flat) for flat in holding)) - {candidate.atom} if holding else set()
        name = next(iter(candidate.readers))
        dims = analysis.dims[candidate.readers[name].weight.name]
        near = [a for axis in (dims[1], dims[0]) for a in reversed(atoms.expand(axis))]
        candidate.owner = next((a for a in near if a in together and all(f.count(a) == 1 for f in holding)), None)
    return list(by_atom.values())


def _reorder(tensor: Tensor, flat: Sequence[int], orders: Orders, atoms: Atoms) -> Tensor:
    """Reorder a tensor whose axes are atoms; ``orders`` maps an atom to (owner, (owners or 1, size) indices)."""
    sliced = next((a for a in flat if a in atoms.slices), None)
    if sliced is not None:
        selector = atoms.find(atoms.slices[sliced][0])
        if selector not in flat:
            return _split_and(tensor, _at(flat, selector, 0, atoms), orders, atoms)
        place = flat.index(selector)
        parts = []
        for i in range(atoms.size[selector]):
            rest = [a for j, a in enumerate(flat) if j != place]
            parts.append(_split_and(tensor.select(place, i), _at(rest, selector, i, atoms), orders, atoms))
        return torch.stack(parts, place)
    for place, a in enumerate(flat):
        if a not in orders:
            continue
        owner, order = orders[a]
        if owner is None:
            tensor = tensor.index_select(place, order[0])
            continue
        shape = [1] * len(flat)
        shape[flat.index(owner)], shape[place] = order.shape
        index = order if flat.index(owner) < place else order.T
        tensor = torch.take_along_dim(tensor, index.reshape(shape), place)
    return tensor


def _split_and(tensor: Tensor, flat: Sequence[int], orders: Orders, atoms: Atoms) -> Tensor:
    """Call :func:`_reorder` on a view of the tensor whose axes are ``flat``."""
    shape = tensor.shape
    return _reorder(tensor.reshape([atoms.size[a] for a in flat]), flat, orders, atoms).reshape(shape)


def _moved(gm: nn.Module, analysis: ChannelAnalysis, orders: Orders) -> Iterator[tuple[str, Tensor, Tensor]]:
    """Yield (name, tensor, reordered values) for every parameter and buffer that holds permuted channels."""
    state: dict[str, Tensor] = {**dict(gm.named_parameters()), **dict(gm.named_buffers())}
    for name, dims in analysis.dims.items():
        flat = analysis.atoms.expand(a for axis in dims for a in axis)
        tensor = state[name].detach()
        view = tensor.reshape([analysis.atoms.size[a] for a in flat])
        yield name, tensor, _reorder(view, flat, orders, analysis.atoms).reshape(tensor.shape)


def fold(gm: nn.Module, analysis: ChannelAnalysis, orders: Orders) -> None:
    """Reorder every parameter and buffer that holds permuted channels, in place."""
    with torch.no_grad():
        for _, tensor, values in _moved(gm, analysis, orders):
            tensor.copy_(values)


def folded(gm: nn.Module, analysis: ChannelAnalysis, orders: Orders) -> dict[str, Tensor]:
    """Return the tensors that :func:`fold` would write, by name, in the memory layout of the original tensors."""
    return {name: tensor.clone().copy_(values) for name, tensor, values in _moved(gm, analysis, orders)}
