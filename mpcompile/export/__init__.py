"""Export: a lowered or transformed model in the forms that other programs run."""

from mpcompile.export.programs import (
    EXPORTS,
    FORMATS,
    dense_state,
    program,
    run_exported,
    save_aoti,
    save_dense,
    save_onnx,
    save_pt2,
)

__all__ = [
    "EXPORTS",
    "FORMATS",
    "dense_state",
    "program",
    "run_exported",
    "save_aoti",
    "save_dense",
    "save_onnx",
    "save_pt2",
]
