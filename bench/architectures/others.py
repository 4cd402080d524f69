"""Models of open_clip, segmentation_models_pytorch, MONAI and ultralytics."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

_SMP = ("Unet", "FPN", "PSPNet", "DeepLabV3Plus")
_YOLO = ("yolov8n.yaml", "yolo11n.yaml")


def _images(count: int = 2, side: int = 64, channels: int = 3) -> torch.Tensor:
    return torch.randn(count, channels, side, side)


def _open_clip_vision() -> tuple[nn.Module, Any]:
    from open_clip.transformer import VisionTransformer

    sizes: dict[str, Any] = {"width": 64, "layers": 2, "heads": 4, "mlp_ratio": 2.0, "output_dim": 32}
    return VisionTransformer(image_size=64, patch_size=8, **sizes).eval(), _images()


def _open_clip() -> tuple[nn.Module, Any]:
    from open_clip.model import CLIP, CLIPTextCfg, CLIPVisionCfg

    vision = CLIPVisionCfg(layers=2, width=64, head_width=16, mlp_ratio=2.0, patch_size=8, image_size=64)
    text = CLIPTextCfg(context_length=16, vocab_size=100, width=64, heads=4, layers=2)
    return CLIP(32, vision, text).eval(), (_images(), torch.randint(1, 99, (2, 16)))


def _open_clip_resnet() -> tuple[nn.Module, Any]:
    from open_clip.model import CLIP, CLIPTextCfg, CLIPVisionCfg

    vision = CLIPVisionCfg(layers=(1, 1, 1, 1), width=16, image_size=64)
    text = CLIPTextCfg(context_length=16, vocab_size=100, width=64, heads=4, layers=2)
    return CLIP(32, vision, text).eval(), (_images(), torch.randint(1, 99, (2, 16)))


def _smp(name: str) -> tuple[nn.Module, Any]:
    import segmentation_models_pytorch as smp

    return getattr(smp, name)("resnet18", encoder_weights=None, classes=3).eval(), _images()


def _smp_dpt() -> tuple[nn.Module, Any]:
    import segmentation_models_pytorch as smp

    options = {"encoder_weights": None, "encoder_depth": 4, "dynamic_img_size": True, "classes": 3}
    return smp.DPT("tu-vit_tiny_patch16_224.augreg_in21k", **options).eval(), _images(1)


def _smp_segformer() -> tuple[nn.Module, Any]:
    import segmentation_models_pytorch as smp

    return smp.Segformer("mit_b0", encoder_weights=None, classes=3).eval(), _images()


def _monai(name: str, volumes: bool, **options: Any) -> tuple[nn.Module, Any]:
    from monai.networks import nets

    model = getattr(nets, name)(**options).eval()
    channels = options.get("in_channels", 3)
    return model, torch.randn(1, channels, 32, 32, 32) if volumes else _images(channels=channels)


_MONAI: dict[str, dict[str, Any]] = {
    "UNet": {
        "name": "UNet", "volumes": False, "spatial_dims": 2, "in_channels": 3, "out_channels": 3,
        "channels": (16, 32, 64), "strides": (2, 2), "num_res_units": 1,
    },
    "UNet 3-d": {
        "name": "UNet", "volumes": True, "spatial_dims": 3, "in_channels": 1, "out_channels": 3,
        "channels": (8, 16, 32), "strides": (2, 2), "num_res_units": 1,
    },
    "SegResNet": {
        "name": "SegResNet", "volumes": False, "spatial_dims": 2, "in_channels": 3, "out_channels": 3,
        "init_filters": 16, "blocks_down": (1, 1, 1), "blocks_up": (1, 1),
    },
    "AttentionUnet": {
        "name": "AttentionUnet", "volumes": False, "spatial_dims": 2, "in_channels": 3, "out_channels": 3,
        "channels": (16, 32, 64), "strides": (2, 2),
    },
}  # fmt: skip


def _yolo(name: str) -> tuple[nn.Module, Any]:
    from ultralytics.nn.tasks import DetectionModel

    return DetectionModel(name, ch=3, nc=5, verbose=False).eval(), _images()


def builders() -> dict[str, Callable[[], tuple[nn.Module, Any]]]:
    """``LIBRARY:NAME`` -> builder."""
    return {
        "open_clip:VisionTransformer": _open_clip_vision,
        "open_clip:CLIP": _open_clip,
        "open_clip:CLIP with a ResNet": _open_clip_resnet,
        **{f"segmentation_models_pytorch:{name}": functools.partial(_smp, name) for name in _SMP},
        "segmentation_models_pytorch:DPT": _smp_dpt,
        "segmentation_models_pytorch:Segformer": _smp_segformer,
        **{f"monai:{name}": functools.partial(_monai, **options) for name, options in _MONAI.items()},
        **{f"ultralytics:{name.removesuffix('.yaml')}": functools.partial(_yolo, name) for name in _YOLO},
    }
