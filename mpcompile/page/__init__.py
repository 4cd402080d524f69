"""One HTML page about a compiled model. Self-contained: no script, nothing fetched, light and dark colours."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from mpcompile._version import __version__
from mpcompile.artifact import load
from mpcompile.artifact.container import PLAN, WEIGHTS
from mpcompile.data.images import data_config, open_image, preprocess, shown
from mpcompile.errors import InputError, first_line
from mpcompile.io.writing import write_atomically
from mpcompile.ir.module import IRModule
from mpcompile.kernels import ops
from mpcompile.page.charts import escape
from mpcompile.page.merged import draw_tokens, merged_patches
from mpcompile.page.sections import SECTIONS
from mpcompile.page.sources import Sources
from mpcompile.page.style import CSS

STEPS = 4  # merges drawn per image


def render(sources: Sources, title: str = "") -> str:
    """Return the page as HTML.

    Args:
        sources: the data to show; a section without data names the command that produces it.
        title: the heading; by default the model's name, if the artifact records it.

    Example:
        >>> page = render(Sources(audit={"rows": [{"name": "dense eager", "macs": 2000000}]}), "My model")
        >>> "<h1>My model</h1>" in page, "https://" in page
        (True, False)
    """
    provenance = sources.artifact.plan.provenance if sources.artifact is not None else {}
    title = title or str(provenance.get("model") or sources.name or "Compiled model")
    links = "".join(f'<a href="#{section.anchor}">{escape(section.title)}</a>' for section in SECTIONS)
    body = ""
    for section in SECTIONS:
        content = section.render(sources)
        content = f'<p class="none">{section.missing}</p>' if content is None else content
        body += f'<section id="{section.anchor}"><h2>{escape(section.title)}</h2>{content}</section>'
    # Text from a JSON file is escaped; should any markup get through nevertheless, this policy keeps it from fetching.
    policy = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        f'<meta name="generator" content="mpcompile {__version__}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">'
        f"<title>{escape(title)}</title><style>{CSS}</style></head><body>"
        f'<header><h1>{escape(title)}</h1><p class="soft">{escape(_summary(sources))}</p><nav>{links}</nav></header>'
        f"<main>{body}</main></body></html>\n"
    )


def _summary(sources: Sources) -> str:
    """Return the patterns and the merging of the artifact in one line."""
    if sources.artifact is None:
        return f"mpcompile {__version__}"
    plan = sources.artifact.plan
    patterns = ", ".join(sorted({layer.pattern for layer in plan.layers.values()} - {"dense"})) or "no masks"
    merging = plan.config.get("tome_r")
    tokens = f", token merging r = {merging}" if merging else ""
    return f"{patterns} in {len(plan.masked)} of {len(plan.layers)} layers{tokens} · mpcompile {__version__}"


def write(path: Path, sources: Sources, title: str = "") -> None:
    """Write the page of :func:`render` to a file, atomically.

    Raises:
        ArtifactError: the file cannot be written.
    """
    write_atomically(path, render(sources, title))


def add_artifact(sources: Sources, path: Path, images: Sequence[Path] = ()) -> None:
    """Add a saved artifact to the data of a page: the model in fp32, its name, its sizes, and sample images.

    Args:
        sources: changed in place.
        path: file or folder of :func:`mpcompile.save`.
        images: image files in which the merged tokens are drawn.

    Raises:
        ArtifactError: the artifact cannot be loaded.
        InputError: as :func:`pictures`.
    """
    gm = load(path).eval()
    sources.dense_size = sum(p.numel() * p.element_size() for p in gm.parameters())
    sources.artifact = gm.float()  # CPUs are slow in half precision, or refuse it
    sources.name = path.name
    files = [path / WEIGHTS, path / PLAN] if path.is_dir() else [path]
    sources.size = sum(p.stat().st_size for p in files if p.is_file())
    names = Counter(image.name for image in images)
    for image in images:
        sources.pictures[str(image) if names[image.name] > 1 else image.name] = pictures(gm, image)


def pictures(gm: IRModule, path: Path) -> list[tuple[str, np.ndarray]]:
    """Return an image file as the model sees it, then with its merged tokens outlined after some of the merges.

    Args:
        gm: an artifact that merges tokens.
        path: the image.

    Returns:
        (caption, (H, W, 3) uint8 pixels) pairs, at most 1 + :data:`STEPS`.

    Raises:
        InputError: the file is not an image, the artifact does not record its data configuration, or it merges no
            tokens.
    """
    data = gm.plan.provenance.get("data") or data_config(gm)
    try:
        image = preprocess(data)(open_image(path))
    except (RuntimeError, ValueError, TypeError, KeyError, ArithmeticError) as error:
        raise InputError(
            "this artifact does not record how its images are preprocessed",
            expected="a timm data configuration in its plan's provenance",
            found=f"{type(error).__name__}: {first_line(error):.100}",
        ) from error
    return merging_steps(gm, image, shown(image, data))


def merging_steps(gm: IRModule, image: Tensor, pixels: np.ndarray) -> list[tuple[str, np.ndarray]]:
    """Return pictures of the merging: ``pixels``, then with merged tokens outlined after some of the merges.

    Args:
        gm: a model that merges tokens.
        image: (C, H, W), as the model takes it.
        pixels: (k H, k W, 3) uint8, the picture to draw on, for an integer k.

    Raises:
        InputError: the model merges no tokens, or does not take the image.
    """
    if not any(node.target is ops.token_merge for node in gm.graph.nodes):
        raise InputError("this artifact merges no tokens: there is nothing to draw", hint="leave out --image")
    dtype = next((p.dtype for p in gm.parameters()), torch.float32)
    tokens = merged_patches(gm, image.to(dtype))
    steps = sorted({round(k) for k in np.linspace(0, len(tokens) - 1, STEPS)})
    original = [(f"{tokens[0].size} patches", pixels)]
    return original + [
        (f"after merge {k + 1}: {len(np.unique(tokens[k]))} tokens", draw_tokens(pixels, tokens[k])) for k in steps
    ]
