"""Export: a lowered or transformed model in the forms that other programs run."""

from mpcompile import _moved
from mpcompile.export.programs import dense_state, program

__all__ = ["dense_state", "program"]

__getattr__ = _moved.names(__name__)  # names from before this was a package
