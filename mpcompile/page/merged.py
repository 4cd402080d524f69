"""Pictures of token merging: the patches of an image that each token represents, block by block."""

from __future__ import annotations

import colorsys
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw
from PIL.PngImagePlugin import PngInfo
from torch import Tensor, fx, nn

from mpcompile.config import Config
from mpcompile.errors import InputError, NotEligibleError, first_line
from mpcompile.io.writing import write_atomically
from mpcompile.ir.module import IRModule
from mpcompile.kernels import ops, schema
from mpcompile.passes.merge_tokens.insert import MergeTokens
from mpcompile.pipeline import Pipeline, transform

CELL = 24  # least width of a patch, in pixels
MARGIN = 20  # height of the text above a picture, in pixels


class _Recorder(fx.Interpreter):
    """Runs a graph and records the position to which each merge of its first stream moves every token."""

    def __init__(self, gm: fx.GraphModule) -> None:
        super().__init__(gm)
        self.places: list[Tensor] = []
        self.prefix = self.suffix = 0
        self.stream: set[fx.Node] = set()  # the merges so far, and their parts

    def run_node(self, n: fx.Node) -> Any:
        result = super().run_node(n)
        if n.target is ops.token_merge:
            args = schema.TokenMergeArgs.bind(n)
            if not self.places or args.size in self.stream:
                self.places.append(result[2][0])
                self.prefix, self.suffix = args.prefix, args.suffix
                self.stream.update((n, *n.users))
        return result


def _grid(patches: int, height: int, width: int) -> tuple[int, int]:
    """Return the rows and columns of square patches that tile an image.

    Raises:
        InputError: the image does not divide into that number of square patches.
    """
    for rows in range(1, patches + 1):
        if patches % rows == 0 and rows * width == patches // rows * height and height % rows == 0:
            return rows, patches // rows
    raise InputError(
        "the tokens are not a grid of square patches",
        expected=f"an image of {height}x{width} cut into squares",
        found=f"{patches} tokens of the image",
    )


@torch.no_grad()
def merged_patches(model: nn.Module, image: Tensor, config: Config | None = None) -> list[np.ndarray]:
    """Return the token that each patch of an image belongs to after every merge.

    Args:
        model: a vision transformer, or the result of :func:`mpcompile.transform` with ``tome_r``.
        image: (3, H, W) or (1, 3, H, W), as the model takes it.
        config: how to merge, for a model that does not merge yet; by default, eight tokens per block.

    Returns:
        One integer array (rows, columns) per merge: patches with the same number are one token.

    Raises:
        InputError: there is not exactly one image, or the tokens are not a grid of patches.
        MPCompileError: tokens cannot merge in this model.
    """
    image = image[None] if image.dim() == 3 else image
    if image.dim() != 4 or image.shape[0] != 1:
        raise InputError("this is not one image", expected="(3, H, W) or (1, 3, H, W)", found=tuple(image.shape))
    gm = model
    if not (isinstance(gm, IRModule) and any(n.target is ops.token_merge for n in gm.graph.nodes)):
        gm = transform(model, image, config or Config(pattern="dense", tome_r=8), pipeline=Pipeline([MergeTokens()]))
    recorder = _Recorder(gm)
    try:
        recorder.run(image)
    except (RuntimeError, ValueError, AssertionError) as error:
        raise InputError(
            "the model does not take this image",
            expected="an image of the size that it was traced for",
            found=f"{tuple(image.shape)}: {first_line(error)}",
        ) from error
    if not recorder.places:
        raise NotEligibleError("no tokens merge here", expected="tome_r of 1 or more", hint="give a config with tome_r")
    prefix, end = recorder.prefix, len(recorder.places[0]) - recorder.suffix
    grid = _grid(end - prefix, *image.shape[-2:])
    place = torch.arange(len(recorder.places[0]), device=image.device)
    tokens = []
    for step in recorder.places:
        place = step[place]
        tokens.append(place[prefix:end].reshape(grid).cpu().numpy())
    return tokens


def draw_tokens(image: np.ndarray, tokens: np.ndarray) -> np.ndarray:
    """Fill each merged token of an (H, W, 3) image with its mean colour, and outline it in its own hue."""
    cell = image.shape[0] // tokens.shape[0]
    label = np.kron(tokens, np.ones((cell, cell), dtype=tokens.dtype))
    count = np.bincount(label.ravel())
    total = np.stack([np.bincount(label.ravel(), image[..., c].ravel()) for c in range(3)], -1)
    mean = total / np.maximum(count, 1)[:, None]
    merged = count > cell * cell
    result = np.where(merged[label][..., None], mean[label], image)
    edge = np.zeros(label.shape, dtype=bool)
    for step in range(1, max(1, cell // 12) + 1):
        padded = np.pad(label, step, constant_values=-1)
        for dy, dx in ((0, step), (2 * step, step), (step, 0), (step, 2 * step)):
            edge |= padded[dy : dy + label.shape[0], dx : dx + label.shape[1]] != label
    first = {
        int(t): i for i, t in reversed(list(enumerate(tokens.ravel())))
    }  # its first patch gives a token the same hue in every block
    hues = np.zeros((len(count), 3))
    for token, patch in first.items():
        hues[token] = colorsys.hsv_to_rgb(patch * 0.618034 % 1, 0.9, 1.0)
    outlined = edge & merged[label]
    result[outlined] = 255 * hues[label][outlined]
    return result.astype(np.uint8)


def _stretched(image: Tensor) -> np.ndarray:
    """Return a normalised (3, H, W) image as (H, W, 3) uint8, with its values stretched to the whole range."""
    pixels = image.detach().float().cpu().numpy().transpose(1, 2, 0)
    low, high = pixels.min(), pixels.max()
    return (255 * (pixels - low) / max(float(high - low), 1e-12)).astype(np.uint8)


def _sheet(titled: Sequence[tuple[str, np.ndarray]], columns: int) -> Image.Image:
    """Arrange pictures of one size in rows, each under its title."""
    columns = max(1, min(columns, len(titled)))
    height, width = titled[0][1].shape[:2]
    high, wide = height + MARGIN, width + 4
    sheet = Image.new("RGB", (columns * wide, -(-len(titled) // columns) * high), "white")
    draw = ImageDraw.Draw(sheet)
    for number, (title, pixels) in enumerate(titled):
        left, top = number % columns * wide, number // columns * high
        draw.text((left + 4, top + 4), title, fill="black")
        sheet.paste(Image.fromarray(pixels), (left, top + MARGIN))
    return sheet


def visualize_merging(
    model: nn.Module,
    image: Tensor,
    path: str | os.PathLike[str],
    config: Config | None = None,
    *,
    display: np.ndarray | Tensor | None = None,
    columns: int = 4,
) -> list[np.ndarray]:
    """Draw an image with its merged tokens outlined, once per block, and write it as a PNG.

    Patches that form one token are filled with their mean colour and share an outline; other patches are
    unchanged. Source: Bolya et al., "Token Merging: Your ViT But Faster", section 5.2.

    Args:
        model: a vision transformer, or the result of :func:`mpcompile.transform` with ``tome_r``.
        image: (3, H, W) or (1, 3, H, W), as the model takes it (normalised).
        path: the PNG to write.
        config: how to merge, for a model that does not merge yet; by default, eight tokens per block.
        display: the picture to draw on, (H, W, 3) uint8; by default, ``image`` with its values stretched to 0-255.
        columns: pictures per row.

    Returns:
        One integer array (rows, columns) per block: patches with the same number are one token.

    Raises:
        InputError: there is not exactly one image, the tokens are not a grid of patches, or the display has another
            size.
        ArtifactError: the file cannot be written.
        MPCompileError: tokens cannot merge in this model.

    Example:
        >>> import tempfile, timm
        >>> vit = timm.create_model("vit_tiny_patch16_224", depth=2, img_size=64).eval()
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     tokens = visualize_merging(vit, torch.randn(3, 64, 64), f"{folder}/merged.png", Config(tome_r=4))
        >>> [len(set(block.ravel().tolist())) for block in tokens]
        [12, 8]
    """
    tokens = merged_patches(model, image, config)
    height, width = image.shape[-2:]
    base = _stretched(image.reshape(-1, height, width)) if display is None else np.asarray(display)
    if base.shape != (height, width, 3) or base.dtype != np.uint8:
        found = f"{base.dtype} of shape {base.shape}"
        raise InputError(
            "the display does not fit the image", expected=f"uint8 of shape {(height, width, 3)}", found=found
        )
    scale = -(-CELL * tokens[0].shape[0] // height)
    base = base.repeat(scale, 0).repeat(scale, 1)
    titled = [("image", base)]
    for number, block in enumerate(tokens):
        titled.append((f"block {number}: {len(np.unique(block))} tokens", draw_tokens(base, block)))
    sheet = _sheet(titled, columns)
    note = PngInfo()
    note.add_text("Software", "mpcompile")
    write_atomically(Path(path), lambda temporary: sheet.save(temporary, format="PNG", pnginfo=note))
    return tokens
