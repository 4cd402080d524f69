"""Multiply-accumulates of a run, as the Plan reports them, and the entries of layers that are split by rows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from mpcompile.ir import spec
from mpcompile.ir.macs import count, node_macs
from mpcompile.ir.module import IRModule
from mpcompile.ir.nodes import element_count
from mpcompile.ir.parts import split_name
from mpcompile.passes.base import Context
from mpcompile.passes.dead_tokens import skips_tokens
from mpcompile.plan import LayerPlan, Macs, Plan, is_lowered

ROWS = "rows"  # key in the notes of a layer that is split by rows: name of each part -> what was done to it
_SUMS = ("us", "dense_us", "bytes")  # figures of lowering that add up over the parts of a layer


class Accounts:
    """Multiply-accumulates of one run: of the dense model, and of the graph with its masks and merges.

    Packed layers show no patterns, and merged tokens can't be counted any more, nor can those that were skipped. So
    figures of the dense model are taken from the plan that the graph came with, and nothing is counted behind a pass
    that closes the accounts.
    """

    def __init__(self, gm: IRModule, ctx: Context) -> None:
        plan = ctx.plan
        known = plan.macs.dense > 0
        lowered = is_lowered(gm, plan)
        self.lifted = ctx.lifted
        self.macs: Macs | None = plan.macs if known and lowered else None
        self.executed = {name: entry.macs_executed for name, entry in plan.layers.items()} if self.macs else {}
        self.dense, self.layers = count(gm, lifted=ctx.lifted)[0].dense, node_macs(gm, ctx.lifted)
        if known and (lowered or _has_fewer_tokens(gm, plan)):
            self.dense = plan.macs.dense
            self.layers |= {name: entry.macs_dense for name, entry in plan.layers.items() if entry.macs_dense}

    def close(self, gm: IRModule) -> None:
        """Count the graph, at the first call only."""
        if self.macs is None:
            self.macs, self.executed = count(gm, self.dense, self.lifted)

    def enter(self, plan: Plan) -> None:
        """Put the figures into a plan, and make one entry of each layer that is split by rows."""
        assert self.macs is not None  # close() comes first
        plan.macs = self.macs
        executed: dict[str, int] = {}
        for name, macs in self.executed.items():
            owner = name if name in plan.layers else owner_of(name, plan.layers) or name
            executed[owner] = executed.get(owner, 0) + macs
        for name, entry in plan.layers.items():
            entry.macs_dense = self.layers.get(name, 0)
            entry.macs_executed = executed.get(name, entry.macs_dense)
        join_rows(plan)


def _has_fewer_tokens(gm: IRModule, plan: Plan) -> bool:
    """Return True if a graph merges tokens, or computes only those that its outputs read."""
    return skips_tokens(plan) or any(spec.family_of(node) not in (None, "masked") for node in gm.graph.nodes)


def owner_of(name: str, layers: Mapping[str, LayerPlan]) -> str | None:
    """Return the layer in the table that a layer is some rows of, or None.

    Example:
        >>> owner_of("qkv.weight_rows_0_4", {"qkv": LayerPlan("linear", (12, 4))})
        'qkv'
    """
    part = split_name(name)
    if part is None:
        return None
    whole, rows = part
    for other in layers:
        if other == whole.removesuffix(".weight"):
            return other
        wider = split_name(other) if other != name else None
        if wider is not None and wider[0] == whole and wider[1].start <= rows.start and rows.stop <= wider[1].stop:
            return other
    return None


def join_rows(plan: Plan) -> None:
    """Make the entries of layers that are rows of another layer part of its entry, under ``notes["rows"]``.

    Parts with different patterns keep entries of their own, in place of that of the whole.
    """
    parts: dict[str, list[str]] = {}
    for name in plan.layers:
        owner = owner_of(name, plan.layers)
        if owner is not None:
            parts.setdefault(owner, []).append(name)
    gone: set[str] = set()
    for owner, names in parts.items():
        its = {name: plan.layers[name] for name in names}
        if len({part.pattern for part in its.values()}) > 1:
            gone.add(owner)
        else:
            gone.update(names)
            _join(plan.layers[owner], its)
    plan.layers = {name: entry for name, entry in plan.layers.items() if name not in gone}


def _join(whole: LayerPlan, parts: Mapping[str, LayerPlan]) -> None:
    """Add what was done to the parts of a layer to its entry."""
    entries = list(parts.values())
    known = whole.notes.get(ROWS, {})
    sizes = [element_count(entry.shape) for entry in entries]
    whole.pattern, whole.reason = entries[0].pattern, entries[0].reason
    whole.density = sum(entry.density * size for entry, size in zip(entries, sizes, strict=True)) / max(1, sum(sizes))
    if any(entry.macs_executed for entry in entries):
        whole.macs_executed = sum(entry.macs_executed for entry in entries)
    for key in dict.fromkeys(key for entry in entries for key in entry.notes):
        notes = [entry.notes[key] for entry in entries if key in entry.notes]
        if key == "lower" or key not in whole.notes:
            whole.notes[key] = _shared(notes)
    whole.notes[ROWS] = known | {name: known.get(name, {}) | entry.notes for name, entry in parts.items()}


def _shared(notes: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return the notes of a pass that hold for all parts of a layer: equal values, and the sums of times and bytes."""
    shared = {key: value for key, value in notes[0].items() if all(note.get(key) == value for note in notes)}
    for key in _SUMS:
        figures = [note.get(key) for note in notes]
        if all(isinstance(figure, (int, float)) for figure in figures):
            shared[key] = sum(figure for figure in figures if figure is not None)
    if "engine" in notes[0]:
        shared["engine"] = " + ".join(dict.fromkeys(str(note["engine"]) for note in notes))
    return shared
