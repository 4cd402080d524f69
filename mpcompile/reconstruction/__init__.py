"""Reconstruction: kept weights of a masked model, trained region by region towards the dense model's activations."""
