"""Enclosures: sets that hold every value a network can take on a segment, and the rule of each operator."""
