"""The arguments of every ``mpcompile::`` operator: names, order, types and defaults, written once.

Each operator has a dataclass whose fields are its arguments in order. The class gives the text that torch.library
registers (:meth:`Args.signature`) and the position of an argument; an instance holds the arguments of one call.
Code that builds a node passes an instance, unpacked; code that reads one binds it and reads fields by name.

Example:
    >>> NmGemmArgs.position("bias")
    3
    >>> TokenSizeArgs.signature()
    '(Tensor x, Tensor? mask=None) -> Tensor'
    >>> print(*TokenSizeArgs(x="x"))
    x None
    >>> TokenSizeArgs(x="x").shortest()
    ('x',)
"""

from __future__ import annotations

import dataclasses
import functools
import typing
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Protocol, TypeVar

# A tensor, or the graph node that yields it. The annotation is the type in torch's schema language.
Tensor = Annotated[Any, "Tensor"]
OptionalTensor = Annotated[Any, "Tensor?"]
Ints = Annotated[list[int], "int[]"]
_Args = TypeVar("_Args", bound="Args")
_TYPES = {int: "int", float: "float", bool: "bool", str: "str", float | None: "float?"}


class Node(Protocol):
    """A call of an operator in a graph, such as a ``torch.fx.Node``."""

    target: Any
    args: Any
    kwargs: Any


class Args:
    """The arguments of one call. Subclasses are dataclasses, one per operator.

    Attributes:
        operator: name of the operator, without its namespace.
        returns: type of its result, in torch's schema language.
    """

    operator: ClassVar[str]
    returns: ClassVar[str] = "Tensor"

    def __iter__(self) -> Iterator[Any]:
        """Iterate over the arguments, in the operator's order."""
        return (getattr(self, name) for name in self.names())

    def shortest(self) -> tuple[Any, ...]:
        """Return the arguments in order, without trailing ones that have their default."""
        args = list(self)
        for field in reversed(dataclasses.fields(self)):  # type: ignore[arg-type]
            if field.default is dataclasses.MISSING or args[-1] != field.default:
                break
            args.pop()
        return tuple(args)

    @classmethod
    @functools.cache  # one entry per class
    def names(cls) -> tuple[str, ...]:
        """Return the names of the arguments, in order."""
        return tuple(field.name for field in dataclasses.fields(cls))  # type: ignore[arg-type]

    @classmethod
    def position(cls, name: str) -> int:
        """Return the position of an argument.

        Raises:
            ValueError: the operator has no argument of that name.
        """
        if name not in cls.names():
            raise ValueError(f"{cls.operator} has no argument {name!r}")
        return cls.names().index(name)

    @classmethod
    def signature(cls) -> str:
        """Return arguments and result in torch's schema language, without the operator's name."""
        hints = typing.get_type_hints(cls, include_extras=True)
        parts = []
        for field in dataclasses.fields(cls):  # type: ignore[arg-type]
            hint = hints[field.name]
            kind = hint.__metadata__[0] if typing.get_origin(hint) is Annotated else _TYPES[hint]
            default = "" if field.default is dataclasses.MISSING else f"={field.default}"
            default = default.removesuffix("0") if type(field.default) is float else default  # torch writes 0.0 as 0.
            parts.append(f"{kind} {field.name}{default}")
        return f"({', '.join(parts)}) -> {cls.returns}"

    @classmethod
    def bind(cls: type[_Args], node: Node) -> _Args:
        """Return the arguments of a node as an instance, to read them by name.

        Raises:
            TypeError: the node lacks an argument, or has one that the operator does not take.
        """
        return cls(*node.args, **node.kwargs)


@dataclass
class MaskedLinearArgs(Args):
    """``linear(x, weight * mask, bias)``; the mask is ``n``:``m``."""

    operator: ClassVar[str] = "masked_linear"
    x: Tensor
    weight: Tensor
    mask: Tensor
    bias: OptionalTensor
    n: int
    m: int


@dataclass
class MaskedConv2dArgs(Args):
    """``conv2d(x, weight * mask, bias, ...)``; the mask is ``n``:``m`` in the execution layout."""

    operator: ClassVar[str] = "masked_conv2d"
    x: Tensor
    weight: Tensor
    mask: Tensor
    bias: OptionalTensor
    stride: Ints
    padding: Ints
    dilation: Ints
    groups: int
    n: int
    m: int


@dataclass
class NmLinearArgs(Args):
    """A linear layer on kept values and bit masks (``nm_format.pack``); ``k`` inputs."""

    operator: ClassVar[str] = "nm_linear"
    x: Tensor
    values: Tensor
    words: Tensor
    bias: OptionalTensor
    n: int
    m: int
    k: int


@dataclass
class NmConv2dArgs(Args):
    """A convolution on kept values and bit masks; ``shape`` is that of the dense weight."""

    operator: ClassVar[str] = "nm_conv2d"
    x: Tensor
    values: Tensor
    words: Tensor
    bias: OptionalTensor
    stride: Ints
    padding: Ints
    dilation: Ints
    groups: int
    n: int
    m: int
    shape: Ints


@dataclass
class NmGemmArgs(Args):
    """``activation(x W' + bias) + residual`` on a packed weight (out, in) of a native layout."""

    operator: ClassVar[str] = "nm_gemm"
    x: Tensor
    values: Tensor
    index: Tensor
    bias: OptionalTensor
    residual: OptionalTensor
    out: int
    n: int
    m: int
    layout: int
    activation: str


@dataclass
class NmMlpArgs(Args):
    """``activation(x W1' + bias1) W2' + bias2 + residual`` on two packed weights (hidden, in) and (out, hidden)."""

    operator: ClassVar[str] = "nm_mlp"
    x: Tensor
    values1: Tensor
    index1: Tensor
    bias1: OptionalTensor
    values2: Tensor
    index2: Tensor
    bias2: OptionalTensor
    residual: OptionalTensor
    hidden: int
    out: int
    n1: int
    m1: int
    n2: int
    m2: int
    layout1: int
    layout2: int
    activation: str


@dataclass
class NmConvArgs(Args):
    """``activation(conv2d(x, W) + bias) + residual`` on a packed weight of ``shape`` (out, in, kh, kw)."""

    operator: ClassVar[str] = "nm_conv"
    x: Tensor
    values: Tensor
    index: Tensor
    bias: OptionalTensor
    residual: OptionalTensor
    stride: Ints
    padding: Ints
    dilation: Ints
    n: int
    m: int
    shape: Ints
    layout: int
    activation: str


@dataclass
class TokenSizeArgs(Args):
    """Input tokens per token before any merge."""

    operator: ClassVar[str] = "token_size"
    x: Tensor
    mask: OptionalTensor = None


@dataclass
class TokenBiasArgs(Args):
    """log(size), shaped for attention logits whose keys run along ``dim``, with ``rows`` rows per sample."""

    operator: ClassVar[str] = "token_bias"
    size: Tensor
    logits: Tensor
    start: int
    dim: int
    rows: int = 1


@dataclass
class TokenMergeArgs(Args):
    """Merge ``r`` tokens of x; yields tokens, sizes and the new position of each old token."""

    operator: ClassVar[str] = "token_merge"
    returns: ClassVar[str] = "(Tensor, Tensor, Tensor)"
    x: Tensor
    keys: Tensor
    size: Tensor
    r: int
    prefix: int
    suffix: int = 0
    saliency: OptionalTensor = None
    saliency_weight: float = 0.0
    size_weight: float = 0.0
    keep_norm: bool = False


@dataclass
class TokenSaliencyArgs(Args):
    """Attention that the tokens ``rows`` pay to every token; without a key, ``query`` holds attention weights."""

    operator: ClassVar[str] = "token_saliency"
    query: Tensor
    key: OptionalTensor
    size: OptionalTensor
    rows: Ints
    scale: float | None = None
    bias: OptionalTensor = None


@dataclass
class TokenMeanArgs(Args):
    """Mean over tokens, weighted by their sizes."""

    operator: ClassVar[str] = "token_mean"
    x: Tensor
    size: Tensor
    start: int
    dim: int
    keepdim: bool


@dataclass
class TokenFollowArgs(Args):
    """Per-token values, such as position embeddings, averaged over merged tokens."""

    operator: ClassVar[str] = "token_follow"
    table: Tensor
    place: Tensor
    before: Tensor
    size: Tensor
    start: int
    dim: int
    rank: int


@dataclass
class TokenPairsArgs(Args):
    """A bias for every pair of query and key, for merged tokens."""

    operator: ClassVar[str] = "token_pairs"
    table: Tensor
    place: Tensor
    before: Tensor
    size: Tensor
    queries: int
    keys: int
    counted: bool


@dataclass
class TokenSpreadArgs(Args):
    """Values of merged tokens, one for each input token that they hold."""

    operator: ClassVar[str] = "token_spread"
    x: Tensor
    place: Tensor
    start: int
    dim: int


@dataclass
class TokenAttentionArgs(Args):
    """Attention with log(size) added to the logits."""

    operator: ClassVar[str] = "token_attention"
    query: Tensor
    key: Tensor
    value: Tensor
    size: Tensor
    start: int
    dropout_p: float
    scale: float | None
    enable_gqa: bool


@dataclass
class NmAttentionArgs(Args):
    """``softmax(query key^T * scale + bias) value``; the result is contiguous as (B, tokens, heads, D)."""

    operator: ClassVar[str] = "nm_attention"
    query: Tensor
    key: Tensor
    value: Tensor
    bias: OptionalTensor = None
    scale: float | None = None


NativeArgs = NmGemmArgs | NmMlpArgs | NmConvArgs
OPERATORS: dict[str, type[Args]] = {cls.operator: cls for cls in Args.__subclasses__()}


def operator_name(target: Callable[..., Any] | str) -> str:
    """Return the name of a torch operator without namespace and overload; empty for any other target."""
    schema = getattr(target, "_schema", None)
    return "" if schema is None else str(schema.name).rpartition("::")[2]


def bind(node: Node) -> Any:
    """Return the arguments of a node that calls one of :data:`OPERATORS`, as an instance of that operator's class.

    Raises:
        KeyError: the node calls another operator.
        TypeError: see :meth:`Args.bind`.
    """
    return OPERATORS[operator_name(node.target)].bind(node)


def try_bind(node: Node) -> Any:
    """As :func:`bind`; None if the node calls another operator or lacks arguments, as in a damaged file."""
    try:
        return bind(node)
    except (KeyError, TypeError):
        return None
