"""Sensitivity: how strongly a model's output reacts to each layer's output, and the divergence between two models."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from mpcompile.capture.signature import call_graph
from mpcompile.errors import InputError, first_line
from mpcompile.ir.effects import own_copies
from mpcompile.ir.module import Imported
from mpcompile.ir.numerics import exact, training_flags
from mpcompile.ir.view import LayerOp
from mpcompile.layers import fixed_batch

Batch = list[Any]  # the inputs of the graph, one per placeholder


def outputs(value: Any) -> list[Tensor]:
    """Return the floating-point tensors that a graph returns, in order."""
    if isinstance(value, Tensor):
        return [value] if value.is_floating_point() else []
    values = value.values() if isinstance(value, Mapping) else value if isinstance(value, (tuple, list)) else ()
    return [tensor for v in values for tensor in outputs(v)]


def is_logits(tensors: list[Tensor]) -> bool:
    """Return True if the outputs look like one score per class: a single tensor (batch, classes)."""
    return len(tensors) == 1 and tensors[0].dim() == 2 and tensors[0].shape[1] > 1


def samples(batch: Batch, model: Imported, size: int) -> Iterator[Batch]:
    """Yield a batch in parts of at most ``size`` samples; whole if the graph was captured for one batch size."""
    data = [n.name not in model.lifted.tensors for n in model.gm.graph.nodes if n.op == "placeholder"]
    tensors = [v for v, own in zip(batch, data, strict=True) if own and isinstance(v, Tensor) and v.dim()]
    count = len(tensors[0]) if tensors else 1
    if (
        count <= size
        or model.lifted.tensors
        or fixed_batch(model.gm) is not None
        or any(len(v) != count for v in tensors)
    ):
        yield batch
        return
    for start in range(0, count, size):
        part = slice(start, start + size)
        yield [v[part] if own and isinstance(v, Tensor) and v.dim() else v for v, own in zip(batch, data, strict=True)]


def batch_length(batch: Batch, model: Imported) -> int:
    """Return the number of samples in a batch."""
    data = [n for n in model.gm.graph.nodes if n.op == "placeholder"]
    own = [v for v, n in zip(batch, data, strict=True) if n.name not in model.lifted.tensors and isinstance(v, Tensor)]
    return len(own[0]) if own and own[0].dim() else 1


def _direction(y: Tensor, logits: bool, generator: torch.Generator) -> Tensor:
    """Return a random v shaped like ``y``; E[v v'] is the curvature of the divergence, diag(p) - p p' for logits."""
    noise = torch.randn(y.shape, generator=generator).to(y)
    if not logits:
        scale = y.detach().double().flatten(1).square().sum(1).clamp(min=1e-30).sqrt().to(y)
        return noise / scale.reshape(-1, *[1] * (y.dim() - 1))
    p = y.detach().softmax(-1)
    return p.sqrt() * noise - p * (p.sqrt() * noise).sum(-1, keepdim=True)


class _Probed(fx.Interpreter):
    """Run the graph with zeros added to the output of every layer: their gradient is the gradient of that output."""

    def __init__(self, gm: fx.GraphModule, at: Mapping[fx.Node, str]) -> None:
        super().__init__(gm)
        self.at = at
        self.probes: list[tuple[str, Tensor]] = []

    def run_node(self, n: fx.Node) -> Any:
        result = super().run_node(n)
        if n in self.at:
            probe = torch.zeros_like(result, requires_grad=True)
            self.probes.append((self.at[n], probe))
            result = result + probe
        return result


@exact()
def output_energy(
    model: Imported, uses: Mapping[str, list[LayerOp]], values: Iterable[Batch], seed: int = 0, size: int = 8
) -> dict[str, Tensor]:
    """Return G_i = E[Σ_t g_ti²] of every output channel i of each layer, from backward passes.

    The values are float64, (out,). Each part of at most ``size`` samples takes one backward pass.

    g is the gradient of v'z with respect to the layer's output at token or pixel t. z is the model's output. v is
    random, and E[v v'] is the curvature of the divergence at z. For logits the divergence is KL(p‖q), with curvature
    diag(p) - p p', so that E[g g'] is the Fisher information; for other outputs it is the relative squared error. A
    change δ of the layer's output, independent between tokens and between channels, then costs ½ Σ_i G_i E[δ_i²], in
    nats per sample for logits.

    Args:
        uses: layer name -> its uses in the graph.
        values: inputs of the graph, batch by batch.
        seed: seeds v.
        size: number of samples whose activations are held at a time.

    Raises:
        InputError: the model rejects a batch, returns no floating-point tensor, or its gradients are not finite.
    """
    at = {use.node: name for name, nodes in uses.items() for use in nodes}
    axis = {name: -1 if nodes[0].geometry is None else 1 for name, nodes in uses.items()}
    total: dict[str, Tensor] = {}
    count = 0
    generator = torch.Generator().manual_seed(seed)
    with training_flags(model.gm, False), torch.enable_grad():
        for batch in values:
            for part in samples(batch, model, size):
                runner = _Probed(model.gm, at)
                try:
                    results = outputs(runner.run(*own_copies(model.gm, part)))
                    if not results:
                        raise InputError(
                            "the model returns no floating-point tensor, so sensitivities cannot be computed"
                        )
                    logits = is_logits(results)
                    loss = torch.stack([(y * _direction(y, logits, generator)).sum() for y in results]).sum()
                    grads = torch.autograd.grad(loss, [p for _, p in runner.probes], allow_unused=True)
                except RuntimeError as error:
                    raise InputError(f"a backward pass through the model failed: {first_line(error)}") from error
                count += batch_length(part, model)
                for (name, probe), grad in zip(runner.probes, grads, strict=True):
                    g = torch.zeros_like(probe) if grad is None else grad
                    energy = g.double().square().movedim(axis[name], 0).flatten(1).sum(1)
                    total[name] = total[name] + energy if name in total else energy
    for name, energy in total.items():
        if not bool(torch.isfinite(energy).all()):
            raise InputError("gradients are not finite", layer=name, hint="calibrate in fp32")
    return {name: energy / max(1, count) for name, energy in total.items()}


@exact()
@torch.no_grad()
def divergence(
    dense: fx.GraphModule, pruned: fx.GraphModule, values: Sequence[Batch], pruned_values: Sequence[Batch] | None = None
) -> float:
    """Return a mean over samples: of KL(dense‖pruned) in nats for logits, of the relative squared error otherwise.

    Args:
        values: inputs of the graphs, batch by batch.
        pruned_values: inputs of the pruned graph, if they differ because its parameters are among them.
    """
    total, count = 0.0, 0
    with training_flags(dense, False), training_flags(pruned, False):
        for batch, other in zip(values, values if pruned_values is None else pruned_values, strict=True):
            wanted = outputs(call_graph(dense, own_copies(dense, batch)))
            actual = outputs(call_graph(pruned, own_copies(pruned, other)))
            count += len(wanted[0])
            total += float(divergences(wanted, actual, is_logits(wanted)).sum())
    return total / max(1, count)


def divergences(wanted: Sequence[Tensor], actual: Sequence[Tensor], logits: bool) -> Tensor:
    """Return KL(wanted‖actual) in nats for logits, or the relative squared error summed over outputs, of every sample.

    Args:
        wanted, actual: outputs, each with the samples on axis 0.
        logits: True if they are a single table of class scores.

    Returns:
        (samples,) in float64.

    Example:
        >>> divergences([torch.tensor([[3.0, 4.0]])], [torch.tensor([[3.0, 3.0]])], logits=False)
        tensor([0.0400], dtype=torch.float64)
    """
    if logits:
        p, q = (y[0].double().log_softmax(-1) for y in (wanted, actual))
        return (p.exp() * (p - q)).sum(-1)
    pairs = [(a.double().flatten(1), b.double().flatten(1)) for a, b in zip(wanted, actual, strict=True)]
    return torch.stack([(a - b).square().sum(1) / a.square().sum(1).clamp(min=1e-30) for a, b in pairs]).sum(0)
