"""Calibration: batches of unlabelled inputs, and the statistics of each layer that are gathered from them."""

from mpcompile.calibration.data import draw
from mpcompile.calibration.moments import Moments

__all__ = ["Moments", "draw"]
