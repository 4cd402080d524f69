"""Lowerings: masked layers become their engine's operator on packed tensors; attention becomes the CPU's kernel."""

from mpcompile.passes.lower.attention import AttentionLowering, LowerAttention
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
    "EngineChoice",
    "Lower",
    "LowerAttention",
    "Lowering",
    "Slot",
    "Slots",
    "describe",
    "spec_of",
    "unpacked",
]
