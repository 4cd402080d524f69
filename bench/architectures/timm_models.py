"""Families of timm: one architecture each, narrow and shallow where the family allows it."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

_SWIN = {"img_size": 64, "window_size": 4, "embed_dim": 32, "depths": (2, 2), "num_heads": (2, 4)}
_VIT = {"depth": 2, "embed_dim": 64, "num_heads": 4, "img_size": 64}
_CNN = {"size": 64}
_FAMILIES: dict[str, dict[str, Any]] = {
    "vit_tiny_patch16_224": {**_VIT, "patch_size": 8},
    "vit_base_patch16_siglip_224": {**_VIT, "patch_size": 8},
    "vit_small_patch14_reg4_dinov2": {**_VIT, "patch_size": 8},
    "vit_small_patch16_dinov3": {**_VIT},
    "deit_tiny_distilled_patch16_224": {**_VIT, "patch_size": 8},
    "deit3_small_patch16_224": {**_VIT, "patch_size": 8},
    "eva02_tiny_patch14_224": {**_VIT, "patch_size": 8},
    "beit_base_patch16_224": {**_VIT, "patch_size": 8},
    "cait_xxs24_224": {**_VIT, "patch_size": 8},
    "xcit_nano_12_p16_224": {**_VIT},
    "mixer_s16_224": {"img_size": 64},
    "swin_tiny_patch4_window7_224": _SWIN,
    "swinv2_tiny_window8_256": _SWIN,
    "hiera_tiny_224": {"img_size": (64, 64), "embed_dim": 32, "stages": (1, 1, 2, 1)},
    "maxvit_rmlp_pico_rw_256": {"img_size": 64},
    "coatnet_nano_rw_224": {"img_size": 64},
    "levit_128s": {"img_size": 224, "size": 224},
    "pvt_v2_b0": _CNN,
    "mobilevitv2_050": _CNN,
    "efficientformerv2_s0": {"size": 224},
    "convnext_atto": _CNN,
    "convnextv2_atto": _CNN,
    "resnet18": _CNN,
    "resnetv2_18": _CNN,
    "regnety_002": _CNN,
    "efficientnet_lite0": _CNN,
    "mobilenetv3_small_050": _CNN,
    "mobilenetv4_conv_small_050": _CNN,
    "repvgg_a0": _CNN,
    "poolformer_s12": _CNN,
    "fastvit_t8": _CNN,
}


def _build(name: str, options: dict[str, Any]) -> tuple[nn.Module, Any]:
    import timm

    options = dict(options)
    size = options.pop("size", None) or options["img_size"]
    side = size if isinstance(size, int) else size[0]
    return timm.create_model(name, num_classes=10, **options).eval(), torch.randn(2, 3, side, side)


def builders() -> dict[str, Callable[[], tuple[nn.Module, Any]]]:
    """``timm:ARCHITECTURE`` -> builder."""
    return {f"timm:{name}": functools.partial(_build, name, options) for name, options in _FAMILIES.items()}
