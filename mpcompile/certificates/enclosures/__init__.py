"""Enclosures: sets that contain every value of a network on a segment, and the rule of each operator."""
