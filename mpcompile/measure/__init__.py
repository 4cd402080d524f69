"""What a model does: audits, explanations and accuracy."""
