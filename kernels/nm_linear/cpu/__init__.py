"""The CPU engine: C++ kernels for any N:M pattern, compiled on the machine that runs them."""

from mpcompile import _moved

_MOVED = {
    "CpuEngine": "kernels.nm_linear.cpu.engine.CpuEngine",
    "layout_of": "kernels.nm_linear.cpu.engine.layout_of",
    "multiplies_pairs": "kernels.nm_linear.cpu.engine.multiplies_pairs",
}
__getattr__ = _moved.renamed(__name__, _MOVED)
