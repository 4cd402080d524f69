"""Merge tokens: ToMe inserted after the attention residual of every block, and the token axis followed from there."""

from mpcompile.passes.merge_tokens.insert import MergeTokens

__all__ = ["MergeTokens"]
