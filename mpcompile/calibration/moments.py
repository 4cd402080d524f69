"""Calibration: batches on their way through the graph -> second moments of what enters each layer.

:func:`collect` runs the dense graph once and gathers the moments of every layer; stream.py goes layer by layer instead.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx
from torch.utils import _pytree as pytree
from tqdm import tqdm

from mpcompile.capture.importers import Imported
from mpcompile.capture.modes import ordinary
from mpcompile.data.labels import whole_numbers
from mpcompile.errors import InputError
from mpcompile.ir.effects import own_copies
from mpcompile.ir.graph import LayerOp, device_of, fake_value, hint, layers, training_flags
from mpcompile.ir.numerics import exact

_COLUMNS = 512  # of second moments, computed together
_VALUES = 1 << 24  # input values of a layer that one batch contributes at most, in evenly spaced rows
FULL, BLOCK, DIAGONAL = "full", "block", "diagonal"


def as_batches(data: Any, what: str = "calibration") -> Iterable[Any]:
    """One tensor or one dict is one batch; anything else is an iterable of batches.

    Raises:
        InputError: it can't be iterated; ``what`` says what it is.
    """
    if isinstance(data, (Tensor, Mapping)):
        return [data]
    if not isinstance(data, Iterable):
        raise InputError(
            f"{what} has the wrong type",
            expected="an iterable of batches (tensors, tuples whose first item is the input, or dicts)",
            found=type(data).__name__,
        )
    return data


def peek(data: Any) -> tuple[Any, Iterable[Any]]:
    """The first batch, and an iterable that still starts with it: the data itself where it can be read again.

    Raises:
        InputError: there is none.
    """
    data = as_batches(data)
    iterator = iter(data)
    try:
        first = next(iterator)
    except StopIteration:
        raise InputError("calibration is empty", expected="at least one batch", found="none") from None
    return first, itertools.chain([first], iterator) if iterator is data else data


def model_inputs(batch: Any, names: list[str], examples: Sequence[Any] = ()) -> list[Any]:
    """The inputs in a batch, in the order of ``names``: all by keyword from a dict, else the first alone.

    Args:
        examples: of the inputs: where one is a dict or a tuple itself, so are the batches.
    """
    nested = len(examples) == 1 and isinstance(examples[0], (Mapping, tuple, list))
    if isinstance(batch, Mapping):
        if set(batch) == set(names):
            return [batch[name] for name in names]
        if nested:
            return [batch]
        raise InputError("a calibration batch has the wrong keys", expected=", ".join(names), found=list(batch))
    if isinstance(batch, (tuple, list)):
        if not batch:
            raise InputError("a calibration batch is empty", expected="a tuple whose first item is the input")
        batch = batch[0]
    if not isinstance(batch, Tensor) and not (nested and isinstance(batch, (Mapping, tuple, list))):
        raise InputError(
            "a calibration batch has the wrong type",
            expected="a tensor, a tuple whose first item is the input, or a dict",
            found=type(batch).__name__,
        )
    return [batch]


def draw(labels: Iterable[int], count: int, seed: int = 0) -> list[int]:
    """Indices of a class-balanced, shuffled sample of a labelled dataset.

    Args:
        labels: the label of every item, in the dataset's order.
        count: how many to draw; classes differ by one at most, as long as they have enough items.
        seed: the same seed draws the same sample.

    Raises:
        InputError: fewer items than that, or labels that are no whole numbers.

    Example:
        >>> sorted(draw([0, 0, 0, 0, 1, 1], 4))[-2:]
        [4, 5]
    """
    values = whole_numbers(labels)
    if not 0 < count <= len(values):
        raise InputError("can't draw a calibration sample", expected=f"1 to {len(values)} items", found=count)
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(values), generator=generator)
    turn = torch.zeros(len(values), dtype=torch.long)
    for label in values.unique():
        members = order[values[order] == label]
        turn[members] = torch.arange(len(members))
    ranked = order[turn[order].argsort(stable=True)]  # one of every class, then a second one, ...
    chosen = ranked[:count]
    return chosen[torch.randperm(count, generator=generator)].tolist()


def kind_for(layer: LayerOp, m: int, budget: float) -> tuple[str, int]:
    """The richest statistics of a layer that fit into ``budget`` bytes, and the bytes they take (float64)."""
    groups = 1 if layer.geometry is None else layer.geometry.groups
    k = math.prod(layer.weight.tensor.shape[1:])
    for kind, size in ((FULL, groups * k * k * 8), (BLOCK, groups * k * m * 8)):
        if size <= budget:
            return kind, size
    return DIAGONAL, groups * k * 8


def input_rows(x: Tensor, layer: LayerOp) -> tuple[Tensor, slice]:
    """What a layer multiplies its rows with: (groups, rows, K) in the execution layout, and which rows were taken.

    Args:
        x: input of the layer, (..., in) or (B, C, H, W).
    """
    if layer.geometry is None:
        rows = x.reshape(1, -1, x.shape[-1])
        taken = slice(None, None, max(1, -(-rows.numel() // _VALUES)))
        return rows[:, taken].float(), taken
    geometry, (_, _, kh, kw) = layer.geometry, layer.weight.tensor.shape
    (sh, sw), (ph, pw), (dh, dw) = geometry.stride, geometry.padding, geometry.dilation
    padded = F.pad(x, (pw, pw, ph, ph))
    height = (padded.shape[2] - dh * (kh - 1) - 1) // sh + 1
    width = (padded.shape[3] - dw * (kw - 1) - 1) // sw + 1
    taken = slice(None, None, max(1, -(-(x.shape[0] * height * width * x.shape[1] * kh * kw) // _VALUES)))
    taps = []
    for i, j in itertools.product(range(kh), range(kw)):
        seen = padded[:, :, i * dh : i * dh + sh * height : sh, j * dw : j * dw + sw * width : sw]
        tap = seen.permute(1, 0, 2, 3).reshape(geometry.groups, -1, seen[:, 0].numel())[:, :, taken]
        taps.append(tap.transpose(1, 2).float())
    return torch.cat(taps, 2), taken


def output_rows(y: Tensor, layer: LayerOp, taken: slice) -> Tensor:
    """Outputs of a layer as (rows, out), the rows that :func:`input_rows` took."""
    flat = y.reshape(-1, y.shape[-1]) if layer.geometry is None else y.permute(0, 2, 3, 1).reshape(-1, y.shape[1])
    return flat[taken].float()


@dataclass
class Moments:
    """Means over the input rows x of one layer, and over the outputs y that it should give. float64.

    Attributes:
        count: input rows seen.
        kind: ``"full"``, ``"block"`` or ``"diagonal"``.
        xx: E[x x'], (groups, K, K); or its diagonal blocks (groups, K / m, m, m); or its diagonal (groups, K).
        x: E[x], (groups, K).
        yx: E[y x'], (out, K), where y is not what the weight makes of these x; else None.
        y: E[y], (out,), likewise.
    """

    count: int
    kind: str
    xx: Tensor
    x: Tensor
    yx: Tensor | None = None
    y: Tensor | None = None

    def tensors(self) -> dict[str, Tensor]:
        """As named tensors, for a file."""
        found = {"count": torch.tensor(self.count), "xx": self.xx, "x": self.x, "yx": self.yx, "y": self.y}
        return {k: v.contiguous() for k, v in found.items() if v is not None}

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor]) -> Moments:
        """Inverse of :meth:`tensors`."""
        xx, x = tensors["xx"], tensors["x"]
        kind = DIAGONAL if xx.shape == x.shape else FULL if xx.dim() == 3 else BLOCK
        return cls(int(tensors["count"]), kind, xx, x, tensors.get("yx"), tensors.get("y"))

    def block(self, m: int) -> Tensor:
        """Diagonal blocks of E[x x'], (groups, K / m, m, m); with zeros beside the diagonal where no more is known."""
        if self.kind == BLOCK and self.xx.shape[-1] == m:
            return self.xx
        if self.kind == BLOCK and self.xx.shape[-1] % m == 0:
            inner = self.xx.unflatten(3, (-1, m)).unflatten(2, (-1, m))
            return inner.diagonal(dim1=2, dim2=4).movedim(-1, 2).flatten(1, 2)
        if self.kind != FULL:
            return torch.diag_embed(self.power.unflatten(-1, (-1, m)))
        blocks = self.xx.unflatten(2, (-1, m)).unflatten(1, (-1, m))
        return blocks.diagonal(dim1=1, dim2=3).permute(0, 3, 1, 2)

    def centred(self) -> Moments:
        """The same about the means: what counts where constant parts of the outputs are taken off again."""
        x = self.x
        if self.kind == FULL:
            outer = x[:, :, None] * x[:, None, :]
        elif self.kind == BLOCK:
            h = x.unflatten(-1, (-1, self.xx.shape[-1]))
            outer = h[..., :, None] * h[..., None, :]
        else:
            outer = x.square()
        yx = self.yx
        if yx is not None and self.y is not None:
            means = zip(self.y.chunk(len(x)), x, strict=True)
            yx = yx - torch.cat([part[:, None] * mean[None, :] for part, mean in means])
        return replace(self, xx=self.xx - outer, yx=yx)

    @property
    def power(self) -> Tensor:
        """E[x_j^2], (groups, K)."""
        if self.kind == DIAGONAL:
            return self.xx
        return self.xx.diagonal(dim1=-2, dim2=-1).flatten(1)


def _gram(rows: Tensor) -> Tensor:
    """X' X, (groups, rows, K) -> (groups, K, K). It is symmetric: blocks of columns below the diagonal are mirrored."""
    k = rows.shape[-1]
    result = rows.new_empty((len(rows), k, k))
    for start in range(0, k, _COLUMNS):
        block = slice(start, min(k, start + _COLUMNS))
        above = rows[:, :, : block.stop].transpose(1, 2) @ rows[:, :, block]
        result[:, : block.stop, block] = above
        result[:, block, :start] = above[:, :start].transpose(1, 2)
    return result


class Accumulator:
    """Adds up the moments of one layer batch by batch."""

    def __init__(self, layer: LayerOp, m: int, kind: str) -> None:
        self.layer, self.m, self.kind, self.count = layer, m, kind, 0
        self.sums: dict[str, Tensor] = {}

    def _add(self, key: str, value: Tensor) -> None:
        self.sums[key] = self.sums[key].add_(value) if key in self.sums else value.double()

    def add(self, x: Tensor, y: Tensor | None = None) -> None:
        """Input of the layer, and the output it should give, both as the graph has them."""
        rows, taken = input_rows(x, self.layer)
        self.count += rows.shape[1]
        # In float64: in which order threads add must not decide between masks.
        rows = rows.double()
        self._add("x", rows.sum(1))
        if self.kind == FULL:
            self._add("xx", _gram(rows))
        elif self.kind == BLOCK:
            h = rows.unflatten(-1, (-1, self.m)).transpose(1, 2)
            self._add("xx", h.transpose(-1, -2) @ h)
        else:
            self._add("xx", rows.square().sum(1))
        if y is not None:
            wanted = output_rows(y, self.layer, taken).double()
            pairs = zip(wanted.chunk(len(rows), 1), rows, strict=True)
            self._add("yx", torch.cat([part.T @ r for part, r in pairs]))
            self._add("y", wanted.sum(0))

    def result(self) -> Moments:
        """The means.

        Raises:
            InputError: the layer's inputs were not finite.
        """
        means = {key: value / self.count for key, value in self.sums.items()}
        if not bool(torch.isfinite(means["xx"]).all()):
            raise InputError(
                "what enters this layer on the calibration data is not finite",
                layer=self.layer.name,
                expected="finite activations",
                found="NaN or infinity",
                hint="calibrate in fp32, and with the transform of inference",
            )
        return Moments(self.count, self.kind, means["xx"], means["x"], means.get("yx"), means.get("y"))


def batches(model: Imported, calibration: Iterable[Any]) -> Iterator[list[Any]]:
    """Each calibration batch as the full list of graph inputs, its shape checked against the example's.

    Raises:
        InputError: a batch of another shape or type than the example inputs, or not finite.
    """
    placeholders = [n for n in model.gm.graph.nodes if n.op == "placeholder"]
    data = [n for n in placeholders if n.name not in model.lifted.tensors]
    device = device_of(model.gm)
    examples = [fake_value(node) for node in data]
    for index, batch in enumerate(calibration):
        values = model_inputs(batch, [str(n.target) for n in data], examples)
        if len(values) != len(data):
            raise InputError(
                f"calibration batch {index} has the wrong number of inputs",
                expected=f"{len(data)} ({', '.join(str(n.target) for n in data)}), as a dict",
                found=len(values),
            )
        values = [_like(example, value) for example, value in zip(examples, values, strict=True)]
        for example, value in zip(examples, values, strict=True):
            _check_input(index, example, value)
        if any(isinstance(v, Tensor) and v.dim() and not len(v) for v in pytree.tree_leaves(values)):
            continue  # no samples: nothing to learn, and reshapes that leave an axis open would be ambiguous
        moved = dict(zip(data, (_moved(v, device) for v in values), strict=True))
        yield [moved[n] if n in moved else model.lifted.tensors[n.name] for n in placeholders]


def _like(example: Any, value: Any) -> Any:
    """``value`` as plain dicts, lists and tuples, without keys (such as labels) that the example lacks."""
    if isinstance(example, Mapping) and isinstance(value, Mapping):
        return {key: _like(example[key], value[key]) for key in example if key in value}
    if isinstance(example, (tuple, list)) and isinstance(value, (tuple, list)) and len(example) == len(value):
        items = [_like(a, b) for a, b in zip(example, value, strict=True)]
        return items if isinstance(value, list) else tuple(items)
    return value


def _moved(value: Any, device: torch.device) -> Any:
    return pytree.tree_map_only(Tensor, lambda t: t.to(device), ordinary(value))


def _check_input(index: int, example: Any, value: Any) -> None:
    """Refuse an input of a calibration batch that isn't like the example's."""
    expected, found = (pytree.tree_leaves_with_path(tree) for tree in (example, value))
    if [path for path, _ in expected] != [path for path, _ in found]:
        raise InputError(
            f"calibration batch {index} is built in another way than example_inputs",
            expected=_outline(example),
            found=_outline(value),
        )
    for (_, fake), (_, tensor) in zip(expected, found, strict=True):
        if not isinstance(tensor, Tensor):
            continue
        shape = tuple(int(hint(s)) for s in fake.shape) if isinstance(fake, Tensor) else None
        if shape is not None and tuple(tensor.shape[1:]) != shape[1:]:
            raise InputError(
                f"calibration batch {index} has the wrong shape",
                expected=f"(batch, {', '.join(map(str, shape[1:]))}), as in example_inputs",
                found=tuple(tensor.shape),
                hint="calibrate with the transform and the resolution of inference",
            )
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            raise InputError(f"calibration batch {index} is not finite", expected="no NaN and no infinity")


def _outline(value: Any) -> str:
    """The kind of an input, and its keys or length."""
    if isinstance(value, Mapping):
        return f"a dict with {', '.join(map(str, value))}"[:100]
    return f"{type(value).__name__} of {len(value)}" if isinstance(value, (tuple, list)) else type(value).__name__


class _Collector(fx.Interpreter):
    """Runs the graph and adds up moments at the layers it watches."""

    def __init__(self, model: Imported, watched: Mapping[fx.Node, tuple[fx.Node, Accumulator]]) -> None:
        super().__init__(model.gm)
        self.watched = watched

    def run_node(self, n: fx.Node) -> Any:
        if n in self.watched:
            source, accumulator = self.watched[n]
            accumulator.add(self.env[source])
        return super().run_node(n)


@exact()
def collect(
    model: Imported,
    values: Iterable[list[Any]],
    sizes: Mapping[str, int],
    budget: float = math.inf,
    kind: str | None = None,
) -> dict[str, Moments]:
    """Moments of the inputs of each layer on the dense model in eval mode, in one pass.

    Args:
        model: the imported model, its nodes carrying shapes.
        values: the graph inputs of every batch, from :func:`batches`.
        sizes: layers to watch, by name -> columns a group (m).
        budget: bytes for all of them together: a layer keeps full moments, else blocks, else the diagonal, as its
            share of what is left allows.
        kind: of all of them, whatever the budget.

    Raises:
        InputError: no batch, or one that the model rejects.
    """
    uses = [layer for layer in layers(model.gm, model.lifted) if layer.name in sizes]
    first = {layer.name: layer for layer in reversed(uses)}
    by_name: dict[str, Accumulator] = {}
    for position, layer in enumerate(sorted(first.values(), key=lambda u: u.weight.tensor.numel())):
        fits, size = kind_for(layer, sizes[layer.name], budget / (len(first) - position))
        by_name[layer.name] = Accumulator(layer, sizes[layer.name], kind or fits)
        budget -= size
    watched = {layer.node: (layer.input, by_name[layer.name]) for layer in uses}
    collector, seen = _Collector(model, watched), 0
    with training_flags(model.gm, False), torch.no_grad():
        for batch in tqdm(values, desc="calibrate", unit="batch", disable=None):
            seen += 1
            try:
                collector.run(*own_copies(model.gm, batch))
            except RuntimeError as error:
                raise InputError(f"the model rejects a calibration batch: {str(error).splitlines()[0]}") from error
    if not seen:
        raise InputError("calibration is empty", expected="at least one batch", found="none")
    return {name: accumulator.result() for name, accumulator in by_name.items()}
