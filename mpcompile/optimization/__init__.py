"""Optimization: one search over patterns, tokens, precision and runtime, for the fastest build within a drop."""

from mpcompile.optimization.api import optimize
from mpcompile.optimization.frontier import Entry, Frontier
from mpcompile.optimization.result import Optimized
from mpcompile.optimization.runner import Runner, load_runner

__all__ = ["Entry", "Frontier", "Optimized", "Runner", "load_runner", "optimize"]
