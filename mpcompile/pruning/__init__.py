"""Pruning: scores, reconstruction, and the budget of each layer. Functions of tensors; no pass."""
