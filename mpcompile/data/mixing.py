"""Mixing: blends of two images, or a rectangle of one in another, by timm."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils.data import default_collate


def mixed(images: Tensor, share: float, other: Tensor | None = None) -> Tensor:
    """Return images (B, C, H, W), a share of them mixed with another one of the batch.

    Half of the mixes are blends (mixup), half have a rectangle pasted in (CutMix), both of a random size.

    Args:
        images: the images, floating point.
        share: share of the images that are mixed.
        other: (1, C, H, W), the partner of a single image; without it, that image stays as it is.
    """
    from timm.data import Mixup

    order = torch.randperm(len(images))
    pairs = images[order]
    if len(images) % 2:  # timm mixes the first with the last, the second with the last but one, and so on
        if other is None and len(images) == 1:
            return images
        pairs = torch.cat([pairs, pairs[1:2] if other is None else other])
    mixup = Mixup(mixup_alpha=1.0, cutmix_alpha=1.0, prob=share, switch_prob=0.5, mode="elem", num_classes=1)
    labels = torch.zeros(len(pairs), dtype=torch.int64, device=pairs.device)
    blended, _ = mixup(pairs, labels)
    return blended[torch.argsort(order)]


class MixedBatches:
    """Collates samples into a batch whose images, its first element, are mixed; labels stay those of the images.

    Args:
        share: share of the images that are mixed.

    Example:
        >>> images, labels = MixedBatches(0.5)([(torch.zeros(3, 8, 8), 1), (torch.ones(3, 8, 8), 2)])
        >>> images.shape, labels
        (torch.Size([2, 3, 8, 8]), tensor([1, 2]))
    """

    def __init__(self, share: float) -> None:
        self.share = share

    def __call__(self, samples: list[Any]) -> Any:
        images, *rest = default_collate(samples)
        return [mixed(images, self.share), *rest]
