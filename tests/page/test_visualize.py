"""Pictures of merged tokens: the groups drawn are those that merged, and bad input is refused."""

import numpy as np
import pytest
import torch
from PIL import Image

import mpcompile
from mpcompile import Config, Pipeline, transform
from mpcompile.cli import main
from mpcompile.errors import ArtifactError, InputError, NotEligibleError
from mpcompile.page.merged import draw_tokens, merged_patches, visualize_merging
from mpcompile.passes.merge_tokens.insert import MergeTokens
from tests.support import merging_reference
from tests.support.helpers import images, tiny_vit

CONFIG = Config(pattern="dense", tome_r=3, tome_method="tome")


def test_patches_are_grouped_as_the_reference_merges_them():
    model, x = tiny_vit(reg_tokens=2), images(1)
    found = merged_patches(model, x[0], CONFIG)
    with torch.no_grad(), merging_reference.Merging(list(model.blocks), [3, 3], 3) as merging:
        model(x)
    groups = {frozenset(m - 3 for m in group) for group in merging.members[0] if min(group) >= 3}
    last = found[-1].ravel()
    assert {frozenset(np.flatnonzero(last == token)) for token in set(last)} == groups
    assert [len(np.unique(block)) for block in found] == [13, 10]


def test_takes_a_transformed_module_as_it_merges():
    model, x = tiny_vit(), images(1)
    gm = transform(model, x, Config(pattern="dense", tome_r=[5, 1]), pipeline=Pipeline([MergeTokens()]))
    assert [len(np.unique(block)) for block in merged_patches(gm, x)] == [11, 10]


def test_merged_tokens_are_filled_and_outlined():
    image = np.random.default_rng(0).integers(0, 255, (48, 48, 3), dtype=np.uint8)
    drawn = draw_tokens(image, np.array([[0, 1], [2, 1]]))
    assert np.array_equal(drawn[:, :24], image[:, :24])  # tokens 0 and 2 are single patches
    mean = image[:, 24:].reshape(-1, 3).mean(0)
    assert np.abs(drawn[10:38, 30:42] - mean).max() <= 1  # no line between the two patches of token 1
    assert len({tuple(pixel) for pixel in drawn[:, 24]} | {tuple(pixel) for pixel in drawn[0, 24:]}) == 1


def test_writes_a_png_with_one_picture_per_block(tmp_path):
    path = tmp_path / "merged.png"
    mpcompile.visualize_merging(tiny_vit(), images(1)[0], path, CONFIG, columns=2)
    sheet = Image.open(path)
    assert sheet.format == "PNG"
    assert sheet.size == (2 * (96 + 4), 2 * (96 + 20))
    assert [p.name for p in tmp_path.iterdir()] == ["merged.png"]


def test_refusals(tmp_path):
    model, x = tiny_vit(), images(2)
    with pytest.raises(InputError, match="not one image"):
        merged_patches(model, x, CONFIG)
    with pytest.raises(NotEligibleError, match="no tokens merge here"):
        merged_patches(model, x[0], Config(pattern="dense"))
    with pytest.raises(InputError, match="not a grid of square patches"):
        merged_patches(model, x[0], Config(pattern="dense", tome_r=3, prefix_tokens=2))
    with pytest.raises(InputError, match="display does not fit"):
        visualize_merging(model, x[0], tmp_path / "a.png", CONFIG, display=np.zeros((8, 8, 3), np.uint8))
    with pytest.raises(ArtifactError, match="cannot write"):
        visualize_merging(model, x[0], tmp_path / "missing" / "a.png", CONFIG)


def test_the_command_draws_a_timm_model(tmp_path, capsys):
    source, out = tmp_path / "photo.png", tmp_path / "merged.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (180, 200, 3), dtype=np.uint8)).save(source)
    # test_vit3 has nine blocks on 160 x 160 images
    arguments = ["visualize", "test_vit3", "--image", str(source), "--out", str(out), "--tome-r", "9,5" + 7 * ",0"]
    assert main(arguments) == 0
    assert "100 -> 91 -> 86 patches" in capsys.readouterr().out
    assert out.exists()
    assert main([*arguments[:3], str(tmp_path / "none.png")]) == 2
    assert "cannot read" in capsys.readouterr().err
