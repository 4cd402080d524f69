"""The streamed calibration: moments, and the dense side beside the pruned one."""

import pytest
import torch
from torch import fx, nn

from mpcompile import Config, transform
from mpcompile.calibration.moments import Accumulator
from mpcompile.calibration.stream import Stream
from mpcompile.capture.importers import import_model
from mpcompile.ir.view import layers
from mpcompile.kernels import ops
from tests.support.helpers import images, relative, tiny_vit


@pytest.mark.parametrize("groups", [1, 2])
def test_large_second_moments_are_those_of_all_columns(groups):
    """They are computed in blocks of columns, some of which are mirrored."""
    layer = layers(fx.symbolic_trace(nn.Sequential(nn.Conv2d(650 * groups, 2 * groups, (1, 2), groups=groups))))[0]
    x = torch.randn(3, 650 * groups, 2, 3)
    accumulator = Accumulator(layer, 2, "full")
    accumulator.add(x)
    found = accumulator.result().xx
    taps = torch.stack([x[..., :2], x[..., 1:]], 1).unflatten(2, (groups, 650))  # (B, taps, groups, channels, H, W)
    rows = taps.permute(2, 0, 4, 5, 1, 3).flatten(4).flatten(1, 3).double()
    assert relative(found, rows.transpose(1, 2) @ rows / rows.shape[1]) < 1e-12


@pytest.mark.parametrize("kind", ["full", "block", "diagonal"])
def test_centred_moments_are_those_of_centred_inputs(kind):
    layer = layers(fx.symbolic_trace(nn.Sequential(nn.Linear(8, 6))))[0]
    x, y = torch.randn(500, 8) @ torch.randn(8, 8) + 2, torch.randn(500, 6) - 1
    found = []
    for inputs, outputs in ((x, y), (x - x.mean(0), y - y.mean(0))):
        accumulator = Accumulator(layer, 4, kind)
        accumulator.add(inputs, outputs)
        found.append(accumulator.result())
    centred = found[0].centred()
    assert relative(centred.xx, found[1].xx) < 1e-5 and relative(centred.yx, found[1].yx) < 1e-5
    assert relative(centred.xx, found[0].xx) > 0.1


def test_the_dense_side_merges_what_the_pruned_side_merges(monkeypatch):
    """Otherwise there would be no outputs to fit to: by itself, the dense model pairs other tokens."""
    x = images(4)
    imported = import_model(transform(tiny_vit(), x, Config("dense", tome_r=3)), [x])
    first = next(layer for layer in layers(imported.gm) if layer.name == "blocks.0.attn.qkv")
    places: list[list[torch.Tensor]] = []
    for towards in (1.0, 0.0):
        stream, seen = Stream(imported, [x], towards=towards), []
        if towards:
            stream.replace(first, torch.randn(first.weight.tensor.shape), first.bias)

        def run(node, env, run=stream.runner.on, seen=seen):
            result = run(node, env)
            if node.target is ops.token_merge:
                seen.append(result[2])
            return result

        monkeypatch.setattr(stream.runner, "on", run)
        stream.advance(list(imported.gm.graph.nodes)[-1])
        places.append(seen)
    both, alone = places
    assert len(both) == 2 * len(alone) > 0
    assert all(torch.equal(one, other) for one, other in zip(both[::2], both[1::2], strict=True))
    assert not torch.equal(both[0], alone[0])
