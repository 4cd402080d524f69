"""Preprocessing of transformers' image processors, expressed as timm's data configuration."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

_FILTERS = {0: "nearest", 1: "lanczos", 2: "bilinear", 3: "bicubic", 4: "box", 5: "hamming"}  # Pillow's numbers
_SQUASHED_FROM = 384  # ConvNeXt's processor squashes images from this size on, and crops smaller ones


def data_of(processor: Mapping[str, Any]) -> dict[str, Any]:
    """Return the data configuration with the same effect as an image processor's configuration.

    A processor scales pixels by ``rescale_factor`` and then subtracts ``image_mean`` and divides by ``image_std``; timm
    always scales by 1/255, so another factor goes into mean and standard deviation.

    Args:
        processor: the processor as a dict, as ``to_dict()`` returns it; values that it lacks are left out.

    Returns:
        ``mean``, ``std``, ``interpolation`` and, as far as known, ``input_size``, ``crop_pct`` and ``crop_mode``.

    Example:
        >>> data = data_of({"do_center_crop": True, "size": {"shortest_edge": 256}, "crop_size": 224, "resample": 3})
        >>> data["input_size"], data["crop_pct"], data["interpolation"]
        ([3, 224, 224], 0.875, 'bicubic')
    """
    mean = _three(processor.get("image_mean"), 0.0) if processor.get("do_normalize", True) else [0.0] * 3
    std = _three(processor.get("image_std"), 1.0) if processor.get("do_normalize", True) else [1.0] * 3
    factor = processor.get("rescale_factor") or 1 / 255
    scale = 255 * factor if processor.get("do_rescale", True) else 255.0
    if abs(scale - 1) > 1e-6:
        mean, std = [value / scale for value in mean], [value / scale for value in std]
    if processor.get("rescale_offset") and processor.get("do_rescale", True):  # pixels are scaled to -1 ... 1
        mean = [value + 1 / scale for value in mean]
    filtering = processor.get("resample", processor.get("interpolation"))
    data: dict[str, Any] = {"mean": mean, "std": std}
    if filtering is not None:
        data["interpolation"] = _FILTERS.get(int(filtering), "bilinear")
    return {**data, **_geometry(processor)}


def _geometry(processor: Mapping[str, Any]) -> dict[str, Any]:
    """Return ``input_size``, ``crop_pct`` and ``crop_mode`` as far as the processor fixes them."""
    resized = processor.get("size") if processor.get("do_resize", True) else None
    cropped = processor.get("crop_size") if processor.get("do_center_crop") else None
    edge = _edge(resized)
    if cropped is not None:
        height, width = _sides(cropped)
        before = edge or min(_sides(resized)) if resized is not None else min(height, width)
        mode = "center" if edge else "squash"
        return {"input_size": [3, height, width], "crop_pct": _share(min(height, width), before), "crop_mode": mode}
    if edge is None:
        return {} if resized is None else {"input_size": [3, *_sides(resized)], "crop_pct": 1.0, "crop_mode": "squash"}
    share = processor.get("crop_pct")
    if share is not None and edge < _SQUASHED_FROM:
        return {"input_size": [3, edge, edge], "crop_pct": _share(edge, int(edge / share)), "crop_mode": "center"}
    return {"input_size": [3, edge, edge], "crop_pct": 1.0, "crop_mode": "center" if share is None else "squash"}


def _edge(size: Any) -> int | None:
    """Return the length that a size prescribes for the shortest edge; None if it prescribes height and width."""
    return int(size["shortest_edge"]) if isinstance(size, Mapping) and size.get("shortest_edge") else None


def _sides(size: Any) -> tuple[int, int]:
    if isinstance(size, Mapping):
        edge = size.get("shortest_edge")
        return int(size.get("height", edge)), int(size.get("width", edge))
    return (int(size), int(size)) if not isinstance(size, Sequence) else (int(size[0]), int(size[-1]))


def _share(side: int, before: int) -> float:
    """Return the ``crop_pct`` for which timm, which rounds down, resizes to ``before``."""
    share = side / before
    while share > 0 and math.floor(side / share) < before:
        share = math.nextafter(share, 0)
    return share


def _three(values: Any, default: float) -> list[float]:
    if values is None:
        return [default] * 3
    numbers = [float(v) for v in values] if isinstance(values, Sequence) else [float(values)]
    return numbers * 3 if len(numbers) == 1 else numbers
