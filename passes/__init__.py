"""Passes turn a graph into a graph and know no engine."""
