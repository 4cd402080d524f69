"""Export: a lowered or transformed model in the forms that other programs run."""

from mpcompile.export.programs import dense_state, program

__all__ = ["dense_state", "program"]
