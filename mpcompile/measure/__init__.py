"""Measuring models: audits, explanations, accuracy, and the environment of a run."""
