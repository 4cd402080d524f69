"""The version, as a literal that a build reads without importing anything."""

__version__ = "0.1.0"
