"""Rewrite an imported graph to the forms that passes know."""
