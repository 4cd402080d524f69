"""Lower: replace each masked layer by its engine's operator on packed tensors that the graph owns."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from mpcompile.errors import GraphError, first_line
from mpcompile.ir.effects import erase_orphans, storage, written_tensors
from mpcompile.ir.module import IRModule
from mpcompile.ir.nodes import argument, element_count, shape_of
from mpcompile.ir.parts import keep, set_attribute
from mpcompile.ir.view import LayerOp, layers
from mpcompile.kernels.dispatch import Choice, Engine, LayerSpec, choose_all, engine_named
from mpcompile.kernels.nm_format import from_rows
from mpcompile.kernels.nm_linear.reference import unpack_rows
from mpcompile.layers import MaskedConv2d, MaskedLinear
from mpcompile.passes.base import Context, Pass
from mpcompile.plan import LayerPlan

PACKED = "packed"


@dataclass
class Slot:
    """One lowered weight: where it comes from, and the buffers that hold its packed form.

    :meth:`fill` packs another weight of the same shape into the same buffers, so that compiled code that holds them
    sees it.

    Attributes:
        weight, mask: the nodes that brought in what was packed, or None inside a module.
        chosen: the mask.
    """

    name: str
    weight: fx.Node | None
    mask: fx.Node | None
    chosen: Tensor
    spec: LayerSpec
    engine: Engine
    buffers: dict[str, Tensor]

    @torch.no_grad()
    def fill(self, weight: Tensor, mask: Tensor) -> None:
        """Pack ``weight`` under ``mask`` into the buffers, in place."""
        for key, value in self.engine.pack(weight.detach(), mask, self.spec).items():
            buffer = self.buffers[key]
            if value.numel() > buffer.numel():
                raise GraphError(
                    "its new mask doesn't fit into the packed weight's buffers",
                    layer=self.name,
                    expected=f"at most {buffer.numel()} elements",
                    found=value.numel(),
                    hint="compile again: torch._dynamo.reset()",
                )
            if value.shape != buffer.shape:  # compiled code holds the buffer: what is left of it stays unused
                buffer.zero_()
                buffer = buffer[: value.numel()]
            buffer.copy_(value)

    @property
    def nbytes(self) -> int:
        """Bytes of the packed form."""
        return sum(b.numel() * b.element_size() for b in self.buffers.values())

    @property
    def dense_nbytes(self) -> int:
        """Bytes of the weight that it replaces."""
        return element_count(self.spec.shape) * self.spec.dtype.itemsize


def spec_of(layer: LayerOp) -> LayerSpec:
    """The layer as engines see it."""
    weight, geometry = layer.weight.tensor, layer.geometry
    axes = (geometry.stride, geometry.padding, geometry.dilation, geometry.groups) if geometry is not None else None
    assert layer.pattern is not None  # callers pass masked layers
    return LayerSpec(tuple(weight.shape), weight.dtype, weight.device, layer.pattern, axes, shape_of(layer.input))


def describe(spec: LayerSpec, choice: Choice) -> dict[str, Any]:
    """A choice as JSON values: a candidate's microseconds, or why it can't run the layer, or None (not timed)."""
    candidates = {c.name: c.reason if c.us is None else round(c.us, 3) for c in choice.candidates}
    us, dense_us = (None if figure is None else round(figure, 3) for figure in (choice.us, choice.dense_us))
    return {
        "engine": choice.engine.name,
        "why": choice.why,
        "us": us,
        "dense_us": dense_us,
        "tokens": spec.tokens,
        "candidates": candidates,
    }


class Lower(Pass):
    """Masked layers -> packed layers. Afterwards the graph is for inference; its slots are in :attr:`slots`.

    Args:
        measured: time every engine also where the config names one.
        progress: False shows no progress bar; None shows one on a terminal.

    Example:
        >>> from mpcompile import Pipeline
        >>> Pipeline([*Pipeline(), Lower()])
        Pipeline([analyze, allocate, permute, merge_tokens, mask, restore, lower])
    """

    name = "lower"
    closes_accounts = True

    def __init__(self, *, measured: bool = False, progress: bool | None = None) -> None:
        super().__init__()
        self.measured, self.progress = measured, progress
        self.slots: list[Slot] = []

    def plan(self, gm: IRModule, ctx: Context) -> dict[str, Any]:
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
        engines = {name: describe(spec, c) for (name, spec), c in zip(specs.items(), choices, strict=True)}
        return {"engines": engines, "left": left}

    def summary(self, decision: dict[str, Any]) -> str:
        names = [e["engine"] for e in decision["engines"].values()]
        text = ", ".join(f"{names.count(n)} layers on {n}" for n in sorted(set(names))) or "nothing to lower"
        return text + "".join(f"; {name}: {why}" for name, why in decision["left"].items())

    @torch.no_grad()
    def apply(self, gm: IRModule, decision: dict[str, Any], ctx: Context) -> bool:
        done: dict[str, Slot] = {}
        for layer in layers(gm, ctx.lifted):
            if layer.name not in decision["engines"] or layer.mask is None:
                continue
            slot = done.get(layer.name)
            if slot is None:
                slot = done[layer.name] = self._slot(gm, layer, decision["engines"][layer.name]["engine"])
                entry = LayerPlan(layer.kind, slot.spec.shape, str(layer.pattern), None, slot.spec.pattern.density)
                notes = ctx.plan.layers.setdefault(layer.name, entry).notes
                notes["lower"] = {**decision["engines"][layer.name], "bytes": slot.nbytes}
            self._replace(gm, layer, slot)
        self._fold_reads(gm, {slot.name: slot for slot in done.values()})
        self._strip(gm, done)
        gm.delete_all_unused_submodules()
        self.slots = list(done.values())
        return bool(done)

    def _slot(self, gm: IRModule, layer: LayerOp, name: str) -> Slot:
        spec = spec_of(layer)
        engine = engine_named(name)
        assert layer.mask is not None  # apply() skips layers without one
        try:
            packed = engine.pack(layer.weight.tensor.detach(), layer.mask.tensor, spec)
        except (RuntimeError, MemoryError) as error:
            if isinstance(error, RuntimeError) and "memory" not in str(error):
                raise
            size = element_count(spec.shape) * spec.dtype.itemsize / 2**20
            raise GraphError(
                "there is no memory to pack its weight in",
                layer=layer.name,
                expected=f"a few times {size:,.0f} MiB",
                found=first_line(error),
                hint="leave the layer dense (exclude=...), or give the process more memory",
            ) from error
        keep(gm, f"{PACKED}.{layer.name}", packed)
        mask = layer.mask
        return Slot(layer.name, layer.weight.node, mask.node, mask.tensor, spec, engine, packed)

    def _replace(self, gm: IRModule, layer: LayerOp, slot: Slot) -> None:
        graph, node = gm.graph, layer.node
        prefix = f"{PACKED}.{layer.name}"
        with graph.inserting_before(node):
            packed = {key: graph.get_attr(f"{prefix}.{key}") for key in slot.buffers}
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

    @staticmethod
    def _fold_reads(gm: IRModule, slots: Mapping[str, Slot]) -> None:
        """A graph that asks a packed weight for its dtype or shape alone needs no dense copy for the answer."""
        for node in list(gm.graph.nodes):
            slot = slots.get(str(node.target).removesuffix(".weight")) if node.op == "get_attr" else None
            if slot is None:
                continue
            known = {"dtype": slot.spec.dtype, "shape": slot.spec.shape, "ndim": len(slot.spec.shape)}
            for read in [u for u in node.users if u.target is getattr and u.args[1] in known]:
                value = known[str(read.args[1])]
                for user in list(read.users):
                    known_now: Any = {read: value}
                    user.args = fx.node.map_arg(user.args, lambda n, to=known_now: to.get(n, n))  # type: ignore[misc]
                    user.kwargs = fx.node.map_arg(user.kwargs, lambda n, to=known_now: to.get(n, n))  # type: ignore[misc]
                gm.graph.erase_node(read)
            erase_orphans(gm.graph, [node])

    @staticmethod
    def _strip(gm: IRModule, names: Iterable[str]) -> None:
        """Of modules whose layers are packed, only the tensors that the graph still reads stay, under their names."""
        read: dict[str, set[str]] = {}
        called = {str(node.target) for node in gm.graph.nodes if node.op == "call_module"}
        for node in gm.graph.nodes:
            owner, _, leaf = str(node.target).rpartition(".")
            if node.op == "get_attr":
                read.setdefault(owner, set()).add(leaf)
        for name in names:
            module = gm.get_submodule(name) if name in read and name not in called else None
            if not isinstance(module, (MaskedLinear, MaskedConv2d)):
                continue
            holder = nn.Module()
            for leaf in read[name]:
                tensor = getattr(module, leaf)
                if isinstance(tensor, nn.Parameter):
                    holder.register_parameter(leaf, tensor)
                else:
                    holder.register_buffer(leaf, tensor)
            set_attribute(gm, name, holder)


def unpacked(slot: Slot) -> Tensor:
    """The dense weight that a reference slot holds, for checks."""
    k = element_count(slot.spec.shape[1:])
    rows = unpack_rows(slot.buffers["values"], slot.buffers["words"], *slot.spec.pattern, k)
    return from_rows(rows, slot.spec.shape)
