"""Artifacts: a transformed or lowered model as one safetensors file, without pickle."""

from mpcompile.artifact.file import load, save

__all__ = ["load", "save"]
