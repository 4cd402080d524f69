"""What happens to masks while the student trains: frozen, or moving as in the methods it is compared with."""

from __future__ import annotations

import hashlib
import types
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from mpcompile.errors import InputError
from mpcompile.ir.view import layers
from mpcompile.kernels.nm_format import Pattern
from mpcompile.layers import MaskedConv2d, MaskedLinear
from mpcompile.pruning.scores import magnitude_mask

_FADED = 0.5  # share of the steps after which nothing of what is removed is left in "gradual"


def masked_weights(student: nn.Module) -> dict[str, tuple[Tensor, Tensor, Pattern]]:
    """Layer name -> its weight, its boolean mask and its pattern."""
    found: dict[str, tuple[Tensor, Tensor, Pattern]] = {}
    for name, module in student.named_modules():
        if isinstance(module, (MaskedLinear, MaskedConv2d)):
            found[name] = (module.weight, module.mask, module.pattern)
    if isinstance(student, fx.GraphModule):  # layers that stand in the graph as functions
        for layer in layers(student):
            if layer.pattern is not None and layer.mask is not None:
                found.setdefault(layer.name, (layer.weight.tensor, layer.mask.tensor, layer.pattern))
    return found


@torch.no_grad()
def apply_masks(student: nn.Module) -> int:
    """Set every masked weight to exactly zero in storage; returns the number of masked layers."""
    weights = masked_weights(student)
    for weight, mask, _ in weights.values():
        weight.mul_(_like(mask, weight))
    return len(weights)


def _like(mask: Tensor, weight: Tensor) -> Tensor:
    """The mask, spread over devices as its weight is."""
    from torch.distributed.tensor import DTensor, distribute_tensor

    if isinstance(weight, DTensor) and not isinstance(mask, DTensor):
        return distribute_tensor(mask, weight.device_mesh, weight.placements, src_data_rank=None)
    return mask


def digest(student: nn.Module) -> str:
    """A fingerprint of all masks: equal on two machines exactly if the masks are."""
    sha = hashlib.sha256()
    for name, (_, mask, pattern) in sorted(masked_weights(student).items()):
        sha.update(f"{name} {pattern} {tuple(mask.shape)}".encode())
        sha.update(mask.cpu().numpy().tobytes())
    return sha.hexdigest()


class Frozen:
    """Masks stay; what they remove is set to zero after every step."""

    def __init__(self, student: nn.Module) -> None:
        self.student = student

    def before_step(self, progress: float) -> None:
        """Called before the forward passes of a step; ``progress`` is the share of the steps that is done."""

    def after_step(self) -> None:
        """Called after the optimiser's step."""
        apply_masks(self.student)

    def finish(self, model: nn.Module) -> None:
        """Make the student, or a copy of it, what the result would be now: what is masked is zero."""
        apply_masks(model)

    def leave(self) -> None:
        """Called when the run is over, however it ended: nothing of the policy stays with the student."""


class _Through(torch.autograd.Function):
    """w (m + f (1 - m)) forward; backward, the gradient as it is, plus decay * w where the mask removes."""

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
def _choose(student: nn.Module) -> None:
    """Masks that keep the largest weights."""
    for layer in _masked_layers(student):
        layer.mask.copy_(magnitude_mask(layer.weight, layer.pattern))


class Moving(Frozen):
    """Masks follow the magnitude of dense weights; subclasses say what removed weights still do."""

    def __init__(self, student: nn.Module) -> None:
        super().__init__(student)
        layers = _masked_layers(student)
        if len(layers) != len(masked_weights(student)):
            raise InputError(
                "moving masks need masked layers that are modules",
                expected="a student that mpcompile.transform made from a module",
                found="masked layers inside the graph",
                hint="use method='frozen'",
            )
        for layer in layers:
            layer.forward = types.MethodType(self._forward, layer)  # type: ignore[method-assign]

    def weight(self, layer: MaskedLinear | MaskedConv2d) -> Tensor:
        """What the layer multiplies with."""
        raise NotImplementedError

    def _forward(self, layer: MaskedLinear | MaskedConv2d, x: Tensor) -> Tensor:
        if isinstance(layer, MaskedLinear):
            return F.linear(x, self.weight(layer), layer.bias)
        geometry = (layer.stride, layer.padding, layer.dilation, layer.groups)
        return F.conv2d(x, self.weight(layer), layer.bias, *geometry)

    def before_step(self, progress: float) -> None:
        _choose(self.student)

    def after_step(self) -> None:
        pass

    def finish(self, model: nn.Module) -> None:
        _choose(model)
        self._settle(model)

    def leave(self) -> None:
        self._settle(self.student)

    def _settle(self, model: nn.Module) -> None:
        for layer in _masked_layers(model):
            vars(layer).pop("forward", None)
        apply_masks(model)


class SrSte(Moving):
    """Sparse-refined straight-through estimator. Source: Zhou et al. 2021, arXiv 2102.04010."""

    def __init__(self, student: nn.Module, decay: float) -> None:
        super().__init__(student)
        self.decay = decay

    def weight(self, layer: MaskedLinear | MaskedConv2d) -> Tensor:
        result: Tensor = _Through.apply(layer.weight, layer.mask, self.decay)
        return result


class Gradual(Moving):
    """Removed weights count less and less, and not at all in the second half. Source: Kao et al. 2022."""

    def __init__(self, student: nn.Module) -> None:
        super().__init__(student)
        self.factor = 1.0

    def before_step(self, progress: float) -> None:
        self.factor = max(0.0, 1 - progress / _FADED)
        if self.factor:
            _choose(self.student)

    def weight(self, layer: MaskedLinear | MaskedConv2d) -> Tensor:
        return layer.weight * torch.where(layer.mask, 1.0, self.factor)

    def finish(self, model: nn.Module) -> None:
        self._settle(model)


def policy(method: str, student: nn.Module, sr_ste_decay: float) -> Frozen:
    """The policy of a method's name."""
    if method == "sr-ste":
        return SrSte(student, sr_ste_decay)
    return Gradual(student) if method == "gradual" else Frozen(student)
