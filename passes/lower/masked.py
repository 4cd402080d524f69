"""Lower: replace each masked layer by its engine's operator on packed tensors that the graph owns."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import asdict, dataclass

import torch
from torch import Tensor, fx, nn

from mpcompile.errors import GraphError, first_line
from mpcompile.ir.effects import erase_orphans, storage, written_tensors
from mpcompile.ir.module import IRModule, Lifted
from mpcompile.ir.nodes import argument, element_count, shape_of
from mpcompile.ir.parts import attribute, keep, set_attribute
from mpcompile.ir.view import LayerOp, layers, parameter_read
from mpcompile.kernels.dispatch import Choice, Engine, LayerSpec, choose_all, engine_named
from mpcompile.kernels.nm_format import Pattern, from_rows
from mpcompile.kernels.nm_linear.reference import unpack_rows
from mpcompile.layers import MaskedConv2d, MaskedLinear
from mpcompile.passes.base import Context, Decision, Pass
from mpcompile.passes.rewriting import fold_read
from mpcompile.plan import LayerPlan

PACKED = "packed"


@dataclass
class Slot:
    """One lowered weight: its origin, and the buffers that hold its packed form.

    :meth:`fill` packs another weight of the same shape into the same buffers, so that compiled code that holds them
    sees it.

    Attributes:
        name: the layer.
        weight, mask: the nodes that held the dense weight and its mask; None inside a module.
        chosen: the mask that the weight is packed under.
        buffers: the packed tensors, by their names in the engine.
        weight_rows, mask_rows: the rows that the layer takes of the weight and of the mask; None for all.
    """

    name: str
    weight: fx.Node | None
    mask: fx.Node | None
    chosen: Tensor
    spec: LayerSpec
    engine: Engine
    buffers: dict[str, Tensor]
    weight_rows: slice | None = None
    mask_rows: slice | None = None

    @torch.no_grad()
    def fill(self, weight: Tensor, mask: Tensor) -> None:
        """Pack a weight under a mask into the buffers, in place.

        Args:
            weight, mask: the whole tensors, also where the layer takes rows of them.

        Raises:
            GraphError: the packed form is larger than the buffers.
        """
        weight = weight.detach() if self.weight_rows is None else weight.detach()[self.weight_rows]
        mask = mask if self.mask_rows is None else mask[self.mask_rows]
        for key, value in self.engine.pack(weight, mask, self.spec).items():
            buffer = self.buffers[key]
            if value.numel() > buffer.numel():
                raise GraphError(
                    "its new mask does not fit into the packed weight's buffers",
                    layer=self.name,
                    expected=f"at most {buffer.numel()} elements",
                    found=value.numel(),
                    hint="compile again: torch._dynamo.reset()",
                )
            if value.shape != buffer.shape:  # compiled code holds the buffer: the rest of it stays unused
                buffer.zero_()
                buffer = buffer[: value.numel()]
            buffer.copy_(value)

    @property
    def nbytes(self) -> int:
        """Bytes of the packed form."""
        return sum(b.numel() * b.element_size() for b in self.buffers.values())

    @property
    def dense_nbytes(self) -> int:
        """Bytes of the dense weight that it replaces."""
        return element_count(self.spec.shape) * self.spec.dtype.itemsize


@dataclass(frozen=True)
class Slots:
    """The result of Lower: a slot for each lowered weight."""

    slots: list[Slot]


@dataclass(frozen=True)
class EngineChoice:
    """The engine of one layer, and the candidates that it was chosen from.

    Attributes:
        engine: name of the engine.
        why: the reason for the choice.
        us, dense_us: microseconds of the chosen engine, and those that a sparse engine must beat; None where nothing
            was timed.
        tokens: rows of the layer's input that the timings hold for.
        candidates: engine -> its microseconds, or why it cannot run the layer, or None where it was not timed.
    """

    engine: str
    why: str
    us: float | None
    dense_us: float | None
    tokens: int | None
    candidates: Mapping[str, float | str | None]


@dataclass(frozen=True, eq=False)
class Lowering(Decision):
    """Layer name -> its engine; and layers that stay masked and dense -> why."""

    engines: Mapping[str, EngineChoice]
    left: Mapping[str, str]


def spec_of(layer: LayerOp, pattern: Pattern | None = None) -> LayerSpec:
    """Return a layer as engines see it, under its mask's pattern or the one given."""
    pattern = pattern or layer.pattern
    weight, geometry = layer.weight.tensor, layer.geometry
    axes = (geometry.stride, geometry.padding, geometry.dilation, geometry.groups) if geometry is not None else None
    assert pattern is not None  # callers pass masked layers, or a pattern
    return LayerSpec(tuple(weight.shape), weight.dtype, weight.device, pattern, axes, shape_of(layer.input))


def describe(spec: LayerSpec, choice: Choice) -> EngineChoice:
    """Return an engine's choice with its microseconds rounded to the nanosecond."""
    candidates = {c.name: c.reason if c.us is None else round(c.us, 3) for c in choice.candidates}
    us, dense_us = (None if figure is None else round(figure, 3) for figure in (choice.us, choice.dense_us))
    return EngineChoice(choice.engine.name, choice.why, us, dense_us, spec.tokens, candidates)


class Lower(Pass):
    """Masked layers -> packed layers. Afterwards the graph is for inference only.

    Args:
        measured: time every engine even if the config names one.
        progress: False shows no progress bar; None shows one on a terminal.

    Example:
        >>> from mpcompile import Pipeline
        >>> Pipeline([*Pipeline(), Lower()])
        Pipeline([analyze, allocate, permute, merge_tokens, mask, restore, skip_dead_tokens, lower])
    """

    name = "lower"
    decision_type = Lowering
    provides = (Slots,)
    closes_accounts = True

    def __init__(self, *, measured: bool = False, progress: bool | None = None) -> None:
        super().__init__()
        self.measured, self.progress = measured, progress

    def plan(self, gm: IRModule, ctx: Context) -> Lowering:
        specs: dict[str, LayerSpec] = {}
        left: dict[str, str] = {}
        changing = written_tensors(gm, ctx.lifted)
        for layer in layers(gm, ctx.lifted):
            if layer.pattern is None or layer.mask is None:
                continue
            if changing.intersection((storage(layer.weight.tensor), storage(layer.mask.tensor))):
                left[layer.name] = "the graph itself writes into its weight: it stays masked and dense"
            else:
                specs.setdefault(layer.name, spec_of(layer))  # a shared weight is judged by its first use
        choices = choose_all(
            list(specs.values()),
            ctx.config.engine,
            measured=self.measured,
            frozen=ctx.config.frozen,
            progress=self.progress,
        )
        return Lowering({name: describe(spec, c) for (name, spec), c in zip(specs.items(), choices, strict=True)}, left)

    def summary(self, decision: Lowering) -> str:
        names = [choice.engine for choice in decision.engines.values()]
        text = ", ".join(f"{names.count(n)} layers on {n}" for n in sorted(set(names))) or "nothing to lower"
        return text + "".join(f"; {name}: {why}" for name, why in decision.left.items())

    @torch.no_grad()
    def apply(self, gm: IRModule, decision: Lowering, ctx: Context) -> bool:
        slots: dict[str, Slot] = {}
        functional: set[str] = set()  # paths of dense tensors that the graph reads
        for layer in layers(gm, ctx.lifted):
            choice = decision.engines.get(layer.name)
            if choice is None or layer.mask is None:
                continue
            readers = [ref.whole or ref.node for ref in (layer.weight, layer.mask)]
            functional |= {str(node.target) for node in readers if node is not None and node.op == "get_attr"}
            slot = slots.get(layer.name)
            if slot is None:
                slot = slots[layer.name] = _pack(gm, layer, engine_named(choice.engine), ctx.lifted)
                entry = LayerPlan(layer.kind, slot.spec.shape, str(layer.pattern), None, slot.spec.pattern.density)
                notes = ctx.plan.layers.setdefault(layer.name, entry).notes
                notes["lower"] = {**asdict(choice), "bytes": slot.nbytes}
            _replace(gm, layer, slot)
        _fold_reads(gm, {*functional, *(f"{name}.weight" for name in slots)})
        _strip(gm, {*slots, *(path.removesuffix(".weight") for path in functional)})
        _drop_unread(gm, functional)
        gm.delete_all_unused_submodules()
        ctx.results.put(Slots(list(slots.values())))
        return bool(slots)


def _pack(gm: IRModule, layer: LayerOp, engine: Engine, lifted: Lifted) -> Slot:
    """Pack a layer's weight into buffers of the graph.

    Raises:
        GraphError: there is not enough memory.
    """
    spec = spec_of(layer)
    assert layer.mask is not None  # apply() skips layers without one
    try:
        packed = engine.pack(layer.weight.tensor.detach(), layer.mask.tensor, spec)
    except (RuntimeError, MemoryError) as error:
        if isinstance(error, RuntimeError) and "memory" not in str(error):
            raise
        size = element_count(spec.shape) * spec.dtype.itemsize / 2**20
        raise GraphError(
            "there is not enough memory to pack its weight",
            layer=layer.name,
            expected=f"a few times {size:,.0f} MiB",
            found=first_line(error),
            hint="leave the layer dense (exclude=...), or give the process more memory",
        ) from error
    keep(gm, f"{PACKED}.{layer.name}", packed)
    weight, mask = layer.weight, layer.mask
    chosen = parameter_read(gm, mask.whole, lifted) if mask.whole is not None else mask
    assert chosen is not None  # the layer's mask is rows of it
    nodes = (weight.whole or weight.node, mask.whole or mask.node)
    return Slot(layer.name, *nodes, chosen.tensor, spec, engine, packed, weight.rows, mask.rows)


def _replace(gm: IRModule, layer: LayerOp, slot: Slot) -> None:
    """Replace one use of a layer by its engine's operator."""
    graph, node = gm.graph, layer.node
    with graph.inserting_before(node):
        packed = {key: graph.get_attr(f"{PACKED}.{layer.name}.{key}") for key in slot.buffers}
        bias = layer.bias
        if node.op == "call_module" and bias is not None:
            bias = graph.get_attr(f"{layer.name}.bias")
        source = argument(node, 0, "input")  # not layer.input: that layer may have been replaced since
        target, args = slot.engine.call(slot.spec, source, packed, bias)
        new = graph.call_function(target, args)
    new.meta = dict(node.meta)
    node.replace_all_uses_with(new)
    graph.erase_node(node)
    erase_orphans(graph, (ref.node for ref in (layer.weight, layer.mask) if ref is not None))


def _fold_reads(gm: IRModule, paths: Collection[str]) -> None:
    """Replace reads of a packed weight's dtype or shape by constants: they need no dense copy of the weight."""
    for node in list(gm.graph.nodes):
        if node.op != "get_attr" or str(node.target) not in paths:
            continue
        tensor = attribute(gm, str(node.target))
        constants = {"dtype": tensor.dtype, "shape": tuple(tensor.shape), "ndim": tensor.dim()}
        for read in [u for u in node.users if u.target is getattr and u.args[1] in constants]:
            fold_read(read, constants[str(read.args[1])])
            gm.graph.erase_node(read)
        erase_orphans(gm.graph, [node])


def _strip(gm: IRModule, names: Iterable[str]) -> None:
    """Replace modules whose layers are packed by holders of the tensors that the graph still reads."""
    read: dict[str, set[str]] = {}
    called = {str(node.target) for node in gm.graph.nodes if node.op == "call_module"}
    for node in gm.graph.nodes:
        owner, _, leaf = str(node.target).rpartition(".")
        if node.op == "get_attr":
            read.setdefault(owner, set()).add(leaf)
    for name in names:
        module = gm.get_submodule(name) if name in read and name not in called else None
        if not isinstance(
            module, (MaskedLinear, MaskedConv2d, nn.Linear)
        ):  # nn.Linear: its rows have masks of their own
            continue
        holder = nn.Module()
        for leaf in sorted(read[name]):
            tensor = getattr(module, leaf)
            if isinstance(tensor, nn.Parameter):
                holder.register_parameter(leaf, tensor)
            else:
                holder.register_buffer(leaf, tensor)
        set_attribute(gm, name, holder)


def _drop_unread(gm: IRModule, names: Iterable[str]) -> None:
    """Delete tensors that packed ones replace, unless the graph still reads them or a layer holds them."""
    read = {str(node.target) for node in gm.graph.nodes if node.op == "get_attr"}
    for name in set(names) - read:
        owner, _, leaf = name.rpartition(".")
        holder = gm.get_submodule(owner)
        held = leaf in holder._parameters or leaf in holder._buffers
        if held and (holder is gm or type(holder) is nn.Module):
            delattr(holder, leaf)


def unpacked(slot: Slot) -> Tensor:
    """Return the dense weight that a slot of the reference engine holds, for checks."""
    k = element_count(slot.spec.shape[1:])
    rows = unpack_rows(slot.buffers["values"], slot.buffers["words"], *slot.spec.pattern, k)
    return from_rows(rows, slot.spec.shape)
