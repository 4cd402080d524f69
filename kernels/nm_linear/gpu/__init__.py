"""The GPU engines: tiles, compilation for a named GPU, and launches."""
