"""Masked layers: trainable replacements of linear and convolution layers, whose weights keep their names."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from mpcompile.kernels import ops
from mpcompile.kernels.nm_format import Pattern


class _Masked(nn.Module):
    """A weight, its N:M mask (a buffer, so that it is part of the state dict), and the pattern.

    Every forward pass computes ``weight * mask``: gradients of masked weights are exactly zero, and a state dict of
    the dense model loads without unmasking anything: if it holds no ``mask``, the layer keeps its own.
    """

    weight: Tensor
    bias: Tensor | None
    mask: Tensor

    def __init__(self, weight: Tensor, bias: Tensor | None, mask: Tensor, pattern: Pattern) -> None:
        super().__init__()
        self.weight = weight if isinstance(weight, nn.Parameter) else nn.Parameter(weight)
        if bias is None:
            self.register_parameter("bias", None)
        else:
            self.bias = bias if isinstance(bias, nn.Parameter) else nn.Parameter(bias)
        self.register_buffer("mask", mask)
        self.n, self.m = pattern

    @property
    def pattern(self) -> Pattern:
        return Pattern(self.n, self.m)

    @torch.no_grad()
    def apply_mask(self) -> None:
        """Set masked weights to exactly zero in storage."""
        self.weight.masked_fill_(~self.mask, 0)

    def _load_from_state_dict(self, state_dict: Mapping[str, Any], prefix: str, *args: Any, **kwargs: Any) -> None:
        if prefix + "mask" not in state_dict:
            state_dict = {**state_dict, prefix + "mask": self.mask}
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)


class MaskedLinear(_Masked):
    """``nn.Linear`` with an N:M mask: weight (out, in), mask boolean of the same shape.

    Example:
        >>> mask = torch.tensor([[True, True, False, False]])
        >>> MaskedLinear(torch.ones(1, 4), None, mask, Pattern(2, 4))(torch.ones(1, 4)).item()
        2.0
    """

    @classmethod
    def from_linear(cls, linear: nn.Linear, mask: Tensor, pattern: Pattern) -> MaskedLinear:
        layer = cls(linear.weight, linear.bias, mask, pattern)
        return layer.train(linear.training)

    def forward(self, x: Tensor) -> Tensor:
        return ops.masked_linear(x, self.weight, self.mask, self.bias, self.n, self.m)

    def extra_repr(self) -> str:
        out, features = self.weight.shape
        return f"{features}, {out}, bias={self.bias is not None}, pattern={self.pattern}"


class MaskedConv2d(_Masked):
    """``nn.Conv2d`` (zero padding) with an N:M mask along the input channels of each tap.

    weight is (out, in / groups, kh, kw), mask boolean of the same shape.
    """

    def __init__(
        self,
        weight: Tensor,
        bias: Tensor | None,
        mask: Tensor,
        pattern: Pattern,
        stride: list[int],
        padding: list[int],
        dilation: list[int],
        groups: int,
    ) -> None:
        super().__init__(weight, bias, mask, pattern)
        self.stride, self.padding, self.dilation, self.groups = stride, padding, dilation, groups

    @classmethod
    def from_conv(cls, conv: nn.Conv2d, mask: Tensor, pattern: Pattern) -> MaskedConv2d:
        """Return the masked form of a convolution whose padding is zeros and given as numbers, not by name."""
        stride, padding, dilation = (list(map(int, axes)) for axes in (conv.stride, conv.padding, conv.dilation))
        layer = cls(conv.weight, conv.bias, mask, pattern, stride, padding, dilation, conv.groups)
        return layer.train(conv.training)

    def forward(self, x: Tensor) -> Tensor:
        geometry = (self.stride, self.padding, self.dilation, self.groups)
        return ops.masked_conv2d(x, self.weight, self.mask, self.bias, *geometry, self.n, self.m)

    def extra_repr(self) -> str:
        out, cin, kh, kw = self.weight.shape
        return f"{cin * self.groups}, {out}, kernel_size={(kh, kw)}, stride={self.stride}, pattern={self.pattern}"


class ByMode(nn.Module):
    """A number that depends on the training flag, such as the ``dropout_p`` of fused attention.

    A model is traced in both modes; where the traces differ in a constant, a call of this module replaces it.
    """

    def __init__(self, training: float, evaluation: float) -> None:
        super().__init__()
        self.when_training, self.when_evaluating = training, evaluation

    def forward(self) -> float:
        return self.when_training if self.training else self.when_evaluating

    def extra_repr(self) -> str:
        return f"training={self.when_training}, evaluation={self.when_evaluating}"
