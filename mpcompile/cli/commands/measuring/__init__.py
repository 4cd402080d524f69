"""Commands that measure and check a model: they change nothing."""
