"""Lower: replace each masked layer by its engine's operator on packed tensors that the graph owns."""

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

__all__ = ["PACKED", "EngineChoice", "Lower", "Lowering", "Slot", "Slots", "describe", "spec_of", "unpacked"]
