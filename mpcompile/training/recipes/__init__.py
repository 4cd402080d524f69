"""Recipes: YAML files that say what is made of which model, on what data, and how it is trained."""
