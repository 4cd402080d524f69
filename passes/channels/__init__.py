"""Channels: which axes of which weights hold the same channels, and so may be reordered together."""
