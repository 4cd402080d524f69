"""Masks during training: frozen, or moving as in the methods that frozen masks are compared with."""

from __future__ import annotations

import hashlib
import types
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from mpcompile._moved import renamed
from mpcompile.data import ranks
from mpcompile.errors import InputError
from mpcompile.ir.view import stored_layers
from mpcompile.kernels import ops
from mpcompile.kernels.nm_format import Pattern
from mpcompile.layers import MaskedConv2d, MaskedLinear
from mpcompile.pruning.scores import magnitude_mask

__getattr__ = renamed(__name__, {"digest": "training.policies.masks_digest"})
_FADED = 0.5  # share of the steps after which removed weights no longer contribute in "gradual"


def masked_weights(student: nn.Module) -> dict[str, tuple[Tensor, Tensor, Pattern]]:
    """Return the weight, the boolean mask and the pattern of every masked layer, by name."""
    masks: dict[str, tuple[Tensor, Tensor, Pattern]] = {}
    for name, module in student.named_modules():
        if isinstance(module, (MaskedLinear, MaskedConv2d)):
            masks[name] = (module.weight, module.mask, module.pattern)
    if isinstance(student, fx.GraphModule):  # layers that are function calls in the graph
        for layer in stored_layers(student):
            if layer.pattern is not None and layer.mask is not None:
                masks.setdefault(layer.name, (layer.weight.tensor, layer.mask.tensor, layer.pattern))
    return masks


@torch.no_grad()
def apply_masks(student: nn.Module) -> int:
    """Set every masked weight to exactly zero in storage, and return the number of masked layers."""
    weights = masked_weights(student)
    for weight, mask, _ in weights.values():
        weight.mul_(_distributed_like(mask, weight))
    return len(weights)


def _distributed_like(mask: Tensor, weight: Tensor) -> Tensor:
    """Return the mask, distributed over devices like its weight."""
    from torch.distributed.tensor import DTensor, distribute_tensor

    if isinstance(weight, DTensor) and not isinstance(mask, DTensor):
        return distribute_tensor(mask, weight.device_mesh, weight.placements, src_data_rank=None)
    return mask


def masks_digest(student: nn.Module) -> str:
    """Return a SHA-256 fingerprint of all masks: equal on two machines if and only if the masks are."""
    sha = hashlib.sha256()
    for name, (_, mask, pattern) in sorted(masked_weights(student).items()):
        sha.update(f"{name} {pattern} {tuple(mask.shape)}".encode())
        sha.update(mask.cpu().numpy().tobytes())
    return sha.hexdigest()


def check_masks(student: nn.Module) -> None:
    """Check that the masks are identical on all ranks.

    Raises:
        InputError: they are not. Every rank raises; the message names the ranks that differ.
    """
    digests = [value[:12] for value in ranks.gather(masks_digest(student))]
    if len(set(digests)) > 1:
        raise InputError(
            "the masks differ between processes",
            expected="identical masks on every rank",
            found=ranks.differing(digests),
            hint="transform on one rank and send the student to the others (mpcompile distill does)",
        )


class Frozen:
    """Masks stay as they are; removed weights are set to zero after every step."""

    def __init__(self, student: nn.Module) -> None:
        self.student = student

    def before_step(self, progress: float) -> None:
        """Prepare the forward passes of a step; ``progress`` is the share of all steps done, 0 to 1."""

    def after_step(self) -> None:
        """Restore the masks after the optimiser's step."""
        apply_masks(self.student)

    def finish(self, model: nn.Module) -> None:
        """Turn the student, or a copy of it, into the result: masked weights become zero."""
        apply_masks(model)

    def leave(self) -> None:
        """Remove the policy from the student when the run has ended or failed."""


class _StraightThrough(torch.autograd.Function):
    """Forward w * m; backward, the unchanged gradient plus decay * w for removed weights."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, mask: Tensor, decay: float) -> Tensor:
        ctx.save_for_backward(weight, mask)
        ctx.decay = decay
        return weight * mask

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        weight, mask = ctx.saved_tensors
        return gradients[0] + ctx.decay * weight * ~mask, None, None


def _masked_layers(student: nn.Module) -> list[MaskedLinear | MaskedConv2d]:
    return [module for module in student.modules() if isinstance(module, (MaskedLinear, MaskedConv2d))]


@torch.no_grad()
def _update_masks(student: nn.Module) -> None:
    """Set the masks so that they keep the largest weights."""
    for layer in _masked_layers(student):
        layer.mask.copy_(magnitude_mask(layer.weight, layer.pattern))


def _retarget(gm: fx.GraphModule, before: Any, after: Any) -> None:
    """Let calls of one function in a graph call another: parts of a layer that is split by rows call no module."""
    calls = [node for node in gm.graph.nodes if node.op == "call_function" and node.target is before]
    for node in calls:
        node.target = after
    if calls:
        gm.recompile()


class Moving(Frozen):
    """Masks follow the magnitude of dense weights; subclasses define how removed weights still contribute.

    Args:
        student: the module whose masks move.
        copies: other graphs that run on the student's layers.
    """

    def __init__(self, student: nn.Module, copies: Sequence[fx.GraphModule] = ()) -> None:
        super().__init__(student)
        own = _masked_layers(student)
        if len(own) != len(masked_weights(student)):
            raise InputError(
                "moving masks need masked layers that are modules",
                expected="a student that mpcompile.transform made from a module",
                found="masked layers that are function calls in the graph",
                hint="use method='frozen'",
            )
        for layer in own:
            layer.forward = types.MethodType(self._forward, layer)  # type: ignore[method-assign]

        def rows_linear(x: Tensor, weight: Tensor, mask: Tensor, bias: Tensor | None, n: int, m: int) -> Tensor:
            return F.linear(x, self.weight(weight, mask), bias)

        self._rows_linear = rows_linear
        for graph in (student, *copies):
            if isinstance(graph, fx.GraphModule):
                _retarget(graph, ops.masked_linear, rows_linear)

    def weight(self, weight: Tensor, mask: Tensor) -> Tensor:
        """Return what a layer multiplies by in place of its weight, or of some rows of it."""
        raise NotImplementedError

    def _forward(self, layer: MaskedLinear | MaskedConv2d, x: Tensor) -> Tensor:
        weight = self.weight(layer.weight, layer.mask)
        if isinstance(layer, MaskedLinear):
            return F.linear(x, weight, layer.bias)
        return F.conv2d(x, weight, layer.bias, layer.stride, layer.padding, layer.dilation, layer.groups)

    def before_step(self, progress: float) -> None:
        _update_masks(self.student)

    def after_step(self) -> None:
        pass

    def finish(self, model: nn.Module) -> None:
        _update_masks(model)
        self._settle(model)

    def leave(self) -> None:
        self._settle(self.student)

    def _settle(self, model: nn.Module) -> None:
        for layer in _masked_layers(model):
            vars(layer).pop("forward", None)
        if isinstance(model, fx.GraphModule):
            _retarget(model, self._rows_linear, ops.masked_linear)
        apply_masks(model)


class SrSte(Moving):
    """Sparse-refined straight-through estimator. Source: Zhou et al. 2021, arXiv 2102.04010."""

    def __init__(self, student: nn.Module, decay: float, copies: Sequence[fx.GraphModule] = ()) -> None:
        super().__init__(student, copies)
        self.decay = decay

    def weight(self, weight: Tensor, mask: Tensor) -> Tensor:
        result: Tensor = _StraightThrough.apply(weight, mask, self.decay)
        return result


class Gradual(Moving):
    """Removed weights fade out over the first half of training. Source: Kao et al. 2022."""

    def __init__(self, student: nn.Module, copies: Sequence[fx.GraphModule] = ()) -> None:
        super().__init__(student, copies)
        self.factor = 1.0

    def before_step(self, progress: float) -> None:
        self.factor = max(0.0, 1 - progress / _FADED)
        if self.factor:
            _update_masks(self.student)

    def weight(self, weight: Tensor, mask: Tensor) -> Tensor:
        return weight * torch.where(mask, 1.0, self.factor)

    def finish(self, model: nn.Module) -> None:
        self._settle(model)


def policy(method: str, student: nn.Module, sr_ste_decay: float, copies: Sequence[fx.GraphModule] = ()) -> Frozen:
    """Return the policy for a method, one of :data:`mpcompile.training.options.METHODS`.

    Args:
        copies: other graphs that run on the student's layers.
    """
    if method == "sr-ste":
        return SrSte(student, sr_ste_decay, copies)
    return Gradual(student, copies) if method == "gradual" else Frozen(student)
