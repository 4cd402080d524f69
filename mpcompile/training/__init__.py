"""Distillation: the loop, losses, feature matching, mask policies, checkpoints, events and recipes."""
