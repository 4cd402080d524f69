"""verify: legal patterns per tensor, the first violation, and TensorRT's rule for convolutions."""

import json

import pytest
import torch
from safetensors.torch import save_file

import mpcompile
from mpcompile import Config, cli, transform
from mpcompile.artifact.verify import inspect, verify
from mpcompile.errors import ArtifactError
from mpcompile.kernels.nm_format import Pattern, from_rows
from mpcompile.passes.mask import magnitude_mask
from tests.support.helpers import images, mlp, tiny_vit


def test_legal_patterns_of_a_masked_weight():
    weight = torch.randn(8, 48, generator=torch.Generator().manual_seed(0))
    verdict = inspect(weight * magnitude_mask(weight, Pattern(2, 4)), Pattern(2, 4))
    assert verdict.ok and verdict.legal == ["2:4", "4:8", "6:12", "8:16"] and verdict.tensorrt
    wide = inspect(weight * magnitude_mask(weight, Pattern(8, 16)), Pattern(2, 4))
    assert "8:16" in wide.legal and not wide.ok and not wide.tensorrt
    assert inspect(weight).legal == [] and inspect(weight).ok


def test_the_first_violation_of_a_convolution_is_found():
    weight = torch.randn(6, 8, 3, 3, generator=torch.Generator().manual_seed(0))
    weight *= magnitude_mask(weight, Pattern(2, 4))
    weight[4, 4:8, 1, 2] = 1.0
    verdict = inspect(weight, Pattern(2, 4))
    assert verdict.bad == 1 and verdict.groups == weight.numel() // 4
    assert verdict.first == {"row": 4, "channel": 4, "tap": [1, 2]}


def test_groups_along_taps_are_not_tensorrt_sparse():
    weight = torch.randn(4, 8, 2, 2, generator=torch.Generator().manual_seed(0))
    flat = weight.flatten(1)
    along_taps = (flat * magnitude_mask(flat, Pattern(2, 4))).reshape(weight.shape)
    verdict = inspect(along_taps)
    assert not verdict.tensorrt and "kernel taps only" in verdict.note
    rows = from_rows(flat * magnitude_mask(flat, Pattern(2, 4)), weight.shape)
    assert inspect(rows).tensorrt


def test_a_pattern_that_does_not_divide():
    verdict = inspect(torch.zeros(2, 10), Pattern(2, 4))
    assert not verdict.ok and verdict.note == "10 inputs are not divisible by 4"


def test_masked_layers_are_held_to_their_own_pattern():
    gm = transform(mlp(), torch.randn(2, 32), Config("8:16"))
    found = verify(gm)
    assert found.ok and found.verdicts["0.weight"].pattern == "8:16" and found.verdicts["4.weight"].pattern is None
    with torch.no_grad():
        gm.get_submodule("2").weight.fill_(1.0)
    assert not verify(gm).ok
    assert not verify(gm, "2:4").verdicts["4.weight"].ok


def test_command(tmp_path, capsys):
    gm = transform(tiny_vit(), images(), Config("2:4", score="magnitude"))
    mpcompile.save(gm, tmp_path / "pruned.mpc")
    assert cli.main(["verify", str(tmp_path / "pruned.mpc"), "--json", str(tmp_path / "out.json")]) == 0
    assert "8 of 8 meet" in capsys.readouterr().out
    assert json.loads((tmp_path / "out.json").read_text())["blocks.0.mlp.fc1.weight"]["ok"]
    dense = {k: v.clone() for k, v in tiny_vit().state_dict().items()}
    save_file(dense, tmp_path / "dense.safetensors")
    assert cli.main(["verify", str(tmp_path / "dense.safetensors")]) == 0
    assert cli.main(["verify", str(tmp_path / "dense.safetensors"), "--pattern", "2:4", "--only", "blocks.*"]) == 1
    assert "first bad group" in capsys.readouterr().out
    torch.save({"state_dict": dense}, tmp_path / "dense.pt")
    assert cli.main(["verify", str(tmp_path / "dense.pt")]) == 0
    assert cli.main(["verify", "resnet10t", "--pattern", "2:4"]) == 1
    assert cli.main(["verify", str(tmp_path / "none.safetensors")]) == 2
    assert cli.main(["verify", str(tmp_path / "dense.pt"), "--pattern", "5:4"]) == 2
    assert cli.main(["verify", str(tmp_path / "dense.pt"), "--only", "nothing"]) == 2


def test_nothing_to_verify():
    with pytest.raises(ArtifactError, match="no weight"):
        verify({"x": torch.zeros(3)})
