"""Permute: reorder channels so that the masks keep more, folded into the weights.

Channels that may be reordered without changing the network are found on any graph (channels/axes.py); for each such
class the layers that read it are collected, and an order is searched (pruning/column_order.py) that leaves the least
to remove. Names, shapes and run time stay as they are. Where the channels are split into heads or convolution groups,
each has an order of its own.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from mpcompile.calibration.data import as_batches, batches
from mpcompile.calibration.moments import DIAGONAL, collect
from mpcompile.ir.effects import own_copies
from mpcompile.ir.module import Imported, IRModule
from mpcompile.ir.numerics import training_flags
from mpcompile.ir.view import LayerOp, layers
from mpcompile.kernels.nm_format import Pattern
from mpcompile.passes.base import Context, Pass
from mpcompile.passes.channels.axes import Analysis, Atoms, analyse
from mpcompile.passes.mask import eligible
from mpcompile.pruning.column_order import retained, search

_ROWS = 512  # rows of a class that the search looks at, drawn evenly from all its readers
_STEPS = 400
_TOLERANCE = 1e-5  # relative difference of the permuted from the original graph's output


Orders = dict[int, tuple[int | None, Tensor]]  # atom -> its owner, and an order for each of the owner's places


@dataclass
class ChannelClass:
    """Channels that are permuted together.

    Attributes:
        atom: in the analysis.
        owner: the atom (heads, groups) for each of whose places the order may differ, or None.
        readers: layer name -> its axes as atoms, the weight's axis 1 ending in ``atom``.
    """

    atom: int
    owner: int | None
    readers: dict[str, LayerOp] = field(default_factory=dict)


def _sets(analysis: Analysis) -> list[list[int]]:
    """The atoms of each tensor, one list for each part where some are sliced."""
    atoms, found = analysis.atoms, []
    for dims in analysis.tensors:
        stack = [atoms.expand(a for axis in dims for a in axis)]
        while stack:
            flat = stack.pop()
            sliced = next((a for a in flat if a in atoms.slices), None)
            if sliced is None:
                found.append(flat)
                continue
            selector = atoms.find(atoms.slices[sliced][0])
            for i in range(atoms.size[selector] if selector in flat else 1):
                stack.append(_at(flat, selector, i, atoms))
    return found


def _at(flat: Sequence[int], selector: int, place: int, atoms: Atoms) -> list[int]:
    """Atoms with those that ``selector`` slices replaced by their children at one place of it."""
    result = []
    for a in flat:
        if a in atoms.slices and atoms.find(atoms.slices[a][0]) == selector:
            result += atoms.expand([atoms.slices[a][1][place]])
        else:
            result.append(a)
    return result


def classes(analysis: Analysis, uses: dict[str, LayerOp]) -> list[ChannelClass]:
    """Classes of channels that may be permuted, with the layers among ``uses`` whose input axis ends in them."""
    atoms = analysis.atoms
    found: dict[int, ChannelClass] = {}
    for name, layer in uses.items():
        dims = analysis.dims.get(layer.weight.name)
        axis = atoms.expand(dims[1]) if dims else []
        if axis and not atoms.frozen[axis[-1]] and axis[-1] not in atoms.slices:
            found.setdefault(axis[-1], ChannelClass(axis[-1], None)).readers[name] = layer
    sets = _sets(analysis)
    for item in found.values():
        holding = [flat for flat in sets if item.atom in flat]
        if any(flat.count(item.atom) > 1 for flat in holding):
            continue
        together = set.intersection(*(set(flat) for flat in holding)) - {item.atom} if holding else set()
        name = next(iter(item.readers))
        dims = analysis.dims[item.readers[name].weight.name]
        near = [a for axis in (dims[1], dims[0]) for a in reversed(atoms.expand(axis))]
        item.owner = next((a for a in near if a in together and all(f.count(a) == 1 for f in holding)), None)
    return list(found.values())


def _reorder(tensor: Tensor, flat: Sequence[int], orders: Orders, atoms: Atoms) -> Tensor:
    """A tensor whose axes are atoms, reordered; ``orders`` maps an atom to (owner, (owners or 1, size) indices)."""
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
    """:func:`_reorder` on a finer view of the axes."""
    shape = tensor.shape
    return _reorder(tensor.reshape([atoms.size[a] for a in flat]), flat, orders, atoms).reshape(shape)


def fold(gm: nn.Module, analysis: Analysis, orders: Orders) -> None:
    """Reorder every parameter and buffer that holds permuted channels, in place."""
    state: dict[str, Tensor] = {**dict(gm.named_parameters()), **dict(gm.named_buffers())}
    with torch.no_grad():
        for name, dims in analysis.dims.items():
            flat = analysis.atoms.expand(a for axis in dims for a in axis)
            tensor = state[name]
            view = tensor.detach().reshape([analysis.atoms.size[a] for a in flat])
            tensor.copy_(_reorder(view, flat, orders, analysis.atoms).reshape(tensor.shape))


def _total(scores: Tensor) -> float:
    """Their sum in float64: in which order threads add must not decide between orders."""
    return max(float(scores.sum(dtype=torch.float64)), 1e-30)


def _rows(layer: LayerOp, power: Tensor | None, owners: int, size: int) -> Tensor:
    """Squared weights, times the power of their inputs, as (owners or 1, rows, size)."""
    weight = layer.weight.tensor.detach().float().square()
    if power is not None:
        groups, per = len(power), weight.shape[0] // len(power)
        taps = power.reshape(groups, -1, weight.shape[1]).transpose(1, 2)  # (groups, in, taps)
        taps = taps.repeat_interleave(per, 0).reshape(weight.shape[0], weight.shape[1], *weight.shape[2:])
        weight = weight * taps.to(weight)
    columns = weight.movedim(1, -1)  # (out, taps, in)
    if owners == 1:
        return columns.reshape(1, -1, size)
    if columns.shape[-1] == owners * size:  # heads: (out, heads, places)
        return columns.reshape(-1, owners, size).transpose(0, 1)
    return columns.reshape(owners, -1, size)  # groups: their rows are their own


class Permute(Pass):
    """Orders of channels under which N:M masks remove less; checked to leave the network as it was."""

    name = "permute"

    def plan(self, gm: IRModule, ctx: Context) -> dict[str, Any]:
        asked = ctx.config.permute
        requested = ctx.calibration is not None if asked is None else asked
        decision: dict[str, Any] = {"requested": requested, "classes": [], "unknown": [], "reason": None}
        self.found: list[tuple[ChannelClass, Tensor]] = []
        if not requested or ctx.config.pattern == "dense":
            return decision
        if not ctx.owned or ctx.lifted.tensors:
            decision["reason"] = "the graph doesn't own its weights"
            return decision
        if any(layer.pattern is not None for layer in layers(gm, ctx.lifted)):
            decision["reason"] = "masks that are there already hold for the present order of channels"
            return decision
        uses: dict[str, LayerOp] = {}
        for layer in layers(gm, ctx.lifted):
            uses.setdefault(layer.name, layer)
        names = [name for name in eligible(gm, ctx) if name not in ctx.masks]
        if not names:
            decision["reason"] = "no layer to mask"
            return decision
        self.analysis = analysis = analyse(gm, ctx.inputs)
        decision["unknown"] = sorted(analysis.unknown)
        chosen = classes(analysis, {name: uses[name] for name in names})
        power = self._power(gm, ctx, {n: layer for c in chosen for n, layer in c.readers.items()})
        for item in chosen:
            entry = self._search(item, power, ctx)
            if entry is not None:
                decision["classes"].append(entry)
        return decision

    def _power(self, gm: IRModule, ctx: Context, uses: dict[str, LayerOp]) -> dict[str, Tensor]:
        """Mean square of each layer's inputs, where the score looks at data that can be read again."""
        if ctx.calibration is None or not ctx.again or ctx.config.score == "magnitude" or not uses:
            return {}
        model = Imported(gm, ctx.inputs, ctx.lifted, [])
        moments = collect(model, batches(model, as_batches(ctx.calibration)), dict.fromkeys(uses, 1), kind=DIAGONAL)
        return {name: m.power for name, m in moments.items()}

    def _search(self, item: ChannelClass, power: dict[str, Tensor], ctx: Context) -> dict[str, Any] | None:
        atoms = self.analysis.atoms
        size = atoms.size[item.atom]
        owners = 1 if item.owner is None else atoms.size[item.owner]
        patterns = {n: ctx.pattern_for(u) for n, u in item.readers.items()}
        pattern: Pattern | None = Counter(patterns.values()).most_common(1)[0][0]
        readers = {n: u for n, u in item.readers.items() if patterns[n] == pattern}
        if pattern is None or size % pattern.m or size // pattern.m < 2 or pattern.n == pattern.m:
            return None
        each = [_rows(u, power.get(n), owners, size) for n, u in readers.items()]
        each = [rows / _total(rows) for rows in each]  # relative error of each layer counts alike
        generator = torch.Generator().manual_seed(ctx.seed)
        share = max(32, _ROWS // len(each))
        drawn = [torch.randperm(rows.shape[1], generator=generator)[:share].to(rows.device) for rows in each]
        sample = [rows[:, places] for rows, places in zip(each, drawn, strict=True)]
        sample = [s * (_total(rows) / _total(s)) for s, rows in zip(sample, each, strict=True)]
        order = search(torch.cat(sample, 1), pattern, _STEPS, ctx.seed)
        before = sum(float(retained(rows, pattern).sum()) for rows in each)
        after = sum(float(retained(rows.gather(2, order[:, None].expand_as(rows)), pattern).sum()) for rows in each)
        if not after > before:
            return None
        self.found.append((item, order))
        entry: dict[str, Any] = {
            "layers": list(readers),
            "channels": size,
            "orders": owners,
            "pattern": str(pattern),
            "order": order.tolist(),
            "lost_before": 1 - before / len(each),
            "lost_after": 1 - after / len(each),
        }
        writers = self._writers(item)
        if len(writers) > 1:  # channels of a residual stream, which others may want to compare with the original's
            entry["writers"] = writers
        return entry

    def _writers(self, item: ChannelClass) -> list[str]:
        """Layers whose outputs are the channels of a class that has one order."""
        if item.owner is not None:
            return []
        expand = self.analysis.atoms.expand
        weights = [(name, dims) for name, dims in self.analysis.dims.items() if len(dims) > 1]
        return [name.removesuffix(".weight") for name, dims in weights if expand(dims[0]) == [item.atom]]

    def summary(self, decision: dict[str, Any]) -> str:
        if not decision["requested"]:
            return "off"
        if decision["reason"]:
            return f"none: {decision['reason']}"
        entries = decision["classes"]
        readers = sum(len(e["layers"]) for e in entries)
        text = f"{len(entries)} classes of channels reordered for {readers} layers"
        if entries:
            before, after = (sum(e[k] for e in entries) / len(entries) for k in ("lost_before", "lost_after"))
            text += f", magnitude masks remove {after:.1%} instead of {before:.1%} of the energy"
        if decision["unknown"]:
            text += f"; left alone around {', '.join(decision['unknown'])}"
        return text

    @torch.no_grad()
    def apply(self, gm: IRModule, decision: dict[str, Any], ctx: Context) -> bool:
        if not self.found:
            return False
        orders = {item.atom: (item.owner, order) for item, order in self.found}
        inputs = [_random(value) for value in ctx.inputs]
        with training_flags(gm, False):
            expected = gm(*own_copies(gm, inputs))
        fold(gm, self.analysis, orders)
        with training_flags(gm, False):
            difference = _difference(gm(*own_copies(gm, inputs)), expected)
        decision["difference"] = difference
        if not difference <= _TOLERANCE * _looser(gm):
            back = {atom: (owner, order.argsort(-1)) for atom, (owner, order) in orders.items()}
            fold(gm, self.analysis, back)
            decision["classes"] = []
            decision["reason"] = f"the reordered graph differed by {difference:.1e}: every order was put back"
            return False
        for entry in decision["classes"]:
            for name in entry["layers"]:
                if name in ctx.plan.layers:
                    ctx.plan.layers[name].notes["permute"] = {k: entry[k] for k in ("lost_before", "lost_after")}
        return False  # tensors changed, the graph did not


def _looser(gm: nn.Module) -> float:
    """1 for fp32 weights, more where rounding is coarser."""
    eps = max((torch.finfo(p.dtype).eps for p in gm.parameters() if p.is_floating_point()), default=1.2e-7)
    return max(1.0, eps / torch.finfo(torch.float32).eps)


def _random(value: Any) -> Any:
    if isinstance(value, Tensor) and value.is_floating_point():
        return torch.randn(value.shape, generator=torch.Generator().manual_seed(0)).to(value)
    return value


def _difference(found: Any, expected: Any) -> float:
    """Largest difference over the largest value, over all tensors that a graph returns."""
    if isinstance(expected, Tensor):
        scale = float(expected.double().abs().max()) if expected.numel() else 1.0
        return float((found.double() - expected.double()).abs().max()) / max(scale, 1e-30) if expected.numel() else 0.0
    values = expected.values() if isinstance(expected, dict) else expected
    others = found.values() if isinstance(found, dict) else found
    return max((_difference(a, b) for a, b in zip(others, values, strict=True)), default=0.0)
