"""Packed weights of a file: kept values, masks as numbers, and the nodes that read them."""
