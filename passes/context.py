"""Context of a run, shared by its passes: inputs, calibration data, the results of earlier passes, and the Plan."""

from __future__ import annotations

import enum
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

from torch import Tensor

from mpcompile.calibration.data import as_batches, batches
from mpcompile.config import Config
from mpcompile.ir.module import Imported, IRModule, Lifted
from mpcompile.ir.view import LayerOp
from mpcompile.kernels.nm_format import Pattern
from mpcompile.plan import Plan

if TYPE_CHECKING:
    from mpcompile.passes.base import Pass
    from mpcompile.passes.decision import Decision

T = TypeVar("T")
Observer = Callable[["Pass", str, IRModule, "Decision | dict[str, Any]"], None]


class Request(enum.Enum):
    """A computation that a pass requests from earlier passes of the pipeline."""

    REFIT = "refitted values of masked weights"
    NORMS = "BatchNorm statistics of the pruned network"
    DENSE = "tensors of the dense model that masks or statistics replace"
    SPARED = "schedules of merging that count on dead tokens not being computed"


@dataclass(frozen=True)
class Allocated:
    """The result of Allocate: layer name -> its pattern, or None if the layer stays dense."""

    provider: ClassVar[str] = "Allocate"  # the pass that provides it, for error messages
    patterns: Mapping[str, Pattern | None]


@dataclass(frozen=True)
class Dense:
    """Tensors of the dense model, channels in the graph's order: those that differ from the graph's, by name."""

    tensors: Mapping[str, Tensor]


@dataclass(frozen=True)
class Inputs:
    """The inputs of a run, which do not change during the run.

    Attributes:
        config: the options.
        example: example inputs, one per placeholder; only their shapes and dtypes matter.
        lifted: parameters that are graph inputs.
        owned: True if the graph owns its weights and may change their values.
        tolerant: True if options that do not apply to the graph are skipped rather than refused.
        seed: seeds every random choice.
        prior: source masks of the Hamming prior, by layer name.
        prior_weight: alpha of that prior.
        masks: masks chosen for other graphs of the same model, by layer name.
        patterns: patterns allocated for other graphs of the same model, by layer name; None for dense.
    """

    config: Config
    example: list[Any]
    lifted: Lifted = field(default_factory=Lifted)
    owned: bool = True
    tolerant: bool = False
    seed: int = 0
    prior: Mapping[str, Tensor] = field(default_factory=dict)
    prior_weight: float = 0.1
    masks: Mapping[str, Tensor] = field(default_factory=dict)
    patterns: Mapping[str, Pattern | None] = field(default_factory=dict)


@dataclass(frozen=True)
class Calibration:
    """Calibration data, and how statistics are taken from it. Iterating yields the batches as the user passed them.

    Attributes:
        data: an iterable of batches; a tensor or a dict is one batch.
        rereadable: True if the data can be read more than once.
        memory: bytes that statistics may take, and as many again for the activations held between layers.
        statistics: a folder that keeps the moments of layers, or None.
        policy: where the statistics of a layer come from; the argument ``calibrate`` of :func:`mpcompile.transform`.
    """

    data: Any
    rereadable: bool = True
    memory: int = 2 << 30
    statistics: Path | None = None
    policy: str = "pruned_to_dense"

    def __iter__(self) -> Iterator[Any]:
        return iter(as_batches(self.data))

    def batches(self, model: Imported) -> Iterator[list[Any]]:
        """Yield each batch as the full list of graph inputs; see :func:`mpcompile.calibration.data.batches`."""
        return batches(model, self)


class Results:
    """Results of the passes that have run, one per type: a later result replaces an earlier one of its type.

    Example:
        >>> results = Results()
        >>> results.put(Allocated({"fc": None}))
        >>> results.get(Allocated)
        Allocated(patterns={'fc': None})
        >>> results.get(Calibration) is None
        True
    """

    def __init__(self) -> None:
        self._by_type: dict[type, Any] = {}

    def put(self, result: object) -> None:
        """Store a result under its type."""
        self._by_type[type(result)] = result

    def get(self, kind: type[T]) -> T | None:
        """Return the result of a type, or None if no pass has stored one."""
        return self._by_type.get(kind)


class Context:
    """State that the passes of one run share.

    Args:
        config: the options.
        inputs: example inputs, one per placeholder; only their shapes and dtypes matter.
        lifted: parameters that are graph inputs.
        owned: True if the graph owns its weights and may change their values.
        given: further fields of :class:`Inputs`.
        calibration: calibration data; anything but a :class:`Calibration` becomes one with default options.
        plan: the Plan to which the passes add their records.
        results: results that passes leave for later ones.
        requests: computations that passes of the pipeline request from earlier ones.
        observers: called after every pass with the pass, the code of the graph before it, the graph, and the decision.

    Attributes:
        run: the inputs of the run, frozen.
        calibration: a :class:`Calibration`, or None without data.
    """

    def __init__(
        self,
        config: Config,
        inputs: Sequence[Any],
        lifted: Lifted | None = None,
        owned: bool = True,
        *,
        calibration: Any = None,
        plan: Plan | None = None,
        results: Results | None = None,
        requests: Iterable[Request] = (),
        observers: Iterable[Observer] = (),
        **given: Any,
    ) -> None:
        self.run = Inputs(config, list(inputs), Lifted() if lifted is None else lifted, owned, **given)
        if calibration is not None and not isinstance(calibration, Calibration):
            calibration = Calibration(calibration)
        self.calibration: Calibration | None = calibration
        self.plan = Plan() if plan is None else plan
        self.results = Results() if results is None else results
        self.requests, self.observers = frozenset(requests), tuple(observers)

    @property
    def config(self) -> Config:
        """The options of the run."""
        return self.run.config

    @property
    def inputs(self) -> list[Any]:
        """Example inputs, one per placeholder; only their shapes and dtypes matter."""
        return self.run.example

    @property
    def lifted(self) -> Lifted:
        """Parameters that are graph inputs."""
        return self.run.lifted

    @property
    def owned(self) -> bool:
        """True if the graph owns its weights and may change their values."""
        return self.run.owned

    @property
    def tolerant(self) -> bool:
        """True if options that do not apply to the graph are skipped rather than refused."""
        return self.run.tolerant

    @property
    def seed(self) -> int:
        """The seed of every random choice."""
        return self.run.seed

    @property
    def masks(self) -> Mapping[str, Tensor]:
        """Masks chosen for other graphs of the same model, by layer name."""
        return self.run.masks

    @property
    def patterns(self) -> Mapping[str, Pattern | None]:
        """Allocated patterns by layer name, None for dense: from this run, or from another graph of the same model."""
        allocated = self.results.get(Allocated)
        return self.run.patterns if allocated is None else allocated.patterns

    @property
    def refit(self) -> bool:
        """True if masked weights are to be refitted: the options allow it, and a later pass requests it."""
        return self.config.restore and Request.REFIT in self.requests

    @property
    def renorm(self) -> bool:
        """True if BatchNorm statistics of the pruned network are requested, and can be computed and written."""
        return Request.NORMS in self.requests and self.owned and self.calibration is not None

    def imported(self, gm: IRModule) -> Imported:
        """Return the graph together with the example inputs and lifted parameters of the run."""
        return Imported(gm, self.inputs, self.lifted, [])

    def pattern_for(self, layer: LayerOp) -> Pattern | None:
        """Return the pattern of a layer: the named or allocated one, else the config's; None for dense."""
        named, patterns = self.config.named_pattern(layer.name), self.patterns
        if named is not None:
            return None if named == "dense" else Pattern.parse(named)
        return patterns[layer.name] if layer.name in patterns else self.config.pattern_for(layer.weight.tensor)

    def writable(self, layer: LayerOp) -> bool:
        """Return True if the graph may change the values of the layer's weight."""
        return self.owned and layer.weight.owned

    def __getattr__(self, name: str) -> Any:
        """Return the value of an earlier attribute that belongs to another object, with a DeprecationWarning."""
        if name not in _EARLIER:
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        owner, attribute, default = _EARLIER[name]
        warnings.warn(f"ctx.{name} has moved to ctx.{owner}.{attribute}", DeprecationWarning, stacklevel=2)
        return getattr(getattr(self, owner), attribute, default)


# Earlier attribute of a Context -> its owner, its name there, and its value without calibration data.
_EARLIER: dict[str, tuple[str, str, Any]] = {
    "again": ("calibration", "rereadable", False),
    "memory": ("calibration", "memory", 2 << 30),
    "statistics": ("calibration", "statistics", None),
    "calibrate": ("calibration", "policy", "pruned_to_dense"),
    "prior": ("run", "prior", None),
    "prior_weight": ("run", "prior_weight", None),
}
