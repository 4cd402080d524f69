"""Biases of attention with a value for every pair of tokens: which of them may follow a merge, and how."""
