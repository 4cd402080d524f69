"""One HTML page about a compiled model. Self-contained: no script, nothing fetched, light and dark."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from mpcompile._version import __version__
from mpcompile.data.images import data_config, open_image, preprocess, shown
from mpcompile.errors import InputError
from mpcompile.io.writing import write_atomically
from mpcompile.ir.module import IRModule
from mpcompile.kernels import ops
from mpcompile.page.charts import escape
from mpcompile.page.merged import draw_tokens, merged_patches
from mpcompile.page.sections import SECTIONS
from mpcompile.page.sources import Sources
from mpcompile.page.style import CSS

STEPS = 4  # blocks shown of each image


def render(sources: Sources, title: str = "") -> str:
    """The page as HTML.

    Args:
        sources: what there is to show; a section without data says which command gives it.
        title: its heading; by default the model's name, where the artifact knows it.

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
        found = section.render(sources)
        found = f'<p class="none">{section.missing}</p>' if found is None else found
        body += f'<section id="{section.anchor}"><h2>{escape(section.title)}</h2>{found}</section>'
    # Without a policy of the page's own, a text from a JSON file that escaped escaping could still fetch something.
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
    """A sentence about what the model has become."""
    if sources.artifact is None:
        return f"mpcompile {__version__}"
    plan = sources.artifact.plan
    patterns = ", ".join(sorted({layer.pattern for layer in plan.layers.values()} - {"dense"})) or "no masks"
    merging = plan.config.get("tome_r")
    tokens = f", token merging r = {merging}" if merging else ""
    return f"{patterns} in {len(plan.masked)} of {len(plan.layers)} layers{tokens} · mpcompile {__version__}"


def write(path: Path, sources: Sources, title: str = "") -> None:
    """Write :func:`render` to a file, whole or not at all.

    Raises:
        ArtifactError: the file can't be written.
    """
    write_atomically(path, render(sources, title))


def pictures(gm: IRModule, path: Path) -> list[tuple[str, np.ndarray]]:
    """An image as the model sees it, and with its merged tokens outlined behind some of its blocks.

    Raises:
        InputError: no image, or an artifact that doesn't say what it takes.
        MPCompileError: no tokens merge in this model.
    """
    data = gm.plan.provenance.get("data") or data_config(gm)
    try:
        image = preprocess(data)(open_image(path))
    except (RuntimeError, ValueError, TypeError, KeyError, ArithmeticError) as error:
        raise InputError(
            "this artifact doesn't say how images are made for it",
            expected="a data configuration of timm in its plan's provenance",
            found=f"{type(error).__name__}: {str(error).partition(chr(10))[0]:.100}",
        ) from error
    if not any(node.target is ops.token_merge for node in gm.graph.nodes):
        raise InputError("this artifact merges no tokens: there is nothing to draw", hint="leave out --image")
    dtype = next((p.dtype for p in gm.parameters()), torch.float32)
    tokens = merged_patches(gm, image.to(dtype))
    pixels = shown(image, data)
    steps = sorted({round(k) for k in np.linspace(0, len(tokens) - 1, STEPS)})
    drawn = [(f"{tokens[0].size} patches", pixels)]
    return drawn + [
        (f"behind merge {k + 1}: {len(np.unique(tokens[k]))} tokens", draw_tokens(pixels, tokens[k])) for k in steps
    ]
