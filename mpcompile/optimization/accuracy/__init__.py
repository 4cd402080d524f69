"""Accuracy: the images that judge builds, and what a build loses on them, with the confidence of the statement."""
