"""Calibration: batches of unlabelled inputs, and the statistics of each layer that are gathered from them."""

from mpcompile.calibration.moments import Moments, draw

__all__ = ["Moments", "draw"]
