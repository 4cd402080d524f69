"""Dead tokens: compute for each node only the tokens that something reads."""

from mpcompile.passes.dead_tokens.skip import SkipDeadTokens

__all__ = ["SkipDeadTokens"]
