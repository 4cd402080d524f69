"""Image processors of transformers as timm's data configurations: images come out the same."""

import numpy as np
import pytest
import torch
from PIL import Image

from mpcompile.data.images import preprocess
from mpcompile.sources.processors import data_of

CASES = {
    "squashed": ("ViTImageProcessor", {"size": {"height": 32, "width": 48}}),
    "bicubic": ("ViTImageProcessor", {"size": {"height": 32, "width": 32}, "resample": 3}),
    "clip": ("CLIPImageProcessor", {"size": {"shortest_edge": 40}, "crop_size": {"height": 32, "width": 32}}),
    "resized and cropped": (
        "BeitImageProcessor",
        {"size": {"height": 40, "width": 40}, "do_center_crop": True, "crop_size": {"height": 32, "width": 32}},
    ),
    "convnext": ("ConvNextImageProcessor", {"size": {"shortest_edge": 28}, "crop_pct": 0.7}),
    "squashed convnext": ("ConvNextImageProcessor", {"size": {"shortest_edge": 384}}),
    "not normalized": ("ViTImageProcessor", {"size": {"height": 32, "width": 32}, "do_normalize": False}),
    "not rescaled": ("ViTImageProcessor", {"size": {"height": 32, "width": 32}, "do_rescale": False}),
    "another factor": ("ViTImageProcessor", {"size": {"height": 32, "width": 32}, "rescale_factor": 1 / 127.5}),
}


@pytest.mark.parametrize("name", CASES)
def test_images_come_out_the_same(name):
    import transformers

    kind, options = CASES[name]
    processor = getattr(transformers, kind)(**options)
    data = data_of(processor.to_dict())
    x, y = np.meshgrid(np.arange(96), np.arange(64))
    image = Image.fromarray(np.stack([2 * x, 3 * y, x + y], -1).astype(np.uint8))
    ours = preprocess({"interpolation": "bilinear", **data})(image)
    theirs = processor(image, return_tensors="pt")["pixel_values"][0]
    assert list(ours.shape) == list(theirs.shape) == data["input_size"]
    inner = (slice(None), slice(2, -2), slice(2, -2))  # filters differ at the edges
    scale = float(theirs.abs().max())
    torch.testing.assert_close(ours[inner], theirs[inner].float(), atol=0.02 * scale, rtol=0)


def test_configurations_of_older_versions():
    data = data_of(
        {"do_normalize": True, "do_resize": True, "image_mean": [0.5] * 3, "image_std": [0.5] * 3, "size": 224}
    )
    assert data["input_size"] == [3, 224, 224] and data["mean"] == [0.5] * 3
    offset = data_of(
        {"size": 64, "rescale_factor": 1 / 127.5, "rescale_offset": True, "image_mean": 0.0, "image_std": 1.0}
    )
    assert offset["mean"] == pytest.approx([0.5] * 3) and offset["std"] == pytest.approx([0.5] * 3)


@pytest.mark.parametrize("side", range(16, 500, 7))
def test_timm_resizes_to_the_size_that_was_asked_for(side):
    data = data_of({"do_center_crop": True, "size": {"shortest_edge": side + 37}, "crop_size": side})
    resize = preprocess({**data, "interpolation": "bilinear"}).transforms[0]
    size = resize.size if isinstance(resize.size, int) else min(resize.size)
    assert size == side + 37
