"""Export: models in the formats that other programs run. One file per format."""

from mpcompile.export.aoti import save_aoti
from mpcompile.export.dense import dense_state, save_dense
from mpcompile.export.formats import EXPORTS, FORMATS, run_exported
from mpcompile.export.onnx import save_onnx
from mpcompile.export.pt2 import MAX_BATCH, program, save_pt2

__all__ = [
    "EXPORTS",
    "FORMATS",
    "MAX_BATCH",
    "dense_state",
    "program",
    "run_exported",
    "save_aoti",
    "save_dense",
    "save_onnx",
    "save_pt2",
]
