"""One small ViT of timm in the wrappers, and with the forms of inputs and outputs, that users' own code has."""

from __future__ import annotations

from collections import namedtuple
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

Outputs = namedtuple("Outputs", "logits features")


def _vit() -> nn.Module:
    import timm

    sizes = {"depth": 2, "img_size": 64, "patch_size": 8, "embed_dim": 64, "num_heads": 4}
    return timm.create_model("vit_tiny_patch16_224", num_classes=10, **sizes)


class Wrapper(nn.Module):
    """Holds the ViT."""

    def __init__(self) -> None:
        super().__init__()
        self.model = _vit()


class Batch(Wrapper):
    """Takes a dict as its one input, as Lightning modules do, and returns a dict."""

    def forward(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        return {"logits": self.model(batch["image"]), "image_id": batch["id"]}


class Keywords(Wrapper):
    """Has an optional input and ``**kwargs`` that nobody gives."""

    def forward(self, x: Tensor, scale: Tensor | None = None, **kwargs: Any) -> Tensor:
        y = self.model(x)
        return y if scale is None else y * scale


class TwoInputs(Wrapper):
    """Takes an image, a tensor of integers and a number; returns integers."""

    def __init__(self) -> None:
        super().__init__()
        self.domains = nn.Embedding(7, 10)

    def forward(self, x: Tensor, domain: Tensor, top: int = 3) -> Tensor:
        return (self.model(x) + self.domains(domain)).topk(top).indices


class DataDependent(Wrapper):
    """Branches on the values of its outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.second = _vit()

    def forward(self, x: Tensor) -> Tensor:
        y = self.model(x)
        if y.max() > 1e9:
            y = y + self.second(x)
        return y


class Resizes(Wrapper):
    """Branches on the size of its input."""

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[-1] != 64:
            x = nn.functional.interpolate(x, (64, 64))
        return self.model(x)


class NamedTuple(Wrapper):
    """Returns a namedtuple."""

    def forward(self, x: Tensor) -> Outputs:
        features = self.model.forward_features(x)
        return Outputs(self.model.forward_head(features), features.mean(1))


class Counter(Wrapper):
    """Counts its calls and keeps its last output."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0
        self.cache: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        self.cache = self.model(x)
        return self.cache


class Encoder(nn.Module):
    """torch's own ``nn.TransformerEncoder`` behind a patch embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 64, 8, 8)
        layer = nn.TransformerEncoderLayer(64, 4, 128, batch_first=True, norm_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.encoder(self.stem(x).flatten(2).mT).mean(1))


def _quantized() -> nn.Module:
    from torch.ao.quantization import QuantWrapper

    return QuantWrapper(_vit())


def builders() -> dict[str, Callable[[], tuple[nn.Module, Any]]]:
    """``wrapped:NAME`` -> builder."""

    def build(make: Callable[[], nn.Module], *others: Any) -> Callable[[], tuple[nn.Module, Any]]:
        return lambda: (make().eval(), (torch.randn(2, 3, 64, 64), *others) if others else torch.randn(2, 3, 64, 64))

    made = {
        "a dict as the one input": lambda: (
            Batch().eval(),
            {"image": torch.randn(2, 3, 64, 64), "id": torch.arange(2)},
        ),
        "optional inputs and **kwargs": build(Keywords),
        "several inputs, integers out": build(TwoInputs, torch.tensor([1, 2]), 3),
        "a branch on values": build(DataDependent),
        "a branch on shapes": build(Resizes),
        "a namedtuple out": build(NamedTuple),
        "state on the module": build(Counter),
        "nn.DataParallel": build(lambda: nn.DataParallel(_vit())),
        "nn.Sequential with softmax": build(lambda: nn.Sequential(_vit(), nn.Softmax(-1))),
        "QuantWrapper": build(_quantized),
        "nn.TransformerEncoder": build(Encoder),
    }
    return {f"wrapped:{name}": maker for name, maker in made.items()}
