"""The torch.compile backend ``mpsparse``: mask and merge a dense graph, lower its masked layers, then run Inductor.

Registered through the ``torch_dynamo_backends`` entry point, so the name works without an import.

Inference (no gradient can be requested): masked weights become packed tensors that the compiled graph owns. Dynamo
does not recompile when a user changes weights, so every call compares a stamp of each weight, and packs the weight
again into the same buffers if its stamp differs. Training: the graph keeps the masked dense weight, whose masked
gradients are zero. Dynamo compiles one model many times (batch sizes, grad modes); these graphs share one mask per
weight.
"""

from __future__ import annotations

import copy
import functools
import hashlib
import logging
import weakref
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.utils.weak import WeakTensorKeyDictionary

from mpcompile._version import __version__
from mpcompile.capture.importers import import_model
from mpcompile.config import Config
from mpcompile.dump import observers
from mpcompile.errors import NotEligibleError, first_line
from mpcompile.io.messages import warn_once
from mpcompile.ir import spec
from mpcompile.ir.module import Imported, IRModule, Lifted, owned_by_transformed
from mpcompile.ir.numerics import autocasts, exact
from mpcompile.ir.parts import keep
from mpcompile.ir.shapes import propagate
from mpcompile.ir.view import layers, unsupported
from mpcompile.kernels import ops
from mpcompile.kernels.nm_format import Pattern
from mpcompile.passes.accounts import join_rows
from mpcompile.passes.base import Context, Results, run_pass
from mpcompile.passes.fold_norm import FoldNorm
from mpcompile.passes.fold_scale import FoldScale
from mpcompile.passes.fuse import Fuse
from mpcompile.passes.lower import Lower, LowerAttention, LowerDense, LowerMerges, Slot, Slots
from mpcompile.passes.mask import Masked, magnitude_mask
from mpcompile.passes.merge_tokens.insert import unmerged
from mpcompile.pipeline import Pipeline, run_pipeline, transformed
from mpcompile.plan import Plan

log = logging.getLogger(__name__)

OWNED = "_owned"  # where a frozen graph holds its former parameters
# Options of Inductor for frozen graphs. Calls from Python and checks of what every operator returned would take a tenth
# of a small model's time; the operators' shapes are tested instead.
FREEZING: dict[str, Any] = {"freezing": True}
NATIVE_CALLS: dict[str, Any] = {"cpp_wrapper": True, "size_asserts": False, "alignment_asserts": False}


class _State:
    """State shared by all compiled graphs of the process."""

    def __init__(self) -> None:
        self.masks: Any = WeakTensorKeyDictionary()  # the user's weight -> {pattern: mask}
        # The user's weight -> {options: its pattern, or None for dense}.
        self.allocated: Any = WeakTensorKeyDictionary()
        self.graphs: weakref.WeakSet[CompiledGraph] = weakref.WeakSet()
        self.generation = 0  # number of optimizer steps and refreshes: fused optimizers bump no version counter
        self.hook: Any = None

    def watch_optimizers(self) -> None:
        if self.hook is None:
            self.hook = register_optimizer_step_post_hook(self._stepped)

    def _stepped(self, *_: Any) -> None:
        self.generation += 1


_STATE = _State()


def _stamp(tensor: Tensor) -> tuple[int, int]:
    """Return a value that changes if a tensor is written in place or gets new storage, but not on ``.data`` writes."""
    return (0 if tensor.is_inference() else tensor._version, tensor.data_ptr())


class CompiledGraph:
    """The callable that dynamo runs for one graph: it packs changed weights again, then runs the compiled code.

    Attributes:
        plan: the decisions for this graph.
        lowered: False for a graph that keeps dense masked weights because gradients may be requested.
        calls: number of calls so far.
    """

    def __init__(
        self, run: Callable[..., Any], plan: Plan, slots: list[Slot], imported: Imported, config: Config, lowered: bool
    ) -> None:
        self.run, self.plan, self.slots, self.lowered = run, plan, slots, lowered
        self.frozen = config.frozen
        self.calls = 0
        order = [n.name for n in imported.gm.graph.nodes if n.op == "placeholder"]
        self.places: list[tuple[Slot, int, int | None]] = []
        self.stamps: list[Any] = []
        for slot in slots:
            if slot.weight is None or slot.weight.op != "placeholder":
                continue  # the graph owns this weight: nothing else can change it
            place = order.index(slot.mask.name) if slot.mask is not None and slot.mask.op == "placeholder" else None
            self.places.append((slot, order.index(slot.weight.name), place))
            self.stamps.append(self._stamp_of(imported.lifted.tensors[slot.weight.name], slot.chosen))
        self.generation = _STATE.generation
        _STATE.graphs.add(self)

    @staticmethod
    def _stamp_of(weight: Tensor, mask: Tensor) -> tuple[Any, ...]:
        return (weakref.ref(weight), _stamp(weight), weakref.ref(mask), _stamp(mask))

    def __call__(self, *args: Any) -> Any:
        self.calls += 1
        if not self.frozen or self.generation != _STATE.generation:
            self._check(args)
        return self.run(*args)

    def _check(self, args: Sequence[Any]) -> None:
        """Pack again every weight that has changed since it was packed."""
        everything = self.generation != _STATE.generation
        self.generation = _STATE.generation
        for index, (slot, place, mask_place) in enumerate(self.places):
            weight = args[place]
            mask = slot.chosen if mask_place is None else args[mask_place]
            known = self.stamps[index]
            same = known[0]() is weight and known[1] == _stamp(weight)
            if everything or not same or known[2]() is not mask or known[3] != _stamp(mask):
                slot.fill(weight, mask)
                self.stamps[index] = self._stamp_of(weight, mask)
                if mask_place is None and slot.weight_rows == slot.mask_rows:
                    self._keep_mask(weight, mask, slot)

    def _keep_mask(self, weight: Tensor, mask: Tensor, slot: Slot) -> None:
        """Record the mask for a weight that replaces another, for this graph and for graphs compiled later."""
        _STATE.masks.setdefault(weight, {})[slot.spec.pattern] = mask
        values = weight.detach().square()
        if float((values * mask).sum()) < 0.9 * float((values * magnitude_mask(weight, slot.spec.pattern)).sum()):
            warn_once(
                log,
                f"mpsparse: the weights of {slot.name} (and perhaps others) have changed so much that their mask no "
                "longer fits; mpcompile.refresh(remask=True) chooses it again",
            )


@torch.no_grad()
def refresh(*, remask: bool = False) -> None:
    """Make every compiled graph pack its weights again at its next call.

    Needed only after a change that cannot be detected, such as ``weight.data.mul_(2)``. In-place updates,
    load_state_dict, new Parameters and optimizer steps are detected.

    Args:
        remask: also choose the masks again, by magnitude, in models that were masked by the backend itself. (The
            masks of a transformed module are its own buffers, and do not change.)

    Example:
        >>> refresh()
    """
    if remask:
        for weight, masks in _STATE.masks.items():
            for pattern, mask in masks.items():
                mask.copy_(magnitude_mask(weight, pattern))
    _STATE.generation += 1


def compiled_graphs() -> list[CompiledGraph]:
    """Return the graphs that this process has compiled and dynamo still holds."""
    return list(_STATE.graphs)


def _known_masks(
    gm: fx.GraphModule, lifted: Lifted, config: Config, allocated: Mapping[str, Pattern | None]
) -> dict[str, Tensor]:
    known = {}
    for layer in layers(gm, lifted):
        weight = layer.weight.tensor
        named = config.named_pattern(layer.name)
        pattern = allocated.get(layer.name, _pattern_of(weight, config))
        if named is not None:
            pattern = None if named == "dense" else Pattern.parse(named)
        mask = None if pattern is None else _STATE.masks.get(weight, {}).get(pattern)
        if mask is not None:
            known[layer.name] = mask
    return known


def _pattern_of(weight: Tensor, config: Config) -> Pattern | None:
    return config.pattern_for(weight) if weight.dim() >= 2 else None


def _budget(config: Config) -> tuple[Any, ...]:
    """Return everything that an allocation depends on, besides the weights."""
    return (config.mac_reduction, config.patterns, config.exclude, config.include)


def _known_patterns(gm: fx.GraphModule, lifted: Lifted, config: Config) -> dict[str, Pattern | None]:
    """Return the patterns allocated for an earlier graph with the same weights, regardless of its batch size."""
    known: dict[str, Pattern | None] = {}
    for layer in layers(gm, lifted):
        choices = _STATE.allocated.get(layer.weight.tensor, {})
        if config.mac_reduction is not None and _budget(config) in choices:
            known[layer.name] = choices[_budget(config)]
    return known


def _transform(imported: Imported, config: Config) -> Plan:
    """Mask and merge a dense graph; leave a transformed one as it is."""
    gm = imported.gm
    if transformed(imported) or owned_by_transformed(imported.lifted.tensors.values()):
        return run_pipeline(imported, config, Pipeline([]), owned=False).plan
    allocated = _known_patterns(gm, imported.lifted, config)
    masks = _known_masks(gm, imported.lifted, config, allocated)
    weights = {layer.name: layer.weight.tensor for layer in layers(gm, imported.lifted)}
    options: dict[str, Any] = {"masks": masks, "owned": False, "allocated": allocated or None, "tolerant": True}
    results = Results()
    plan = run_pipeline(imported, config, Pipeline(), results=results, **options).plan
    hidden = {name: why for name, (_, why) in unsupported(gm, imported.lifted).items() if why.startswith("inside ")}
    if hidden and config.pattern != "dense":
        name, why = next(iter(hidden.items()))
        warn_once(log, f"mpsparse: {len(hidden)} weights stay dense, such as {name}: {why}")
    for why in unmerged(plan):
        warn_once(log, f"mpsparse: nothing merged in this graph: {why}")
    masked = results.get(Masked) or Masked()
    masks |= {name: projection.mask for name, projection in masked.projections.items()}
    for name, mask in masks.items():
        _STATE.masks.setdefault(weights[name], {})[Pattern.parse(plan.layers[name].pattern)] = mask
    for name, entry in plan.layers.items() if config.mac_reduction is not None else ():
        if name in weights and (entry.reason is None or "allocate" in entry.notes):
            pattern = None if entry.pattern == "dense" else Pattern.parse(entry.pattern)
            _STATE.allocated.setdefault(weights[name], {})[_budget(config)] = pattern
    if plan.masked:
        patterns = ", ".join(sorted({plan.layers[name].pattern for name in plan.masked}))
        warn_once(
            log,
            f"mpsparse: masked {len(plan.masked)} layers {patterns} by magnitude, without data: expect a loss of "
            "accuracy until the model is trained (mpcompile.transform with calibration data loses less)",
        )
    return plan


def _own(gm: IRModule, lifted: Lifted) -> None:
    """Turn parameters that are graph inputs into the graph's constants: Inductor folds and prepacks only constants."""
    for node in [n for n in gm.graph.nodes if n.op == "placeholder" and n.name in lifted.tensors and n.users]:
        path = f"{OWNED}.{node.name}"
        keep(gm, OWNED, {node.name: lifted.tensors[node.name].detach()})
        with gm.graph.inserting_before(next(n for n in gm.graph.nodes if n.op != "placeholder")):
            constant = gm.graph.get_attr(path)
        constant.meta = dict(node.meta)
        node.replace_all_uses_with(constant)
    gm.recompile()


def _inductor(
    gm: IRModule, inputs: Sequence[Any], mode: str | None, frozen: Lifted | None = None
) -> Callable[..., Any]:
    """Compile a graph with Inductor; lifted parameters passed as ``frozen`` become its constants."""
    from torch._inductor import list_mode_options
    from torch._inductor.compile_fx import compile_fx

    for node in gm.graph.nodes:  # fake tensors of our own mode would disagree with AOTAutograd's
        node.meta.pop("val", None)
    patches = dict(list_mode_options(mode)) if mode and mode != "default" else {}
    options: Any = torch.compiler.config

    def compiled(extra: Mapping[str, Any]) -> Callable[..., Any]:
        with options.patch(cache_key_tag=f"{options.cache_key_tag}{_cache_tag()}"):
            run: Any = compile_fx(gm, list(inputs), config_patches={**patches, **extra} or None)
        return run

    if frozen is None:
        return compiled({})
    _own(gm, frozen)
    if any(tensor.device.type != "cpu" for tensor in (*frozen.tensors.values(), *inputs) if isinstance(tensor, Tensor)):
        return compiled(FREEZING)
    graph = copy.deepcopy(gm.graph)
    try:
        return compiled(FREEZING | NATIVE_CALLS)
    except Exception as error:  # an operator that Inductor cannot call from C++, of a kind that only it knows
        warn_once(log, f"mpsparse: this graph is called from Python, which takes longer: {first_line(error)}")
        gm.graph = graph
        return compiled(FREEZING)


@functools.cache
def _cache_tag() -> str:
    """Return a key that changes with our operators: torch caches code on disk with the operators built into it."""
    folder = Path(ops.__file__).parent
    key = hashlib.sha256(__version__.encode())
    for path in sorted(folder.rglob("*.py")):
        key.update(path.relative_to(folder).as_posix().encode() + path.read_bytes())
    return f"mpcompile-{key.hexdigest()[:16]}"


def mpsparse(
    gm: fx.GraphModule,
    example_inputs: Sequence[Any],
    *,
    options: Mapping[str, Any] | None = None,
    mode: str | None = None,
    **_: Any,
) -> Callable[..., Any]:
    """Backend of ``torch.compile(model, backend="mpsparse")``.

    A module from :func:`mpcompile.transform` is lowered as it is. Any other module is first masked by magnitude, and
    its tokens are merged, as ``options`` (the fields of :class:`mpcompile.Config`) specify. A graph without eligible
    layers goes to Inductor unchanged, with one warning.

    Raises:
        MPCompileError: an unknown option, weights that are not finite, or a graph that a pass refuses. Dynamo raises
            it as ``BackendCompilerFailed`` with the error as ``inner_exception``.

    Example:
        >>> model = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.ReLU(), torch.nn.Linear(64, 8))
        >>> fn = torch.compile(model, backend="mpsparse", options={"pattern": "2:4"})
    """
    config = Config.from_options(options)
    imported = import_model(gm, list(example_inputs), share=True)
    try:
        plan = _transform(imported, config)
    except NotEligibleError as error:
        warn_once(log, f"mpsparse: {error}. This graph is compiled by Inductor alone")
        imported = import_model(gm, list(example_inputs), share=True)
        return CompiledGraph(
            _inductor(imported.gm, example_inputs, mode), Plan(notes=[str(error)]), [], imported, config, False
        )
    trains = torch.is_grad_enabled() and any(isinstance(t, Tensor) and t.requires_grad for t in example_inputs)
    slots: list[Slot] = []
    if not trains:
        if autocasts():  # the dtypes of adjacent nodes depend on autocast
            propagate(imported.gm, imported.inputs)
        context = Context(config, imported.inputs, imported.lifted, owned=False, plan=plan, observers=observers())
        with exact():
            frozen = [FoldNorm(), FoldScale(), Lower(), LowerDense(), LowerAttention(), LowerMerges(), Fuse()]
            for step in frozen if config.frozen else [Lower(), Fuse()]:
                run_pass(step, imported.gm, context)
            spec.check(imported.gm, spec.Stage.FUSED, lifted=imported.lifted, plan=plan)
        join_rows(plan)
        lowered = context.results.get(Slots)
        slots = [] if lowered is None else lowered.slots
        _STATE.watch_optimizers()
    run = _inductor(imported.gm, example_inputs, mode, None if trains or not config.frozen else imported.lifted)
    return CompiledGraph(run, plan, slots, imported, config, not trains)
