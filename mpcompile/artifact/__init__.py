"""Artifacts: a transformed or lowered model as one safetensors file, without pickle."""

from mpcompile import _moved
from mpcompile.artifact.loading import load
from mpcompile.artifact.saving import save

__all__ = ["load", "save"]

_MOVED = {
    "assemble": "artifact.loading.assemble",
    "check_folder": "artifact.saving.check_folder",
    "describe": "artifact.saving.describe",
}
__getattr__ = _moved.renamed(__name__, _MOVED)
