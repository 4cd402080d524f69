"""Artifacts: a transformed or lowered model as one safetensors file, without pickle."""

from mpcompile import _moved
from mpcompile.artifact.file import load, save

__all__ = ["load", "save"]

_MOVED = {
    "assemble": "artifact.file.assemble",
    "check_folder": "artifact.file.check_folder",
    "describe": "artifact.file.describe",
}
__getattr__ = _moved.renamed(__name__, _MOVED)
