"""Lowerings: replace layers and attention by the operators of engines, on packed tensors that the graph owns."""

from mpcompile.passes.lower.attention import AttentionLowering, LowerAttention
from mpcompile.passes.lower.dense import DenseLowering, LowerDense
from mpcompile.passes.lower.masked import (
    PACKED,
    EngineChoice,
    Lower,
    Lowering,
    Slot,
    Slots,
    describe,
    spec_of,
    unpacked,
)

__all__ = [
    "PACKED",
    "AttentionLowering",
    "DenseLowering",
    "EngineChoice",
    "Lower",
    "LowerAttention",
    "LowerDense",
    "Lowering",
    "Slot",
    "Slots",
    "describe",
    "spec_of",
    "unpacked",
]
