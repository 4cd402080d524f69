"""Stems and heads by data flow, in traced, exported and compiled graphs."""

from __future__ import annotations

from collections import namedtuple
from collections.abc import Callable
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mpcompile.capture.importers import import_model
from mpcompile.ir.module import Imported
from mpcompile.ir.roles import roles
from mpcompile.ir.shapes import propagate

Out = namedtuple("Out", "logits tokens")


class Parts(nn.Module):
    """A body whose layers a forward joins freely; ``net.maps(x)`` and ``net.tokens(x)`` are its features."""

    def __init__(self, forward: Callable[[Parts, Tensor], Any]) -> None:
        super().__init__()
        self.stem, self.body = nn.Conv2d(3, 32, 3, 2, 1), nn.Conv2d(32, 32, 3, 1, 1)
        self.head, self.mix = nn.Conv2d(32, 16, 1), nn.Conv2d(16, 32, 1)
        self.fc, self.out, self.box = nn.Linear(32, 32), nn.Linear(32, 8), nn.Linear(32, 4)
        self.up, self.shuffle = nn.Upsample(scale_factor=2, mode="bilinear"), nn.PixelShuffle(2)
        self.learned = nn.ConvTranspose2d(16, 16, 4, 2, 1, groups=16, bias=False)
        self.mean, self.norm = nn.Conv2d(16, 1, 1, bias=False), nn.BatchNorm2d(16)
        self.scale = nn.Parameter(torch.ones(1))
        self.wanted = [forward]

    def maps(self, x: Tensor) -> Tensor:
        return self.body(self.stem(x).relu()).relu()

    def tokens(self, x: Tensor) -> Tensor:
        return self.fc(self.maps(x).flatten(2).mT).relu()

    def forward(self, x: Tensor) -> Any:
        return self.wanted[0](self, x)


def detected(net: Parts, x: Tensor) -> Any:
    """Boxes and labels of the best queries, as the post-processing of DETR."""
    y = net.tokens(x)
    scores, labels = net.out(y).softmax(-1)[..., :-1].max(-1)
    centre, size = net.box(y).sigmoid().split(2, -1)
    corners = torch.cat([centre - size / 2, centre + size / 2], -1) * x.shape[-1]
    best = scores.topk(3, dim=1)[1]
    return scores.gather(1, best), labels.gather(1, best), corners.gather(1, best.unsqueeze(-1).repeat(1, 1, 4))


def distances(net: Parts, x: Tensor) -> Any:
    """Box distances as means of distributions (YOLO), beside the raw predictions."""
    raw = net.head(net.maps(x))
    b, _, h, w = raw.shape
    d = net.mean(raw.view(b, 1, 16, h * w).transpose(2, 1).softmax(1)).view(b, 1, h * w)
    return torch.cat([(2 * d - 1).exp(), d], 1), raw


def scales(net: Parts, x: Tensor) -> Any:
    y = net.maps(x)
    return torch.cat([net.head(y).flatten(2), net.head(F.max_pool2d(y, 2)).flatten(2)], 2).permute(0, 2, 1)


def selected(net: Parts, x: Tensor) -> Any:
    """Scores that only select the tokens that go on."""
    y = net.tokens(x)
    best = net.out(y).max(-1)[0].topk(4, dim=1)[1]
    return net.box(y.gather(1, best.unsqueeze(-1).expand(-1, -1, 32)))


def refined(net: Parts, x: Tensor) -> Any:
    """Boxes that are output, and that the next layer starts from."""
    box = net.box(net.tokens(x).mean(1)).sigmoid()
    return box, net.out(F.pad(box.detach(), (0, 28)))


def retrieved(net: Parts, x: Tensor) -> Any:
    z = net.out(net.tokens(x).mean(1))
    z = z / z.norm(dim=-1, keepdim=True)
    return net.scale.exp() * z @ z.t()


def attended(net: Parts, x: Tensor) -> Any:
    y = net.out(net.tokens(x))
    return (y @ y.mT).softmax(-1) @ y


def frozen(net: Parts, x: Tensor) -> Any:
    return net.out(net.tokens(x).detach().mean(1))


def named(net: Parts, x: Tensor) -> Any:
    y = net.tokens(x)
    return Out(net.out(y.mean(1)), y)


def residual(net: Parts, x: Tensor) -> Any:
    y = net.tokens(x)
    return y + net.fc(F.gelu(net.fc(y)))


def best(net: Parts, x: Tensor) -> Any:
    values, classes = net.head(net.maps(x)).flatten(1).softmax(1).topk(5)
    return values, classes


def reread(net: Parts, x: Tensor) -> Any:
    y = net.head(net.maps(x))
    return y, net.mix(y)


HEADS: dict[str, tuple[Callable[[Parts, Tensor], Any], set[str]]] = {
    "upsampled to the image": (
        lambda m, x: {"out": F.interpolate(m.head(m.maps(x)), size=x.shape[-2:], mode="bilinear")},
        {"head"},
    ),
    "upsampling module": (lambda m, x: m.up(m.head(m.maps(x))), {"head"}),
    "learned upsampling": (lambda m, x: m.learned(m.head(m.maps(x))), {"head"}),
    "pixel shuffle": (lambda m, x: m.shuffle(m.head(m.maps(x))).clamp(0, 1), {"head"}),
    "super resolution": (lambda m, x: F.interpolate(x, scale_factor=0.5) + m.head(m.maps(x))[:, :3], {"head"}),
    "depth": (lambda m, x: F.interpolate(m.head(m.maps(x)), scale_factor=2).relu() * 10, {"head"}),
    "inverse depth": (lambda m, x: 1 / (m.head(m.maps(x)).exp() + 1e-3), {"head"}),
    "map of labels": (lambda m, x: m.up(m.head(m.maps(x))).argmax(1), {"head"}),
    "threshold": (lambda m, x: m.head(m.maps(x)).sigmoid() > 0.5, {"head"}),
    "topk": (best, {"head"}),
    "crop": (lambda m, x: F.pad(m.head(m.maps(x))[:, :, 1:-1, 1:-1], (0, 1, 0, 1)), {"head"}),
    "pooled classes": (lambda m, x: F.adaptive_avg_pool2d(m.head(m.maps(x)).relu(), 1).flatten(1), {"head"}),
    "several scales": (scales, {"head"}),
    "boxes": (detected, {"out", "box"}),
    "distances": (distances, {"head", "mean"}),
    "selected tokens": (selected, {"out", "box"}),
    "refined boxes": (refined, {"out", "box"}),
    "two heads' average": (
        lambda m, x: (m.head(m.maps(x)).mean((2, 3))[:, :8] + m.out(m.tokens(x).mean(1))) / 2,
        {"head", "out"},
    ),
    "cosine similarities": (retrieved, {"out"}),
    "named tuple": (named, {"out"}),
    "frozen features": (frozen, {"out"}),
    "attention": (attended, set()),
    "residual": (residual, set()),
    "normalised": (lambda m, x: m.norm(m.head(m.maps(x))), set()),
    "widened features": (lambda m, x: m.mix(m.head(m.maps(x))).relu().flatten(1), set()),
    "activated": (lambda m, x: F.gelu(m.head(m.maps(x))), set()),
    "read by a layer, too": (reread, {"mix"}),
}


def by_role(imported: Imported, role: str) -> set[str]:
    propagate(imported.gm, imported.inputs)
    return {name for name, found in roles(imported.gm, imported.lifted).items() if found == role}


def compiled(model: nn.Module, x: Tensor, role: str) -> set[str]:
    """Return the layers of a role in the graph that dynamo gives a backend."""
    found: set[str] = set()

    def backend(gm: Any, inputs: Any) -> Any:
        found.update(by_role(import_model(gm, inputs, share=True), role))
        return gm.forward

    torch._dynamo.reset()
    with torch.no_grad():
        torch.compile(model, backend=backend)(x)
    return found


@pytest.mark.parametrize("name", HEADS)
def test_heads(name: str) -> None:
    forward, expected = HEADS[name]
    model, x = Parts(forward).eval(), torch.randn(2, 3, 16, 16)
    batch = ({0: torch.export.Dim("batch", min=2)},)
    exported = torch.export.export(model, (x,), dynamic_shapes=batch).module()
    assert by_role(import_model(model, x), "head") == expected
    assert by_role(import_model(exported, x), "head") == expected
    assert compiled(model, x, "head") == expected


def test_decoding_in_place() -> None:
    """Boxes decoded by item assignment, which only captured graphs can hold."""

    def decoded(net: Parts, x: Tensor) -> Any:
        y = net.head(net.maps(x)).sigmoid()
        y[:, 0:2] = y[:, 0:2] * 2 + 1
        return y.flatten(1)

    model, x = Parts(decoded).eval(), torch.randn(2, 3, 16, 16)
    assert by_role(import_model(torch.export.export(model, (x,)).module(), x), "head") == {"head"}
    assert compiled(model, x, "head") == {"head"}


class Patches(nn.Module):
    """Patches cut out by unfold or reshaping, and a linear layer that embeds them."""

    def __init__(self, unfold: bool) -> None:
        super().__init__()
        self.embed, self.body, self.head = nn.Linear(48, 32), nn.Linear(32, 32), nn.Linear(32, 8)
        self.unfold = unfold

    def forward(self, x: Tensor) -> Tensor:
        if self.unfold:
            y = F.unfold(x, 4, stride=4).mT
        else:
            y = x.reshape(x.shape[0], 3, 4, 4, 4, 4).permute(0, 2, 4, 1, 3, 5).reshape(x.shape[0], 16, 48)
        return self.head(self.body(self.embed(y)).relu().mean(1))


@pytest.mark.parametrize("unfold", [True, False])
def test_linear_patches_are_a_stem(unfold: bool) -> None:
    model, x = Patches(unfold).eval(), torch.randn(2, 3, 16, 16)
    exported = torch.export.export(model, (x,), dynamic_shapes=({0: torch.export.Dim("batch", min=2)},)).module()
    assert by_role(import_model(model, x), "stem") == {"embed"}
    assert by_role(import_model(exported, x), "stem") == {"embed"}
    assert compiled(model, x, "stem") == {"embed"}


def test_pixels_of_a_vector_are_no_patches() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(192, 32), nn.ReLU(), nn.Linear(32, 8)).eval()
    assert by_role(import_model(model, torch.randn(2, 3, 8, 8)), "stem") == set()


class Towers(nn.Module):
    """Two images of their own stems; a later convolution reads only the size of one."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right, self.late = nn.Conv2d(3, 32, 4, 4), nn.Conv2d(3, 32, 4, 4), nn.Conv2d(32, 32, 1)
        self.table, self.head = nn.Embedding(8, 32), nn.Linear(32, 8)

    def forward(self, image: Tensor, other: Tensor, label: Tensor) -> Tensor:
        y = (self.left(image) + self.right(other)).relu()
        y = self.late(F.interpolate(y, size=image.shape[-2:]))
        return self.head(y.mean((2, 3)) + self.table(label))


def test_every_image_has_its_stem() -> None:
    model, inputs = Towers().eval(), (torch.randn(2, 3, 16, 16), torch.randn(2, 3, 16, 16), torch.tensor([1, 2]))
    batch = torch.export.Dim("batch", min=2)
    exported = torch.export.export(model, inputs, dynamic_shapes=[{0: batch}] * 3).module()
    for graph in (model, exported):
        assert by_role(import_model(graph, inputs), "stem") == {"left", "right"}


TIMM = {  # name -> heads, stems
    "vit_tiny_patch16_224": ("head", "patch_embed.proj"),
    "deit_tiny_distilled_patch16_224": ("head head_dist", "patch_embed.proj"),
    "swin_tiny_patch4_window7_224": ("head.fc", "patch_embed.proj"),
    "convnext_atto": ("head.fc", "stem.0"),
    "resnet18": ("fc", "conv1"),
    "regnety_002": ("head.fc", "stem.conv"),
    "mobilenetv3_small_050": ("classifier", "conv_stem"),
    "mobileone_s0": ("head.fc", "stem.conv_kxk.0.conv stem.conv_scale.conv"),
    "mixer_s16_224": ("head", "stem.proj"),
    "caformer_s18": ("head.fc.fc2", "stem.conv"),
    "levit_128s": ("head.linear head_dist.linear", "stem.conv1.linear"),
    "pvt_v2_b0": ("head", "patch_embed.proj"),
    "xcit_nano_12_p16_224": ("head", "patch_embed.proj.0.0"),
    "repvit_m0_9": ("head.head.l head.head_dist.l", "stem.conv1.c"),
    "volo_d1_224": ("", "patch_embed.conv.0"),
}


@pytest.mark.parametrize("name", TIMM)
def test_roles_in_timm(name: str) -> None:
    """The roles that decide which layers of timm's models are masked, as a table."""
    model = timm.create_model(name, num_classes=10).eval()
    imported = import_model(model, torch.randn(1, 3, 224, 224))
    found = roles(imported.gm, imported.lifted)
    heads, stems = TIMM[name]
    assert {n for n, role in found.items() if role == "head"} == set(heads.split())
    assert {n for n, role in found.items() if role == "stem"} == set(stems.split())
    depthwise = {n for n, m in model.named_modules() if isinstance(m, nn.Conv2d) and m.groups == m.in_channels > 1}
    assert {n for n, role in found.items() if role == "depthwise"} == depthwise
