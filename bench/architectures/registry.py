"""All architectures by name, from the libraries that are installed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from bench.architectures import others, timm_models, torchvision_models, transformers_models, wrapped

Built = tuple[nn.Module, Any]  # a model and example inputs: a tensor, a tuple, or a mapping of keyword inputs
_LIBRARIES: tuple[Callable[[], dict[str, Callable[[], Built]]], ...] = (
    timm_models.builders,
    torchvision_models.builders,
    transformers_models.builders,
    others.builders,
    wrapped.builders,
)


def builders() -> dict[str, Callable[[], Built]]:
    """``LIBRARY:NAME`` -> a function that builds the model, in the order of the table."""
    return {name: build for library in _LIBRARIES for name, build in library().items()}
