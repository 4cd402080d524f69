"""Models whose attention is torch.nn's, for tests: images to logits, and sequences with masks."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


def stirred(model: nn.Module) -> nn.Module:
    """Return the model in eval mode, its biases and norms drawn at random: torch.nn starts them at zero and one."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(parameter + 0.2 * noise if parameter.dim() < 2 else noise * parameter[0].numel() ** -0.5)
    return model.eval()


class Encoder(nn.Module):
    """A convolution, two layers of ``nn.TransformerEncoder``, and a head on the mean of all tokens."""

    def __init__(self, batch_first: bool = True, **options: Any) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(32, 4, 64, batch_first=batch_first, **options)
        self.stem = nn.Conv2d(3, 32, 8, 8)
        self.encoder = nn.TransformerEncoder(layer, 2, norm=nn.LayerNorm(32), enable_nested_tensor=False)
        self.head = nn.Linear(32, 16)
        self.batch_first = batch_first

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.stem(x).flatten(2).transpose(1, 2)
        if self.batch_first:
            return self.head(self.encoder(tokens).mean(1))
        return self.head(self.encoder(tokens.transpose(0, 1)).mean(0))


class Detector(nn.Module):
    """Queries that look up an encoded image, as in DETR: positions are added to queries and keys, but not to values."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 32, 8, 8)
        self.position = nn.Parameter(torch.randn(1, 16, 32))
        self.attention = nn.MultiheadAttention(32, 4, batch_first=True, dropout=0.1)
        self.norm = nn.LayerNorm(32)
        self.queries = nn.Parameter(torch.randn(1, 5, 32))
        self.decoder = nn.TransformerDecoder(nn.TransformerDecoderLayer(32, 4, 64, batch_first=True), 2)
        self.boxes = nn.Linear(32, 4)

    def forward(self, x: Tensor, hidden: Tensor) -> Tensor:
        tokens = self.stem(x).flatten(2).transpose(1, 2)
        placed = tokens + self.position
        tokens = self.norm(tokens + self.attention(placed, placed, tokens, key_padding_mask=hidden)[0])
        queries = self.queries.expand(x.shape[0], -1, -1)
        return self.boxes(self.decoder(queries, tokens, memory_key_padding_mask=hidden)).sigmoid()


def vision_transformer() -> nn.Module:
    """torchvision's ViT, two blocks on 16 patches and a class token."""
    from torchvision.models import VisionTransformer

    shape = {"image_size": 32, "patch_size": 8, "num_layers": 2, "num_heads": 4, "hidden_dim": 32, "mlp_dim": 64}
    return stirred(VisionTransformer(**shape, num_classes=16))


def open_clip_vision() -> nn.Module:
    """open_clip's ViT, two blocks on 16 patches and a class token."""
    from open_clip.transformer import VisionTransformer

    return stirred(VisionTransformer(32, 8, width=32, layers=2, heads=4, mlp_ratio=2.0, output_dim=16))
