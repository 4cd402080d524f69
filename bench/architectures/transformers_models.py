"""Vision classes of transformers: small configurations with random weights; nothing is downloaded."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

_VIT: dict[str, Any] = {
    "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 128,
    "image_size": 64, "patch_size": 8,
}  # fmt: skip
_DINO: dict[str, Any] = {
    "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "mlp_ratio": 2,
    "image_size": 64, "patch_size": 8,
}  # fmt: skip
_TEXT: dict[str, Any] = {
    "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 128, "vocab_size": 100,
    "max_position_embeddings": 16, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip
_SWIN: dict[str, Any] = {
    "image_size": 64, "patch_size": 4, "embed_dim": 32, "depths": [2, 2], "num_heads": [2, 4], "window_size": 4,
}  # fmt: skip
_RESNET: dict[str, Any] = {"embedding_size": 32, "hidden_sizes": [32, 64], "depths": [2, 2]}
_TEN = {"num_labels": 10}
# Class -> its configuration.
_CLASSES: dict[str, dict[str, Any]] = {
    "ViTForImageClassification": {**_VIT, **_TEN},
    "ViTForMaskedImageModeling": {**_VIT, "encoder_stride": 8},
    "DeiTForImageClassificationWithTeacher": {**_VIT, **_TEN},
    "BeitForImageClassification": {**_VIT, **_TEN},
    "Data2VecVisionForImageClassification": {**_VIT, **_TEN},
    "ViTMSNForImageClassification": {**_VIT, **_TEN},
    "IJepaForImageClassification": {**_VIT, **_TEN},
    "Dinov2ForImageClassification": {**_DINO, **_TEN},
    "Dinov2WithRegistersForImageClassification": {**_DINO, **_TEN},
    "Dinov2Backbone": {**_DINO, "out_features": ["stage1", "stage2"]},
    "DINOv3ViTModel": {**_VIT, "num_register_tokens": 4},
    "DINOv3ConvNextModel": {"hidden_sizes": [16, 32, 32, 64], "depths": [1, 1, 1, 1], "image_size": 64},
    "CLIPVisionModelWithProjection": {**_VIT, "projection_dim": 32},
    "CLIPForImageClassification": {"vision_config": _VIT, "text_config": _TEXT, **_TEN},
    "SiglipVisionModel": _VIT,
    "SiglipForImageClassification": {"vision_config": _VIT, "text_config": _TEXT, **_TEN},
    "Aimv2VisionModel": _VIT,
    "MLCDVisionModel": _VIT,
    "BlipVisionModel": _VIT,
    "VitDetBackbone": {
        "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "image_size": 64, "patch_size": 8,
    },
    "SwinForImageClassification": {**_SWIN, **_TEN},
    "Swinv2ForImageClassification": {**_SWIN, **_TEN},
    "HieraForImageClassification": {
        "image_size": [64, 64], "embed_dim": 32, "depths": [1, 1, 2, 1], "num_heads": [1, 2, 4, 8], **_TEN,
    },
    "ConvNextForImageClassification": {
        "hidden_sizes": [32, 64], "depths": [2, 2], "num_stages": 2, "image_size": 64, **_TEN,
    },
    "ConvNextV2ForImageClassification": {
        "hidden_sizes": [32, 64], "depths": [2, 2], "num_stages": 2, "image_size": 64, **_TEN,
    },
    "ResNetForImageClassification": {**_RESNET, **_TEN},
    "RegNetForImageClassification": {**_RESNET, "groups_width": 16, **_TEN},
    "BitForImageClassification": {**_RESNET, "num_groups": 8, **_TEN},
    "MobileNetV1ForImageClassification": {"image_size": 64, "depth_multiplier": 0.25, **_TEN},
    "MobileNetV2ForImageClassification": {"image_size": 64, "depth_multiplier": 0.25, **_TEN},
    "MobileViTForImageClassification": {
        "image_size": 64, "hidden_sizes": [32, 48, 64], "neck_hidden_sizes": [16, 16, 32, 32, 48, 64, 64],
        "num_attention_heads": 4, **_TEN,
    },
    "MobileViTV2ForImageClassification": {"image_size": 64, "width_multiplier": 0.25, **_TEN},
    "EfficientNetForImageClassification": {
        "image_size": 64, "width_coefficient": 0.25, "depth_coefficient": 0.25, "hidden_dim": 320, **_TEN,
    },
    "PvtForImageClassification": {
        "image_size": 64, "hidden_sizes": [16, 32, 32, 64], "depths": [1, 1, 1, 1], "num_attention_heads": [1, 2, 2, 4],
        **_TEN,
    },
    "PoolFormerForImageClassification": {"hidden_sizes": [16, 32, 32, 64], "depths": [1, 1, 1, 1], **_TEN},
    "FocalNetForImageClassification": {"image_size": 64, "embed_dim": 16, "depths": [1, 1, 1, 1], **_TEN},
    "LevitForImageClassification": {
        "image_size": 64, "hidden_sizes": [32, 48, 64], "num_attention_heads": [2, 3, 4], "depths": [1, 1, 1],
        "key_dim": [16, 16, 16], **_TEN,
    },
    "SwiftFormerForImageClassification": {
        "image_size": 64, "embed_dims": [16, 32, 32, 64], "depths": [1, 1, 1, 1], **_TEN,
    },
    "SegformerForImageClassification": {
        "depths": [1, 1, 1, 1], "hidden_sizes": [16, 32, 32, 64], "num_attention_heads": [1, 2, 2, 4], **_TEN,
    },
    "SegformerForSemanticSegmentation": {
        "depths": [1, 1, 1, 1], "hidden_sizes": [16, 32, 32, 64], "num_attention_heads": [1, 2, 2, 4],
        "decoder_hidden_size": 64, "num_labels": 5,
    },
    "DPTForDepthEstimation": {
        **_VIT, "num_hidden_layers": 4, "backbone_out_indices": [0, 1, 2, 3], "neck_hidden_sizes": [16, 32, 32, 64],
        "fusion_hidden_size": 32,
    },
    "YolosForObjectDetection": {**_VIT, "image_size": [64, 64], "num_detection_tokens": 8, "num_labels": 5},
}  # fmt: skip


def _build(name: str, config: dict[str, Any], **inputs: Any) -> tuple[nn.Module, Any]:
    import transformers

    kind = getattr(transformers, name)
    return kind(kind.config_class(**config)).eval(), {"pixel_values": torch.randn(2, 3, 64, 64), **inputs}


def _eager() -> tuple[nn.Module, Any]:
    from transformers import ViTConfig, ViTForImageClassification

    model = ViTForImageClassification._from_config(ViTConfig(**_VIT, **_TEN), attn_implementation="eager")
    return model.eval(), {"pixel_values": torch.randn(2, 3, 64, 64)}


def _masked_autoencoder() -> tuple[nn.Module, Any]:
    decoder = {"decoder_hidden_size": 32, "decoder_num_hidden_layers": 2, "decoder_num_attention_heads": 4}
    config = {**_VIT, **decoder, "decoder_intermediate_size": 64}
    return _build("ViTMAEForPreTraining", config, noise=torch.rand(2, 64))


def _two_towers(name: str) -> tuple[nn.Module, Any]:
    config = {"vision_config": _VIT, "text_config": _TEXT}
    ids = torch.randint(3, 99, (2, 16))
    ids[:, -1] = 2  # the end of the text
    mask = {"attention_mask": torch.ones(2, 16, dtype=torch.long)} if "CLIP" in name else {}
    return _build(name, config | ({"projection_dim": 32} if "CLIP" in name else {}), input_ids=ids, **mask)


def _resnet_backbone() -> Any:
    from transformers import ResNetConfig

    widths = {"embedding_size": 16, "hidden_sizes": [16, 32, 32, 64], "depths": [1, 1, 1, 1]}
    return ResNetConfig(**widths, out_features=["stage4"])


def _detr() -> tuple[nn.Module, Any]:
    widths = {"d_model": 64, "encoder_ffn_dim": 128, "decoder_ffn_dim": 128}
    depths = {"encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4, "decoder_attention_heads": 4}
    config = {**widths, **depths, "num_queries": 8, "num_labels": 5, "backbone_config": _resnet_backbone()}
    return _build(
        "DetrForObjectDetection",
        config | {"use_timm_backbone": False, "use_pretrained_backbone": False, "backbone": None},
    )


def _upernet() -> tuple[nn.Module, Any]:
    from transformers import ConvNextConfig

    stages = {"hidden_sizes": [16, 32, 32, 64], "depths": [1, 1, 1, 1]}
    backbone = ConvNextConfig(**stages, out_features=["stage1", "stage2", "stage3", "stage4"])
    config = {"backbone_config": backbone, "hidden_size": 32, "auxiliary_in_channels": 32, "num_labels": 5}
    return _build("UperNetForSemanticSegmentation", config)


def _depth_anything() -> tuple[nn.Module, Any]:
    from transformers import Dinov2Config

    stages = ["stage1", "stage2", "stage3", "stage4"]
    backbone = Dinov2Config(**{**_DINO, "num_hidden_layers": 4}, out_features=stages, reshape_hidden_states=False)
    necks = {"neck_hidden_sizes": [16, 32, 32, 64], "fusion_hidden_size": 32, "reassemble_hidden_size": 64}
    built = _build("DepthAnythingForDepthEstimation", {"backbone_config": backbone, "patch_size": 8, **necks})
    torch.nn.init.uniform_(built[0].head.conv3.weight)  # the ReLU behind it shall not hide everything
    return built


def builders() -> dict[str, Callable[[], tuple[nn.Module, Any]]]:
    """``transformers:CLASS`` -> builder."""
    made: dict[str, Callable[[], tuple[nn.Module, Any]]] = {
        **{name: functools.partial(_build, name, config) for name, config in _CLASSES.items()},
        "ViTForImageClassification, eager attention": _eager,
        "Dinov2Model, all hidden states": functools.partial(_build, "Dinov2Model", _DINO, output_hidden_states=True),
        "ViTMAEForPreTraining": _masked_autoencoder,
        "CLIPModel": functools.partial(_two_towers, "CLIPModel"),
        "SiglipModel": functools.partial(_two_towers, "SiglipModel"),
        "DetrForObjectDetection": _detr,
        "UperNetForSemanticSegmentation": _upernet,
        "DepthAnythingForDepthEstimation": _depth_anything,
    }
    return {f"transformers:{name}": build for name, build in sorted(made.items())}
