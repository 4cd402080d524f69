"""torchvision's models: classification, segmentation, detection and optical flow."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

_CLASSIFIERS = (
    "densenet121", "efficientnet_b0", "mobilenet_v2",
    "mobilenet_v3_small", "regnet_y_400mf", "resnet18", "shufflenet_v2_x0_5", "squeezenet1_1",
)  # fmt: skip
_SEGMENTERS = ("deeplabv3_mobilenet_v3_large", "fcn_resnet50", "lraspp_mobilenet_v3_large")
_DETECTORS = (
    "fasterrcnn_mobilenet_v3_large_320_fpn",
    "fcos_resnet50_fpn",
    "ssdlite320_mobilenet_v3_large",
)


def _images(count: int = 2, side: int = 64) -> torch.Tensor:
    return torch.randn(count, 3, side, side)


def _classifier(name: str) -> tuple[nn.Module, Any]:
    import torchvision

    return torchvision.models.get_model(name, weights=None, num_classes=10).eval(), _images()


def _segmenter(name: str) -> tuple[nn.Module, Any]:
    import torchvision

    model = torchvision.models.get_model(name, weights=None, weights_backbone=None, num_classes=5)
    return model.eval(), _images()


def _detector(name: str) -> tuple[nn.Module, Any]:
    import torchvision

    size = {} if name.startswith("ssd") else {"min_size": 64, "max_size": 96}
    model = torchvision.models.get_model(name, weights=None, weights_backbone=None, num_classes=5, **size)
    return model.eval(), ([torch.rand(3, 64, 64)],)


def _vit() -> tuple[nn.Module, Any]:
    from torchvision.models import VisionTransformer

    sizes = {"num_layers": 2, "num_heads": 4, "hidden_dim": 64, "mlp_dim": 128}
    return VisionTransformer(image_size=64, patch_size=8, num_classes=10, **sizes).eval(), _images()


def _swin(version: int) -> tuple[nn.Module, Any]:
    from torchvision.models import swin_transformer as swin

    parts = {"block": swin.SwinTransformerBlockV2, "downsample_layer": swin.PatchMergingV2} if version == 2 else {}
    sizes: dict[str, Any] = {"embed_dim": 32, "depths": [2, 2], "num_heads": [2, 4], "window_size": [4, 4]}
    return swin.SwinTransformer(patch_size=[4, 4], num_classes=10, **sizes, **parts).eval(), _images()


def _convnext() -> tuple[nn.Module, Any]:
    from torchvision.models.convnext import CNBlockConfig, ConvNeXt

    return ConvNeXt([CNBlockConfig(32, 64, 2), CNBlockConfig(64, None, 2)], num_classes=10).eval(), _images()


def _maxvit() -> tuple[nn.Module, Any]:
    from torchvision.models import MaxVit

    sizes: dict[str, Any] = {"stem_channels": 32, "block_channels": [32, 64], "block_layers": [1, 1], "head_dim": 16}
    model = MaxVit(input_size=(64, 64), partition_size=4, stochastic_depth_prob=0.0, num_classes=10, **sizes)
    return model.eval(), _images()


class Flow(nn.Module):
    """RAFT with two updates of the flow."""

    def __init__(self) -> None:
        super().__init__()
        from torchvision.models.optical_flow import raft_small

        self.raft = raft_small(weights=None)

    def forward(self, first: torch.Tensor, second: torch.Tensor) -> Any:
        return self.raft(first, second, num_flow_updates=2)


def builders() -> dict[str, Callable[[], tuple[nn.Module, Any]]]:
    """``torchvision:NAME`` -> builder."""
    made: dict[str, Callable[[], tuple[nn.Module, Any]]] = {
        "VisionTransformer": _vit,
        "SwinTransformer": functools.partial(_swin, 1),
        "SwinTransformer v2": functools.partial(_swin, 2),
        "ConvNeXt": _convnext,
        "MaxVit": _maxvit,
        **{name: functools.partial(_classifier, name) for name in _CLASSIFIERS},
        **{name: functools.partial(_segmenter, name) for name in _SEGMENTERS},
        **{name: functools.partial(_detector, name) for name in _DETECTORS},
        "raft_small": lambda: (Flow().eval(), (_images(1, 128), _images(1, 128))),
    }
    return {f"torchvision:{name}": build for name, build in made.items()}
