"""Tiny models of transformers and timm, in folders as users have them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors.torch import save_file

LABELS = ("cat", "dog", "fox")


def vit_folder(path: Path, **changes: Any) -> Path:
    """Write a ViT of transformers with two blocks and its image processor, as ``save_pretrained`` does.

    Args:
        path: the folder.
        changes: values of its ViTConfig.
    """
    from transformers import ViTConfig, ViTForImageClassification, ViTImageProcessor

    torch.manual_seed(0)
    shape = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    images = {"image_size": 32, "patch_size": 8, "id2label": dict(enumerate(LABELS))}
    ViTForImageClassification(ViTConfig(**{**shape, **images, **changes})).save_pretrained(path)
    size = {"height": 32, "width": 32}
    ViTImageProcessor(size=size, image_mean=[0.1, 0.2, 0.3], image_std=[0.4, 0.5, 0.6], resample=3).save_pretrained(
        path
    )
    return path


def timm_folder(path: Path) -> Path:
    """Write a ResNet of timm in the layout of its hub."""
    torch.manual_seed(0)
    model = timm.create_model("resnet10t", num_classes=3)
    path.mkdir()
    save_file(model.state_dict(), path / "model.safetensors")
    known = {
        "input_size": [3, 64, 64],
        "mean": [0.5] * 3,
        "std": [0.25] * 3,
        "first_conv": "conv1.0",
        "classifier": "fc",
    }
    config = {"architecture": "resnet10t", "num_classes": 3, "label_names": LABELS, "pretrained_cfg": known}
    (path / "config.json").write_text(json.dumps(config))
    return path


def edit_config(path: Path, **changes: Any) -> None:
    """Change values of a folder's config.json; None removes one."""
    file = path / "config.json"
    config = {**json.loads(file.read_text()), **changes}
    file.write_text(json.dumps({key: value for key, value in config.items() if value is not None}))
