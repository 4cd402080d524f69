"""Artifacts: a transformed or lowered model as one safetensors file, without pickle."""

from mpcompile import _moved
from mpcompile.artifact.file import load, save

__all__ = ["load", "save"]

__getattr__ = _moved.names(__name__)  # names from before this was a package
