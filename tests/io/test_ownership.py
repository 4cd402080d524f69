"""Files that mpcompile wrote are recognised; files of other programs are never replaced."""

import os

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from mpcompile import Config, load, save, transform
from mpcompile.artifact.verify import read
from mpcompile.errors import ArtifactError
from mpcompile.export import save_dense, save_pt2
from mpcompile.io.ownership import is_ours
from mpcompile.io.writing import write_atomically
from mpcompile.page.merged import visualize_merging
from mpcompile.training import checkpoint
from tests.support.helpers import images, mlp, tiny_vit


@pytest.fixture(scope="module")
def pruned():
    return transform(mlp(), torch.randn(2, 32), Config(pattern="2:4")).eval()


def test_files_that_mpcompile_wrote_are_recognised(pruned, tmp_path):
    save(pruned, tmp_path / "a.mpc")
    save(pruned, f"{tmp_path}/f/")
    save_dense(pruned, tmp_path / "dense.safetensors")
    save_pt2(pruned, torch.randn(2, 32), tmp_path / "p.pt2", engine="dense")
    assert torch.export.load(tmp_path / "p.pt2").module()(torch.randn(2, 32)).shape == (2, 5)
    checkpoint.write(tmp_path / "checkpoint.pt", {"step": 1})
    write_atomically(tmp_path / "plan.json", pruned.plan.to_json())
    visualize_merging(tiny_vit(), images(1)[0], tmp_path / "merged.png", Config(pattern="dense", tome_r=2))
    (tmp_path / "empty").touch()
    ours = [p for p in tmp_path.rglob("*") if p.is_file()]
    assert len(ours) == 9 and all(is_ours(p) for p in ours)
    other = tmp_path / "others"
    other.mkdir()
    save_file({"a": torch.ones(2)}, other / "model.safetensors", {"format": "pt"})
    torch.save({"a": torch.ones(2)}, other / "a.pt")
    np.savez(other / "a.npz", a=np.ones(2))
    (other / "package.json").write_text('{"name": "mpcompile", "version": "1"}')
    (other / "list.json").write_text('[{"a": 1}]')
    (other / "notes.html").write_text("<!doctype html><p>mpcompile is nice")
    (other / "notes.txt").write_text("precious, about mpcompile")
    os.mkfifo(other / "fifo")
    assert not any(is_ours(p) for p in other.iterdir())


def test_a_folder_of_another_program_is_left_alone(pruned, tmp_path):
    dense = tmp_path / "model.safetensors"
    save_file({"a": torch.ones(2)}, dense)
    before = dense.read_bytes()
    with pytest.raises(ArtifactError, match=r"holds a model\.safetensors that mpcompile did not write"):
        save(pruned, f"{tmp_path}/")
    assert dense.read_bytes() == before and list(tmp_path.iterdir()) == [dense]
    dense.unlink()
    (tmp_path / "plan.json").write_text('{"of": "mine"}')
    with pytest.raises(ArtifactError, match=r"holds a plan\.json"):
        save(pruned, tmp_path)
    (tmp_path / "plan.json").unlink()
    for _ in range(2):  # its own files are replaced
        save(pruned, tmp_path)
    assert load(tmp_path).plan == pruned.plan and read(tmp_path).plan == pruned.plan
