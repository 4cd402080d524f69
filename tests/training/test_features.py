"""Features of a student and its teacher are compared channel by channel, wherever channels were reordered."""

import pytest
import torch
from torch import nn

import mpcompile
from mpcompile import Config, Pipeline
from mpcompile.passes.permute import Permute
from mpcompile.training.features import pair
from tests.support.helpers import images


class Inverted(nn.Module):
    """A block that widens, filters each channel, and narrows; with a shortcut where it can."""

    def __init__(self, inputs, outputs):
        super().__init__()
        self.widen, self.narrow = nn.Conv2d(inputs, 32, 1), nn.Conv2d(32, outputs, 1)
        self.depth = nn.Conv2d(32, 32, 3, padding=1, groups=32)
        self.norm, self.shortcut = nn.BatchNorm2d(outputs), inputs == outputs

    def forward(self, x):
        y = self.norm(self.narrow(self.depth(self.widen(x).relu()).relu()))
        return x + y if self.shortcut else y


class Last(nn.Module):
    """A block whose MLP works on channels behind the axes of the image."""

    def __init__(self, width):
        super().__init__()
        self.depth, self.norm = nn.Conv2d(width, width, 3, padding=1, groups=width), nn.LayerNorm(width)
        self.widen, self.narrow = nn.Linear(width, 64), nn.Linear(64, width)

    def forward(self, x):
        return x + self.narrow(self.widen(self.norm(self.depth(x).permute(0, 2, 3, 1))).relu()).permute(0, 3, 1, 2)


class Plain(nn.Module):
    """Two convolutions as wide inside as outside."""

    def __init__(self, width):
        super().__init__()
        self.first, self.second = nn.Conv2d(width, width, 3, padding=1), nn.Conv2d(width, width, 3, padding=1)

    def forward(self, x):
        return x + self.second(self.first(x).relu())


@pytest.mark.parametrize(
    ("blocks", "widths"),
    [
        (lambda: [Inverted(8, 16), Inverted(16, 16), Inverted(16, 24)], (8, 24)),
        (lambda: [Last(16), Last(16)], (16, 16)),
        (lambda: [Plain(16), Plain(16)], (16, 16)),
    ],
    ids=["inverted", "channels last", "plain"],
)
def test_reordered_channels_are_compared_with_their_own(blocks, widths):
    torch.manual_seed(0)
    body, tail = nn.Sequential(*blocks()), [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(widths[1], 8)]
    model = nn.Sequential(nn.Conv2d(3, widths[0], 3), body, *tail).eval()
    x = images(8, 12)
    gm = mpcompile.transform(model, x[:2], Config("2:4", permute=True, exclude=()), [x], pipeline=Pipeline([Permute()]))
    assert len(gm.plan.passes[0].decision["classes"]) >= 2
    features = pair(gm, model, [x])
    assert len(features.blocks) >= len(body) and any(order is not None for order in features.orders)
    with torch.no_grad():
        (logits, ours), (wanted, theirs) = features.student(x), features.teacher(x)
    torch.testing.assert_close(logits, wanted, atol=1e-5, rtol=1e-4)
    assert float(features.loss(ours, theirs)) < 1e-9
