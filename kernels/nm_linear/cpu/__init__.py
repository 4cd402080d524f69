"""The CPU engine: C++ kernels for any N:M, built on the machine that runs them."""

from mpcompile import _moved

__getattr__ = _moved.names(__name__)  # names from before this was a package
