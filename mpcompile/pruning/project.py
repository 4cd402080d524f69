"""Projection onto N:M: the mask and the refitted values of a layer, from the moments of its inputs.

:func:`project` does one layer. :func:`in_sequence` does one layer after another along the graph, each from the outputs
of the pruned layers before it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from tqdm import tqdm

from mpcompile.calibration.moments import DIAGONAL, FULL, Moments, collect
from mpcompile.calibration.norms import BatchNorm, Statistics, batch_norms
from mpcompile.calibration.stream import Stream
from mpcompile.io.writing import make_folder, write_atomically
from mpcompile.ir.module import Imported
from mpcompile.ir.view import LayerOp
from mpcompile.kernels.nm_format import Pattern, from_rows, to_rows
from mpcompile.pruning import refit, scores
from mpcompile.pruning.scores import DAMPING

# A fit to dense outputs from pruned inputs shrinks the components that it cannot predict, and fitting fully to the
# dense outputs overfits: of 0, 1/4, 1/2 and 1, 1/4 was best on held-out images.
TOWARDS_DENSE = 0.25


@dataclass(frozen=True)
class Projection:
    """The result of projecting a layer.

    Attributes:
        mask: boolean, of the weight's shape.
        weight: refitted values, zero outside the mask; None if the weight keeps its own values.
        score: the score that chose the mask.
        notes: result of the refit: ``error_masked`` and ``error_refitted``, the mean squared error of the outputs over
            their mean square on the calibration data; or ``skipped``, the reason why there was no refit.
    """

    mask: Tensor
    weight: Tensor | None
    score: str
    notes: dict[str, Any] = field(default_factory=dict)


def problems(weight: Tensor, moments: Moments) -> list[tuple[Tensor, Tensor]]:
    """Return target rows (R, K) and damped moments (K, K) for each of a convolution's groups (one for a linear layer).

    The target rows are the layer's own. If the moments hold target outputs, they are the unmasked rows that come
    closest to these, regularised towards the layer's own by the damping.
    """
    parts = to_rows(weight.detach()).float().chunk(len(moments.xx))
    wanted = [None] * len(parts) if moments.yx is None else moments.yx.chunk(len(parts))
    pieces = []
    for rows, xx, yx in zip(parts, moments.xx, wanted, strict=True):
        xx = xx.to(rows.device)
        a, target = scores.damped(xx, DAMPING), rows
        if yx is not None:
            exact = rows.double()
            target = (exact + torch.linalg.solve(a, yx.to(rows.device) - exact @ xx, left=False)).float()
        pieces.append((target, a.float()))
    return pieces


def choose(
    weight: Tensor, moments: Moments | None, pattern: Pattern, score: str, prior: tuple[Tensor, float] | None = None
) -> tuple[Tensor, Tensor | None, str]:
    """Return the mask of a weight, the values that the score adjusts it to (None: its own), and the score used.

    Args:
        weight: (out, in) or (out, in / groups, kh, kw).
        moments: moments of its inputs; without them the score is magnitude. ``obs`` needs full moments, ``covariance``
            at least blocks; otherwise the next cheaper score is used.
        prior: a source mask of the weight's shape and the weight alpha of the Hamming prior, for ``covariance``.
    """
    if moments is None or score == "magnitude":
        return scores.magnitude_mask(weight, pattern), None, "magnitude"
    rows = to_rows(weight.detach()).float()
    if score == "obs" and moments.kind != FULL:
        score = "covariance"
    if score == "covariance" and moments.kind == DIAGONAL:
        score = "wanda"
    if score == "obs":
        solved = [scores.obs_rows(target, a, pattern, 0.0) for target, a in problems(weight, moments)]
        values, kept = (from_rows(torch.cat(parts), weight.shape) for parts in zip(*solved, strict=True))
        return kept, values, score
    chosen = []
    parts = rows.chunk(len(moments.x))
    blocks, power = moments.block(pattern.m), moments.power
    source = [None] * len(parts) if prior is None else to_rows(prior[0]).chunk(len(parts))
    for index, part in enumerate(parts):
        if score == "wanda":
            chosen.append(scores.wanda_rows(part, power[index].to(part), pattern))
            continue
        c, mask = blocks[index].to(part), source[index]
        price = None if mask is None or prior is None else scores.prior_price(part, c, mask, prior[1], pattern.m)
        kept = scores.covariance_rows(part, c, pattern, price)
        if moments.kind == FULL and price is None:
            kept = scores.sweep_rows(part, moments.xx[index].to(part), kept, pattern)
        chosen.append(kept)
    return from_rows(torch.cat(chosen), weight.shape), None, score


def restore(
    weight: Tensor, mask: Tensor, values: Tensor | None, moments: Moments | None, pattern: Pattern
) -> tuple[Tensor, Tensor | None, dict[str, Any]]:
    """Refit the kept values, and swap kept for removed ones -> mask, values (None: unchanged), notes.

    Args:
        values: start of the refit, of the weight's shape; None starts from the weight itself.
        moments: must be full; otherwise nothing is done, and the notes say why.

    No row ends with a larger error than it began with; the notes hold the error before and after, over the mean
    square of the outputs.
    """
    if moments is None:
        return mask, values, {"skipped": "no calibration data"}
    if moments.kind != FULL:
        return mask, values, {"skipped": f"{moments.kind} statistics: a larger memory budget would hold full ones"}
    start = to_rows(weight.detach().float() * mask if values is None else values)
    fitted, kept, before, after, energy = [], [], 0.0, 0.0, 0.0
    pieces = problems(weight, moments)
    for (target, a), v, k in zip(pieces, start.chunk(len(pieces)), to_rows(mask).chunk(len(pieces)), strict=True):
        new, chosen = refit.refit(v, target, a, k, pattern)
        before += float(refit.error(v, target, a).sum())
        after += float(refit.error(new, target, a).sum())
        energy += float(refit.error(torch.zeros_like(v), target, a).sum())
        fitted.append(new)
        kept.append(chosen)
    notes = {"error_masked": before / max(energy, 1e-30), "error_refitted": after / max(energy, 1e-30)}
    return from_rows(torch.cat(kept), weight.shape), from_rows(torch.cat(fitted), weight.shape), notes


def project(
    weight: Tensor,
    moments: Moments | None,
    pattern: Pattern,
    score: str,
    refitted: bool,
    prior: tuple[Tensor, float] | None = None,
) -> Projection:
    """Mask one weight by a score and, if ``refitted``, restore it."""
    mask, values, used = choose(weight, moments, pattern, score, prior)
    notes: dict[str, Any] = {}
    if refitted:
        mask, values, notes = restore(weight, mask, values, moments, pattern)
    return Projection(mask.contiguous(), values, used, notes)


class Records:
    """Moments of layers in a folder, one safetensors file each, from which an interrupted run resumes.

    Args:
        folder: the folder, created if missing; None keeps nothing.
        stamp: digest of everything that the moments depend on; files with another stamp are ignored and replaced.

    Raises:
        ArtifactError: the folder cannot be created.
    """

    def __init__(self, folder: Path | None, stamp: str) -> None:
        self.folder, self.stamp = folder, stamp
        if folder is not None:
            make_folder(folder)

    def _path(self, name: str) -> Path | None:
        return None if self.folder is None else self.folder / f"{name}.safetensors"

    def get(self, name: str) -> Moments | None:
        """Return the moments of a layer, or None if there are none, or if they are not of this run."""
        path = self._path(name)
        if path is None or not path.is_file():
            return None
        try:
            with safe_open(path, "pt") as file:
                if (file.metadata() or {}).get("stamp") != self.stamp:
                    return None
            return Moments.from_tensors(load_file(path))
        except Exception:  # a torn or foreign file: its moments are gathered again
            return None

    def put(self, name: str, moments: Moments) -> None:
        """Write the moments of a layer, through a temporary file.

        Raises:
            ArtifactError: the folder is not writable, or the disk is full.
        """
        path = self._path(name)
        if path is None:
            return
        tensors = {k: v.cpu() for k, v in moments.tensors().items()}
        write_atomically(path, lambda temporary: save_file(tensors, temporary, {"stamp": self.stamp}))


def stamp(model: Imported, values: Sequence[Sequence[Any]], config: Mapping[str, Any]) -> str:
    """Return a digest of the weights, the calibration data and the options: everything that moments depend on."""
    digest = hashlib.sha256(json.dumps(config, sort_keys=True, default=str).encode())
    tensors = [*model.gm.state_dict().values(), *model.lifted.tensors.values()]
    for tensor in [*tensors, *(v for batch in values for v in batch if isinstance(v, Tensor))]:
        digest.update(str((tuple(tensor.shape), tensor.dtype)).encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def in_sequence(
    model: Imported,
    uses: Mapping[str, Sequence[LayerOp]],
    patterns: Mapping[str, Pattern],
    decide: Callable[[str, Moments], Projection],
    calibration: Iterable[Any],
    *,
    memory: int,
    policy: str,
    renorm: bool,
    statistics: Path | None = None,
    options: Mapping[str, Any] | None = None,
) -> tuple[dict[str, Projection], Statistics]:
    """Project one layer after another along the graph, each from the outputs of the pruned layers before it.

    Args:
        model: the model; not changed.
        uses: the nodes of each layer to project. A layer with several nodes is decided at the first, from dense inputs.
        decide: name and moments -> projection of the layer.
        calibration: batches; read once.
        memory: bytes that moments may take, and as many again for the activations held between layers.
        policy: ``calibrate`` of :func:`mpcompile.transform`. ``"pruned_to_dense"`` fits layers towards the outputs of
            the dense model, :data:`TOWARDS_DENSE` of the way, and ``"adapted"`` all the way if there are BatchNorms.
        renorm: re-estimate the statistics of BatchNorms after projected layers: matched to the outputs of the dense
            model, or, if ``policy`` is not ``"pruned_to_dense"``, those of the calibration data.
        statistics: a folder that keeps the moments of layers, so that an interrupted run resumes.
        options: everything else that the moments depend on; moments of other options are gathered again.

    Returns:
        The projections by layer name, and the running statistics of each re-estimated BatchNorm by their paths.
    """
    norm_at = {norm.node: norm for norm in batch_norms(model.gm)} if renorm else {}
    towards = 0.0 if policy == "pruned" else TOWARDS_DENSE
    if policy == "adapted" and norm_at:
        towards = 1.0
    stream = Stream(model, calibration, memory, towards)
    records = Records(statistics, "")
    if statistics is not None:
        patterns_of = {name: str(pattern) for name, pattern in patterns.items()}
        how = {"memory": memory, "towards": towards, "patterns": patterns_of}
        records.stamp = stamp(model, list(stream.inputs()), {**(options or {}), **how})
    shared = {name: patterns[name].m for name, nodes in uses.items() if len(nodes) > 1}
    dense = collect(model, stream.inputs(), shared, memory) if shared else {}
    layer_at = {nodes[0].node: name for name, nodes in uses.items()}
    projections: dict[str, Projection] = {}
    norms: Statistics = {}
    stops = [n for n in model.gm.graph.nodes if n in layer_at or n in norm_at]
    for node in tqdm(stops, desc="prune", unit="layer", disable=None):
        if node in norm_at:
            _renorm(stream, norm_at[node], norms, match=policy == "pruned_to_dense")
            continue
        name = layer_at[node]
        layer = uses[name][0]
        moments = dense.get(name) or records.get(name)
        if moments is None:
            moments = stream.moments(layer, patterns[name].m, memory)
            records.put(name, moments)
        if len(uses[name]) == 1 and len(norm_at.keys() & node.users.keys()) == len(node.users) == 1:
            moments = moments.centred()  # only a BatchNorm reads the outputs, and it subtracts their means
        projections[name] = projection = decide(name, moments)
        weight = layer.weight.tensor.detach()
        new = weight * projection.mask if projection.weight is None else projection.weight.to(weight.dtype)
        for use in uses[name]:
            stream.replace(use, new, use.bias)
    return projections, norms


def reestimate(model: Imported, calibration: Iterable[Any], memory: int) -> Statistics:
    """Re-estimate mean and variance of every BatchNorm of a graph, each after the re-estimated ones before it.

    Args:
        model: the model; not changed.
        calibration: batches; read once.
        memory: bytes of activations to hold.

    Returns:
        Running statistics by their paths.
    """
    stream = Stream(model, calibration, memory)
    norms: Statistics = {}
    for norm in batch_norms(model.gm):
        _renorm(stream, norm, norms, changed_only=False)
    return norms


def _renorm(stream: Stream, norm: BatchNorm, norms: Statistics, changed_only: bool = True, match: bool = False) -> None:
    statistics = stream.channel_statistics(norm, changed_only, match)
    if statistics is not None:
        norms |= statistics
        stream.renorm(norm, statistics)
