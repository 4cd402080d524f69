"""A student whose weights, gradients and optimiser state are sharded over the ranks (FSDP2)."""

from __future__ import annotations

from typing import Any

from torch import Tensor, fx, nn
from torch.distributed.tensor import DTensor

from mpcompile.layers import MaskedConv2d, MaskedLinear


def shard(student: nn.Module) -> nn.Module:
    """Shard parameters over all ranks, layer by layer, and return the student.

    The weights of a layer that is split by rows are gathered with those of the whole student: nothing calls its module.
    """
    from torch.distributed.fsdp import fully_shard

    calls = (
        [node for node in student.graph.nodes if node.op == "call_module"]
        if isinstance(student, fx.GraphModule)
        else []
    )
    called = {id(student.get_submodule(str(node.target))) for node in calls}
    for module in list(student.modules()):
        if isinstance(module, (MaskedLinear, MaskedConv2d)) and (id(module) in called or not calls):
            fully_shard(module)
    fully_shard(student)
    return student


def local(tensor: Tensor) -> Tensor:
    """Return this rank's part of a tensor: all of it if it is not sharded."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def whole(tensor: Tensor) -> Tensor:
    """Return the whole of a tensor that may be sharded."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def whole_weights(student: nn.Module) -> dict[str, Any]:
    """Return the state dict of a sharded student, whole on every rank."""
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

    return dict(get_model_state_dict(student, options=StateDictOptions(full_state_dict=True)))


def states(student: nn.Module, optimizer: Any) -> tuple[Any, Any]:
    """Return the state dicts of student and optimiser, whole on the first rank."""
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict

    return get_state_dict(student, optimizer, options=StateDictOptions(full_state_dict=True, cpu_offload=True))


def load_states(student: nn.Module, optimizer: Any, weights: Any, moments: Any) -> None:
    """Load state dicts that :func:`states` returned."""
    from torch.distributed.checkpoint.state_dict import StateDictOptions, set_state_dict

    whole = StateDictOptions(full_state_dict=True)
    set_state_dict(student, optimizer, model_state_dict=weights, optim_state_dict=moments, options=whole)
