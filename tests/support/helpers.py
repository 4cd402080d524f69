"""Models, inputs and measures that several tests share."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from PIL import Image
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from mpcompile.capture.importers import import_model
from mpcompile.ir.module import Imported


def tiny_vit(**kwargs: Any) -> VisionTransformer:
    """Two blocks, 16 patches and a class token."""
    torch.manual_seed(0)
    shape = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2, "num_classes": 10}
    model = VisionTransformer(**{**shape, **kwargs})
    # The default initialisation is so small that blocks barely change their input; these weights matter.
    for name, parameter in model.named_parameters():
        with torch.no_grad():
            if parameter.dim() >= 2 and "norm" not in name:
                parameter.copy_(torch.randn_like(parameter) * (0.5 if "token" in name or "embed" in name else 0.2))
            elif name.endswith("gamma"):
                parameter.copy_(torch.rand_like(parameter) + 0.5)
    return model.eval()


def transformer(name: str, size: int = 128, **kwargs: Any) -> nn.Module:
    """Two narrow blocks of a timm transformer for images of ``size``, with random weights that all matter."""
    torch.manual_seed(0)
    model = timm.create_model(name, **{"depth": 2, "img_size": size, "embed_dim": 96, "num_heads": 3, **kwargs})
    randomise(model)
    return model.eval()


@torch.no_grad()
def randomise(model: nn.Module) -> None:
    """Draw weights that all affect the output: with timm's initialisation, blocks barely change their input."""
    for path, parameter in model.named_parameters():
        if parameter.dim() >= 2:
            table = any(word in path for word in ("token", "embed", "latent")) and "proj" not in path
            parameter.normal_(std=0.5 if table else parameter[0].numel() ** -0.5)
        elif "gamma" in path:
            parameter.uniform_(0.5, 1.5)


def mlp() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(32, 48), nn.GELU(), nn.Linear(48, 64), nn.ReLU(), nn.Linear(64, 5)).eval()


class Branching(nn.Sequential):
    """Symbolic tracing refuses it: it is captured by torch.export, with BatchNorms as calls."""

    def forward(self, x: Tensor) -> Any:
        return super().forward(x * 2 if x.shape[0] > 4096 else x)


def convolutional(name: str) -> nn.Module:
    """A small timm CNN with non-trivial BatchNorm statistics."""
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=10)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.5, 1.5)
            nn.init.uniform_(module.weight, 0.5, 1.5)  # timm initialises the last one of each block to zero
    return model.eval()


def tied_keys(batch: int, heads: int, tokens: int, depth: int, kinds: int) -> Tensor:
    """Return keys (batch, heads, tokens, depth) of a few kinds; all of a kind are equal, so every match is a tie."""
    kind = torch.randint(kinds, (batch, 1, tokens, 1)).expand(-1, heads, -1, depth)
    return torch.randn(batch, heads, kinds, depth).gather(2, kind)


def an_ulp_off(x: Tensor) -> Tensor:
    """Return each number moved one ulp up, one ulp down, or not at all."""
    return torch.stack([torch.nextafter(x, torch.full_like(x, end)) for end in (-torch.inf, torch.inf)] + [x]).gather(
        0, torch.randint(3, (1, *x.shape))
    )[0]


def images(batch: int = 3, size: int = 32, seed: int = 1) -> Tensor:
    return torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(seed))


def labelled_images(root: Path) -> Path:
    """Two splits of three classes of small images that a network can distinguish."""
    rng = np.random.default_rng(0)
    for split, count in (("train", 8), ("validation", 3)):
        for number, name in enumerate(("ant", "bee", "cat")):
            place = root / split / name
            place.mkdir(parents=True)
            for index in range(count):
                pixels = rng.integers(0, 80, (40, 48, 3), dtype=np.uint8)
                pixels[:, :, number] += 150
                Image.fromarray(pixels).save(place / f"{index}.png")
    return root


def relative(a: Tensor, b: Tensor) -> float:
    """Relative RMS difference, normalised by the second tensor."""
    return float((a.detach().double() - b.detach().double()).norm() / b.detach().double().norm())


def capture(model: Any, *inputs: Any) -> Imported:
    """Import the graph that dynamo passes to a backend."""
    found = []

    def backend(gm, example_inputs):
        found.append(import_model(gm, list(example_inputs), share=True))
        return gm

    torch._dynamo.reset()
    with torch.no_grad():
        torch.compile(model, backend=backend)(*inputs)
    (imported,) = found
    return imported


TINY_DATA = {
    "input_size": (3, 32, 32),
    "interpolation": "bicubic",
    "mean": (0.5,) * 3,
    "std": (0.5,) * 3,
    "crop_pct": 1.0,
}


def tiny_created(*_, **__):
    """A stand-in for timm.create_model: two blocks deep, with timm's description of its data."""
    model = tiny_vit()
    model.pretrained_cfg = TINY_DATA
    return model
