"""Reconstruct: train masked regions towards the dense model's activations, without labels."""

from mpcompile.passes.reconstruct.decide import Rebuilt, Reconstruct, Reconstructed

__all__ = ["Rebuilt", "Reconstruct", "Reconstructed"]
