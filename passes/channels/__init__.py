"""Channels: which axes of which weights are the same channels, and so may be reordered together."""
