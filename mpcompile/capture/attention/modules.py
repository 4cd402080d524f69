"""Modules of torch.nn that hold attention, rewritten as calls of their parts: the forms of their ``forward``.

torch.nn also has fused kernels for some of these modules, and nested tensors, which it uses without gradients. They
compute the same, except that nested tensors set the results of hidden tokens to zero.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx.proxy import GraphAppendingTracer, Proxy
from torch.nn.utils import parametrize

from mpcompile.capture.attention.functional import Attention, Mask, Masks, attend
from mpcompile.capture.copies import HOOK_TABLES
from mpcompile.ir.module import IRModule
from mpcompile.ir.nodes import fake_value
from mpcompile.ir.parts import attribute
from mpcompile.layers import ByMode

_METHODS: dict[type[nn.Module], tuple[str, ...]] = {  # class -> the methods that its rewritten form follows
    nn.MultiheadAttention: ("forward",),
    nn.TransformerEncoderLayer: ("forward", "_sa_block", "_ff_block"),
    nn.TransformerDecoderLayer: ("forward", "_sa_block", "_mha_block", "_ff_block"),
    nn.TransformerEncoder: ("forward",),
    nn.TransformerDecoder: ("forward",),
    nn.Transformer: ("forward",),
}


class Unsupported(Exception):
    """A form of attention that has no functional form here; the message says why."""


def _base(module: nn.Module) -> type[nn.Module] | None:
    return next((cls for cls in _METHODS if isinstance(module, cls)), None)


def is_attention(module: nn.Module) -> bool:
    """Return True for an attention or transformer module of torch.nn, or a subclass with the same forward.

    Example:
        >>> is_attention(torch.nn.MultiheadAttention(8, 2)), is_attention(torch.nn.Linear(8, 8))
        (True, False)
    """
    base = _base(module)
    return base is not None and type(module).forward is base.forward


def obstacle(module: nn.Module) -> str | None:
    """Return why a module of :func:`is_attention` has to stay a single call, or None if it can be rewritten."""
    base = _base(module)
    if base is None or any(getattr(type(module), name) is not getattr(base, name) for name in _METHODS[base]):
        return "it has methods of its own"
    if "forward" in vars(module):
        return "its forward was replaced"
    if any(getattr(module, table) for table in HOOK_TABLES):
        return "it has hooks"
    if base is not nn.MultiheadAttention:
        return None
    for part in (module, module.out_proj):
        if parametrize.is_parametrized(part):  # type: ignore[arg-type]
            return "its weights are parametrized"
        if any(getattr(part, table) for table in HOOK_TABLES):
            return "its output projection has hooks"
    if type(module.out_proj).forward is not nn.Linear.forward or "weight" not in module.out_proj._parameters:  # type: ignore[union-attr]
        return "its output projection is not a plain linear layer"
    return None


def bound(function: Callable[..., Any], args: Any, kwargs: Any) -> dict[str, Any]:
    """Return the arguments of a call by name, defaults included."""
    given = inspect.signature(function).bind(*args, **kwargs)
    given.apply_defaults()
    return given.arguments


def flag(value: Any) -> bool:
    """Return an option of a call.

    Raises:
        Unsupported: the graph computes it.
    """
    if not isinstance(value, (bool, int, type(None))):
        raise Unsupported("an option of it is computed")
    return bool(value)


class Expander:
    """Rewrites calls of one graph, at its insertion point.

    Attributes:
        masks: the masks made so far.
        left: paths of modules that stay single calls -> why.
        expanded: paths of modules that were rewritten.
        notes: what a user should know.
        wants_weights: True if something reads the attention weights that the call returns.
    """

    def __init__(self, gm: IRModule) -> None:
        self.gm = gm
        self.tracer = GraphAppendingTracer(gm.graph)
        self.masks = Masks()
        self.left: dict[str, str] = {}
        self.expanded: set[str] = set()
        self.notes: list[str] = []
        self.wants_weights = True
        self._rank = 3  # of the present call's input
        self._pending: list[tuple[str, nn.Module | None]] = []  # what the present call has done, to undo it

    def enter(self, inputs: Sequence[fx.Node]) -> None:
        """Start to rewrite a call with these inputs."""
        self._rank = self.fake(Proxy(inputs[0], self.tracer)).dim()

    def done(self) -> None:
        """Keep what the present call has done."""
        self.expanded |= {path for path, owner in self._pending if owner is None}
        self._pending = []

    def undo(self) -> None:
        """Remove the layers that the present call has added."""
        for name, owner in self._pending:
            if owner is not None:
                delattr(owner, name)
        self._pending = []

    # --- Values ---

    def proxy(self, value: Any) -> Any:
        """Return a value of the graph with its nodes as proxies."""
        wrap: Any = lambda v: Proxy(v, self.tracer) if isinstance(v, fx.Node) else v  # noqa: E731
        return fx.node.map_aggregate(value, wrap)

    def read(self, path: str) -> Proxy | None:
        """Return the parameter at a path, or None if there is none."""
        if not isinstance(attribute(self.gm, path), Tensor):
            return None
        return Proxy(self.gm.graph.get_attr(path), self.tracer)

    def fake(self, value: Proxy) -> Tensor:
        """Return the fake tensor of a value that was in the graph before."""
        fake = fake_value(value.node)
        if not isinstance(fake, Tensor):
            raise Unsupported(f"the shape of {value.node.name} is not known")
        return fake

    def mask(self, value: Any) -> Mask | None:
        """Return a mask argument with what has to be known about it."""
        if value is None:
            return None
        fake = self.fake(value)
        return Mask(value, fake.dim(), fake.dtype is torch.bool)

    def weights(self, needed: Any, average: Any) -> str | None:
        """Return how attention weights are returned; None if they are not, or if nothing reads them."""
        if not flag(needed) or not self.wants_weights:
            return None
        return "mean" if flag(average) else "heads"

    # --- Calls ---

    def call(self, path: str, *args: Any, **kwargs: Any) -> Any:
        """Call the module at a path: in its functional form where it has one."""
        module = self.gm.get_submodule(path)
        if is_attention(module):
            why = obstacle(module)
            if why is None:
                self._pending.append((path, None))
                base: Any = _base(module)
                return _FORMS[base](self, path, module, **_arguments(base, args, kwargs))
            self.left[path] = why
        nodes: Any = fx.node.map_aggregate((args, kwargs), lambda v: v.node if isinstance(v, Proxy) else v)
        node = self.gm.graph.call_module(path, *nodes)
        return Proxy(node, self.tracer)

    def by_mode(self, path: str, rate: float) -> Any:
        """Return a rate that is zero in eval mode: a number, or the result of a layer that follows the mode."""
        if rate == 0:
            return 0.0
        name = f"{path}.dropout_p"
        owner = self.gm.get_submodule(path)
        if "dropout_p" not in owner._modules:
            owner.add_module("dropout_p", ByMode(rate, 0.0).train(owner.training))
            self._pending.append(("dropout_p", owner))
        return Proxy(self.gm.graph.call_module(name), self.tracer)

    def attend(self, inputs: list[Proxy], a: Attention, batch_first: bool, **options: Any) -> tuple[Any, Any]:
        """Attend, with or without a batch axis."""
        if self._rank not in (2, 3):
            raise Unsupported(f"its input has {self._rank} axes")
        if self._rank == 3:
            return attend(inputs, a, self.masks, batch_first=batch_first, **options)
        alone = {x.node: x.unsqueeze(0) for x in inputs}
        found, weights = attend([alone[x.node] for x in inputs], a, self.masks, batch_first=True, **options)
        return found.squeeze(0), None if weights is None else weights.squeeze(0)


def _arguments(base: type[nn.Module], args: Any, kwargs: Any) -> dict[str, Any]:
    """Return the arguments of a call of a module's forward, by name."""
    arguments = bound(base.forward, (None, *args), kwargs)
    return {key: value for key, value in arguments.items() if key != "self"}


def _attention(
    expand: Expander,
    path: str,
    module: Any,
    query: Proxy,
    key: Proxy,
    value: Proxy,
    key_padding_mask: Any,
    need_weights: Any,
    attn_mask: Any,
    average_attn_weights: Any,
    is_causal: Any,
) -> tuple[Any, Any]:
    """``nn.MultiheadAttention.forward``."""
    weights = expand.weights(need_weights, average_attn_weights)
    over_keys, plain = expand.mask(key_padding_mask), expand.mask(attn_mask)
    causal = flag(is_causal) and over_keys is None and weights is None
    packed = expand.read(f"{path}.in_proj_weight")
    separate: Any = None if packed is not None else tuple(expand.read(f"{path}.{part}_proj_weight") for part in "qkv")
    extra: Any = (expand.read(f"{path}.bias_k"), expand.read(f"{path}.bias_v"))
    out: Any = expand.read(f"{path}.out_proj.weight")
    attention = Attention(
        embed=module.embed_dim,
        heads=module.num_heads,
        packed=packed,
        separate=separate,
        in_bias=expand.read(f"{path}.in_proj_bias"),
        out_weight=out,
        out_bias=expand.read(f"{path}.out_proj.bias"),
        extra=None if extra[0] is None else extra,
        add_zero=module.add_zero_attn,
        dropout=expand.by_mode(path, module.dropout),
        dtype=module.out_proj.weight.dtype,
    )
    return expand.attend(
        [query, key, value],
        attention,
        module.batch_first,
        over_keys=over_keys,
        plain=None if causal else plain,
        causal=causal,
        weights=weights,
    )


def _activated(expand: Expander, path: str, module: Any, x: Proxy) -> Any:
    """Call the activation of a transformer layer: a module, or a function."""
    if isinstance(module.activation, nn.Module):
        return expand.call(f"{path}.activation", x)
    try:
        return module.activation(x)
    except Exception as error:
        raise Unsupported(f"its activation cannot be traced: {error}") from error


def _feed_forward(expand: Expander, path: str, module: Any, x: Proxy, dropout: str) -> Any:
    hidden = _activated(expand, path, module, expand.call(f"{path}.linear1", x))
    return expand.call(f"{path}.{dropout}", expand.call(f"{path}.linear2", expand.call(f"{path}.dropout", hidden)))


def _residuals(expand: Expander, path: str, module: Any, x: Proxy, branches: list[Callable[[Any], Any]]) -> Any:
    """Add each branch to the stream, with a norm before it or after the sum."""
    for number, branch in enumerate(branches, 1):
        norm = f"{path}.norm{number}"
        if module.norm_first:
            x = x + branch(expand.call(norm, x))
        else:
            x = expand.call(norm, x + branch(x))
    return x


def _attended(
    expand: Expander, path: str, number: int, memory: Any, mask: Any, over_keys: Any, causal: Any
) -> Callable[[Any], Any]:
    """Return the branch of a layer with attention and the ``number``-th dropout; to itself where ``memory`` is None."""
    layer = "self_attn" if memory is None else "multihead_attn"

    def branch(x: Any) -> Any:
        keys = x if memory is None else memory
        options = {"attn_mask": mask, "key_padding_mask": over_keys, "is_causal": causal, "need_weights": False}
        return expand.call(f"{path}.dropout{number}", expand.call(f"{path}.{layer}", x, keys, keys, **options)[0])

    return branch


def _encoder_layer(
    expand: Expander, path: str, module: Any, src: Proxy, src_mask: Any, src_key_padding_mask: Any, is_causal: Any
) -> Any:
    """``nn.TransformerEncoderLayer.forward``."""

    attended = _attended(expand, path, 1, None, src_mask, src_key_padding_mask, is_causal)
    return _residuals(
        expand, path, module, src, [attended, lambda x: _feed_forward(expand, path, module, x, "dropout2")]
    )


def _decoder_layer(
    expand: Expander,
    path: str,
    module: Any,
    tgt: Proxy,
    memory: Proxy,
    tgt_mask: Any,
    memory_mask: Any,
    tgt_key_padding_mask: Any,
    memory_key_padding_mask: Any,
    tgt_is_causal: Any,
    memory_is_causal: Any,
) -> Any:
    """``nn.TransformerDecoderLayer.forward``."""

    attended = _attended(expand, path, 1, None, tgt_mask, tgt_key_padding_mask, tgt_is_causal)
    looked_up = _attended(expand, path, 2, memory, memory_mask, memory_key_padding_mask, memory_is_causal)
    last = lambda x: _feed_forward(expand, path, module, x, "dropout3")  # noqa: E731
    return _residuals(expand, path, module, tgt, [attended, looked_up, last])


def _stack(expand: Expander, path: str, module: Any, x: Any, *args: Any, **kwargs: Any) -> Any:
    """Call the layers of an encoder or decoder, and its last norm."""
    for number in range(len(module.layers)):
        x = expand.call(f"{path}.layers.{number}", x, *args, **kwargs)
    return x if module.norm is None else expand.call(f"{path}.norm", x)


def _encoder(
    expand: Expander, path: str, module: Any, src: Proxy, mask: Any, src_key_padding_mask: Any, is_causal: Any
) -> Any:
    """``nn.TransformerEncoder.forward``, without nested tensors. A mask is used as it is, causal or not."""
    if src_key_padding_mask is not None and getattr(module, "use_nested_tensor", False):
        expand.notes.append(
            f"{path} is computed without nested tensors: results of hidden tokens are not set to zero, "
            "as torch.nn does in eval mode without gradients"
        )
    causal = bool(is_causal) if isinstance(is_causal, (bool, type(None))) else is_causal
    options = {"src_mask": mask, "src_key_padding_mask": src_key_padding_mask, "is_causal": causal}
    return _stack(expand, path, module, src, **options)


def _decoder(expand: Expander, path: str, module: Any, tgt: Proxy, memory: Proxy, **options: Any) -> Any:
    """``nn.TransformerDecoder.forward``."""
    causal = options["tgt_is_causal"]
    options["tgt_is_causal"] = bool(causal) if isinstance(causal, (bool, type(None))) else causal
    return _stack(expand, path, module, tgt, memory, **options)


def _transformer(expand: Expander, path: str, module: Any, src: Proxy, tgt: Proxy, **options: Any) -> Any:
    """``nn.Transformer.forward``."""
    memory = expand.call(
        f"{path}.encoder",
        src,
        mask=options["src_mask"],
        src_key_padding_mask=options["src_key_padding_mask"],
        is_causal=options["src_is_causal"],
    )
    names = ("tgt_mask", "memory_mask", "tgt_key_padding_mask", "memory_key_padding_mask")
    rest = {name: options[name] for name in (*names, "tgt_is_causal", "memory_is_causal")}
    return expand.call(f"{path}.decoder", tgt, memory, **rest)


_FORMS: dict[type[nn.Module], Callable[..., Any]] = {
    nn.MultiheadAttention: _attention,
    nn.TransformerEncoderLayer: _encoder_layer,
    nn.TransformerDecoderLayer: _decoder_layer,
    nn.TransformerEncoder: _encoder,
    nn.TransformerDecoder: _decoder,
    nn.Transformer: _transformer,
}
