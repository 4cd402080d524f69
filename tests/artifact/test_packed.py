"""Packed weights in artifacts: size, every pattern, unpackable weights, forged masks, and the folder form."""

import itertools
import json
import logging
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from mpcompile import Config, load, save, transform
from mpcompile.artifact.opset import Refusal
from mpcompile.artifact.packed import combinations
from mpcompile.artifact.packed.tensors import pack_tensors, unpack_tensors
from mpcompile.errors import ArtifactError
from mpcompile.kernels.nm_format import Pattern, from_rows
from mpcompile.layers import MaskedConv2d, MaskedLinear
from tests.artifact.test_hostile import forge, parts
from tests.artifact.test_save_load import hand_made
from tests.support.helpers import images, mlp, tiny_vit


def random_mask(shape, pattern, seed=0):
    """N of every M along the group axis, at random places."""
    n, m = pattern
    k = torch.Size(shape[1:]).numel()
    order = torch.rand(shape[0], k // m, m, generator=torch.Generator().manual_seed(seed)).argsort(-1)
    return from_rows((order < n).reshape(shape[0], k), shape).contiguous()


def layer_of(shape, pattern, dtype=torch.float32):
    weight, mask = torch.randn(shape).to(dtype), random_mask(shape, pattern)
    weight = weight.masked_fill_(~mask, 0)
    if len(shape) == 2:
        return MaskedLinear(weight, None, mask, pattern)
    return MaskedConv2d(weight, None, mask, pattern, [1, 1], [0, 0], [1, 1], 1)


def module_of(layer):
    from torch import fx

    graph = fx.Graph()
    graph.output(graph.call_module("layer", (graph.placeholder("x"),)))
    return hand_made({"layer": layer}, graph)


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_every_pattern_round_trips_bit_for_bit(data):
    m = data.draw(st.integers(1, 32))
    pattern = Pattern(data.draw(st.integers(1, m)), m)
    shape = (data.draw(st.integers(1, 5)), m * data.draw(st.integers(1, 5)))
    shape += data.draw(st.sampled_from([(), (1, 1), (3, 2)]))
    gm = module_of(layer_of(shape, pattern, data.draw(st.sampled_from([torch.float32, torch.float16, torch.bfloat16]))))
    kinds = {"layer.weight": {"kind": "parameter"}, "layer.mask": {"kind": "buffer"}}
    stored = pack_tensors(gm, kinds, {"layer.weight": gm.layer.weight, "layer.mask": gm.layer.mask})
    assert sorted(stored) == ["layer.weight.mask", "layer.weight.values"]
    whole = unpack_tensors(json.loads(json.dumps(kinds)), stored)
    assert torch.equal(whole["layer.weight"], gm.layer.weight) and torch.equal(whole["layer.mask"], gm.layer.mask)
    assert whole["layer.weight"].stride() == gm.layer.weight.stride()


@pytest.mark.parametrize(("n", "m"), [(1, 1), (1, 7), (2, 4), (3, 8), (5, 5), (8, 11)])
def test_the_masks_of_a_group_are_numbered_from_0(n, m):
    """The code of one group is its rank: the masks have the numbers from 0 to C(M, N) - 1, each once."""
    numbers = set()
    for places in itertools.combinations(range(m), n):
        kept = np.isin(np.arange(m), places)[None]
        code = combinations.encode(kept, n)
        numbers.add(int.from_bytes(code.tobytes(), "little"))
        assert np.array_equal(combinations.decode(code, 1, n, m), kept)
    assert numbers == set(range(math.comb(m, n)))


@pytest.mark.parametrize(("pattern", "most"), [("2:4", 0.543), ("4:8", 0.55), ("8:16", 0.556)])
def test_half_of_the_weights_take_at_most_57_percent(pattern, most, tmp_path):
    """Values take 50 % of fp16, masks log2(C(M, N)) / 16 M: 4.04, 4.79 and 5.33 %, within 0.07 %; then the graph."""
    layer = layer_of((512, 2048), Pattern.parse(pattern), torch.float16)
    save(module_of(layer), tmp_path / "file")
    assert (tmp_path / "file").stat().st_size / (512 * 2048 * 2) < most
    assert torch.equal(load(tmp_path / "file").layer.weight, layer.weight)


def test_removed_weights_that_are_not_zero_are_stored_with_a_warning(tmp_path, caplog):
    layer = layer_of((8, 16), Pattern(2, 4))
    with torch.no_grad():
        layer.weight[~layer.mask] = 1.0
    with caplog.at_level(logging.WARNING, logger="mpcompile"):
        save(module_of(layer), tmp_path / "file")
    assert "1 masked weights are stored in full" in caplog.text and "layer.weight" in caplog.text
    loaded = load(tmp_path / "file").layer
    assert torch.equal(loaded.weight, layer.weight) and torch.equal(loaded.mask, layer.mask)


def test_a_mask_that_keeps_fewer_is_stored_in_full(tmp_path):
    layer = layer_of((8, 16), Pattern(2, 4))
    layer.mask[0] = False
    with torch.no_grad():
        layer.weight[0] = 0
    save(module_of(layer), tmp_path / "file")
    assert "layer.mask" in load_file(tmp_path / "file")
    assert torch.equal(load(tmp_path / "file").layer.mask, layer.mask)


def test_layers_that_share_a_weight(tmp_path):
    first, second = layer_of((8, 16), Pattern(2, 4)), layer_of((8, 16), Pattern(2, 4))
    second.weight, second.mask = first.weight, first.mask
    gm = module_of(first)
    gm.add_module("twin", second)
    save(gm, tmp_path / "file")
    loaded = load(tmp_path / "file")
    assert loaded.twin.weight is loaded.layer.weight and loaded.twin.mask is loaded.layer.mask
    assert torch.equal(loaded.layer.weight, first.weight)


def test_exported_graphs_are_packed_too(tmp_path):
    x = images(2)
    gm = transform(torch.export.export(tiny_vit(), (x,)).module(), x, Config(pattern="2:4"))
    save(gm, tmp_path / "file")
    assert sum(name.endswith(".values") for name in load_file(tmp_path / "file")) == len(gm.plan.masked) > 4
    assert torch.equal(load(tmp_path / "file")(x), gm(x))


def packed_parts(n=2, m=4, rows=4, k=16):
    gm = module_of(layer_of((rows, k), Pattern(n, m)))
    kinds = {"layer.weight": {"kind": "parameter"}, "layer.mask": {"kind": "buffer"}}
    return kinds, pack_tensors(gm, kinds, {"layer.weight": gm.layer.weight, "layer.mask": gm.layer.mask})


def code(*values):
    return torch.tensor(values, dtype=torch.uint8)


FORGED = [
    ({"n": 0}, {}, "malformed"),
    ({"n": 5}, {}, "malformed"),
    ({"m": 64}, {}, "malformed"),
    ({"n": True}, {}, "malformed"),
    ({"m": 3}, {}, "malformed"),
    ({"shape": [4, 16, 1]}, {}, "malformed"),
    ({"shape": [4, -16]}, {}, "malformed"),
    ({"shape": [10**9, 16]}, {}, "do not make a 2:4 weight"),
    ({"shape": [16, 4]}, {}, "do not make a 2:4 weight"),
    ({"n": 1}, {}, "do not make a 1:4 weight"),
    ({}, {"mask": code()}, "wrong length"),
    ({}, {"mask": code(*[1] * 5)}, "wrong length"),
    ({}, {"mask": code(*[1] * 7)}, "wrong length"),
    ({}, {"mask": code(*[1] * 6).view(1, 6)}, "do not make a 2:4 weight"),
    ({}, {"mask": torch.ones(6)}, "do not make a 2:4 weight"),
    ({}, {"mask": code(*[255] * 5, 15)}, "not one of the 6"),  # above 6 ** 17
    ({}, {"mask": code(*[0] * 5, 4)}, "not one of the 6"),  # a 17th group, of 16
    ({}, {"mask": code(*[0] * 5, 16)}, "beyond its last group"),  # bit 44 of 44
    ({}, {"values": torch.ones(4, 8, dtype=torch.int32)}, "do not make a 2:4 weight"),
]


@pytest.mark.parametrize(("spec", "tensors", "message"), FORGED, ids=range(len(FORGED)))
def test_forged_parts_are_refused(spec, tensors, message):
    kinds, stored = packed_parts()
    kinds["layer.weight"]["packed"].update(spec)
    stored.update({f"layer.weight.{name}": tensor for name, tensor in tensors.items()})
    with pytest.raises(Refusal, match=f"packed weight layer.weight: .*{message}"):
        unpack_tensors(kinds, stored)


def test_a_forged_file_is_refused(tmp_path):
    save(module_of(layer_of((4, 16), Pattern(2, 4))), tmp_path / "good")
    header, data = parts(tmp_path / "good")
    texts = json.loads(header["__metadata__"]["tensors"])
    texts["layer.weight"]["packed"]["mask"] = "layer.weight"
    header["__metadata__"]["tensors"] = json.dumps(texts)
    with pytest.raises(ArtifactError, match="cannot be loaded"):
        load(forge(tmp_path / "bad", header, data))


# --- The folder form ---


@pytest.fixture
def saved(tmp_path) -> tuple[Path, torch.nn.Module]:
    gm = transform(mlp(), torch.ones(1, 32), Config(pattern="2:4"))
    gm.plan.provenance, gm.plan.figures = {"model": "mlp"}, {"rows": [{"name": "dense", "macs": 1}]}
    save(gm, f"{tmp_path}/pruned/")
    return tmp_path / "pruned", gm


def test_a_folder_holds_weights_and_a_readable_plan(saved):
    folder, gm = saved
    assert sorted(p.name for p in folder.iterdir()) == ["model.safetensors", "plan.json"]
    plan = json.loads((folder / "plan.json").read_text())
    assert plan["format_version"] == "3" and plan["torch"] == torch.__version__ and len(plan["sha256"]) == 64
    assert plan["plan"]["provenance"] == {"model": "mlp"} and plan["plan"]["figures"] == gm.plan.figures
    assert plan["plan"]["config"]["pattern"] == "2:4"
    for place in (folder, folder / "model.safetensors"):
        loaded = load(place)
        assert loaded.plan == gm.plan and torch.equal(loaded(torch.ones(1, 32)), gm(torch.ones(1, 32)))
    save(gm, folder)  # it exists: no slash needed
    (folder / "plan.json").unlink()
    assert load(folder).plan == gm.plan


def test_a_plan_of_another_save_is_refused(saved):
    folder, gm = saved
    before = (folder / "plan.json").read_text()
    gm.plan.note("later")
    save(gm, folder)
    (folder / "plan.json").write_text(before)
    with pytest.raises(ArtifactError, match=r"plan\.json does not belong to model\.safetensors"):
        load(folder)
    (folder / "plan.json").write_text("{")
    with pytest.raises(ArtifactError, match=r"its plan\.json is not JSON"):
        load(folder)


def test_a_forged_plan_in_a_folder_is_refused(saved):
    folder, _ = saved
    header, data = parts(folder / "model.safetensors")
    header["__metadata__"]["plan"] = "{"
    forge(folder / "model.safetensors", header, data)
    with pytest.raises(ArtifactError, match="its plan is not JSON"):
        load(folder)


def test_a_folder_without_weights_is_not_an_artifact(tmp_path):
    with pytest.raises(ArtifactError, match=r"a folder without model\.safetensors"):
        load(tmp_path)
