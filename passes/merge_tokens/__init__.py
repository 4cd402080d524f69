"""Merge tokens: ToMe inserted after the attention residual of every block, and the token axis followed from there."""

from mpcompile import _moved
from mpcompile.passes.merge_tokens.insert import MergeTokens

__all__ = ["MergeTokens"]

_MOVED = {
    "merging_cost": "passes.merge_tokens.insert.merging_cost",
    "unmerged": "passes.merge_tokens.insert.unmerged",
}
__getattr__ = _moved.renamed(__name__, _MOVED)
