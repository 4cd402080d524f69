"""The GPU engines: tiles, compilation for a named GPU, and launches."""

from mpcompile import _moved

__getattr__ = _moved.names(__name__)  # names from before this was a package
