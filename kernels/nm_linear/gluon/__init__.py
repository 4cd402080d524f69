"""Gluon kernels on sparse tensor cores."""
