"""Merge tokens: ToMe inserted after the attention residual of every block, and the token axis followed from there."""

from mpcompile import _moved
from mpcompile.passes.merge_tokens.insert import MergeTokens

__all__ = ["MergeTokens"]

__getattr__ = _moved.names(__name__)  # names from before this was a package
