"""Channels: which axes of which weights are the same channels, and how they may be reordered."""
