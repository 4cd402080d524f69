"""Bring a model into the IR: symbolic tracing, captured graphs, and the modes that they stand for."""
