"""Merge tokens: inserted after the attention residual of every block; the token axis is followed from there."""

from mpcompile import _moved
from mpcompile.passes.merge_tokens.insert import MergeTokens

__all__ = ["MergeTokens"]

_MOVED = {
    "merging_cost": "passes.merge_tokens.insert.merging_cost",
    "unmerged": "passes.merge_tokens.insert.unmerged",
}
__getattr__ = _moved.renamed(__name__, _MOVED)
