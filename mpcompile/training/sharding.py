"""A student whose weights, gradients and optimiser state are spread over the ranks (FSDP2)."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from mpcompile.training import policies as masks


def shard(student: nn.Module) -> nn.Module:
    """Spread parameters over all ranks, layer by layer."""
    from torch.distributed.fsdp import fully_shard

    for module in list(student.modules()):
        if isinstance(module, (masks.MaskedLinear, masks.MaskedConv2d)):
            fully_shard(module)
    fully_shard(student)
    return student


def local(tensor: Tensor) -> Tensor:
    """This rank's part of a tensor, which is all of one that isn't spread."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def whole(tensor: Tensor) -> Tensor:
    """All of a tensor that may be spread."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def whole_weights(student: nn.Module) -> dict[str, Any]:
    """The state dict of a spread student, whole on every rank."""
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

    return dict(get_model_state_dict(student, options=StateDictOptions(full_state_dict=True)))


def states(student: nn.Module, optimizer: Any) -> tuple[Any, Any]:
    """State dicts of student and optimiser, whole on the first rank."""
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict

    return get_state_dict(student, optimizer, options=StateDictOptions(full_state_dict=True, cpu_offload=True))


def load_states(student: nn.Module, optimizer: Any, weights: Any, moments: Any) -> None:
    """Inverse of :func:`states`."""
    from torch.distributed.checkpoint.state_dict import StateDictOptions, set_state_dict

    whole = StateDictOptions(full_state_dict=True)
    set_state_dict(student, optimizer, model_state_dict=weights, optim_state_dict=moments, options=whole)
