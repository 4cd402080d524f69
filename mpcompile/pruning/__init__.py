"""Pruning: scores, reconstruction, and layer budgets. Functions of tensors; this package contains no passes."""
