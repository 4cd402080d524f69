"""Bring a model into the IR: by symbolic tracing, or from a captured graph and its mode."""
