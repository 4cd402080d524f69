"""Which weights to keep: scores, reconstruction, and the budget of each layer. Pure functions of tensors."""
