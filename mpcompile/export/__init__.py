"""Export: a lowered or transformed model in the forms that other programs run."""

from mpcompile import _moved
from mpcompile.export.programs import dense_state, program

__all__ = ["dense_state", "program"]

_MOVED = {
    "run_exported": "export.programs.run_exported",
    "save_aoti": "export.programs.save_aoti",
    "save_dense": "export.programs.save_dense",
    "save_onnx": "export.programs.save_onnx",
    "save_pt2": "export.programs.save_pt2",
}
__getattr__ = _moved.renamed(__name__, _MOVED)
