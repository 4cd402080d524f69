"""Kernels turn numbers into numbers and know no graph."""
