"""Dead tokens: compute for each node only the tokens that something reads."""

from mpcompile.passes.dead_tokens.skip import SkipDeadTokens, skips_tokens

__all__ = ["SkipDeadTokens", "skips_tokens"]
