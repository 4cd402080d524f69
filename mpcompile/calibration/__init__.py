"""Calibration: batches of unlabelled inputs, and the statistics of each layer that are gathered from them."""

from mpcompile import _moved
from mpcompile.calibration.data import draw
from mpcompile.calibration.moments import Moments

__all__ = ["Moments", "draw"]

__getattr__ = _moved.names(__name__)  # names from before this was a package
