"""Calibration: batches of unlabelled inputs, and the statistics of each layer on them."""

from mpcompile import _moved
from mpcompile.calibration.moments import Moments
from mpcompile.data.labels import draw

__all__ = ["Moments", "draw"]

_MOVED = {
    "Accumulator": "calibration.moments.Accumulator",
    "as_batches": "calibration.data.as_batches",
    "batches": "calibration.data.batches",
    "collect": "calibration.moments.collect",
    "input_rows": "calibration.moments.input_rows",
    "kind_for": "calibration.moments.kind_for",
    "model_inputs": "calibration.data.model_inputs",
    "output_rows": "calibration.moments.output_rows",
    "peek": "calibration.data.peek",
}
__getattr__ = _moved.renamed(__name__, _MOVED)
