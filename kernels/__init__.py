"""Kernels: operators on tensors, and the engines that run them. Nothing here knows a model's graph."""
