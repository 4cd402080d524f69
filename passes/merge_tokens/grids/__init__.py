"""Tokens on a grid, (B, C, H, W) or (B, H, W, C): streams of that shape, and the way back to a grid of all tokens."""
