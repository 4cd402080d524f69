"""The GPU engines: tiles, compilation for a named architecture, and launches."""

from mpcompile import _moved

_MOVED = {
    "TensorCoreEngine": "kernels.nm_linear.gpu.engine.TensorCoreEngine",
    "unsupported": "kernels.nm_linear.gpu.engine.unsupported",
}
__getattr__ = _moved.renamed(__name__, _MOVED)
