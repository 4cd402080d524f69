"""Recipes: YAML files that describe a model, its compilation, its data and its training."""
