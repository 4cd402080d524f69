"""Artifacts saved by earlier versions load, and compute the outputs that they computed when they were saved."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import mpcompile

SAVED = Path(__file__).parent / "saved"
NAMES = sorted(path.stem for path in SAVED.glob("*.mpc"))


def test_the_artifacts_are_there():
    assert NAMES == ["resnet_lowered_reference", "resnet_transformed", "vit_lowered_reference", "vit_transformed"]


@pytest.mark.parametrize("name", NAMES)
def test_loads_and_computes_the_same(name, tmp_path):
    gm = mpcompile.load(SAVED / f"{name}.mpc")
    expected = load_file(SAVED / f"{name}_expected.safetensors")
    with torch.no_grad():
        torch.testing.assert_close(gm.eval()(expected["input"]), expected["output"], rtol=1e-4, atol=1e-5)
    mpcompile.save(gm, tmp_path / "again.mpc")
    again = mpcompile.load(tmp_path / "again.mpc")
    assert again.plan.to_json() == gm.plan.to_json()
    assert all(torch.equal(a, b) for a, b in zip(gm.state_dict().values(), again.state_dict().values(), strict=True))
