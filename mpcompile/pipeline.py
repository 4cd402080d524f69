"""The pipeline: the passes in their order, and ``transform``, which runs them on a model."""

from __future__ import annotations

import copy
import functools
import logging
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from mpcompile.calibration.data import as_batches, peek
from mpcompile.capture.checks import check_values
from mpcompile.capture.importers import import_model
from mpcompile.config import CALIBRATIONS, Config
from mpcompile.dump import observers
from mpcompile.errors import ConfigError, GraphError, InputError
from mpcompile.ir import spec
from mpcompile.ir.effects import explicit
from mpcompile.ir.module import Imported, IRModule
from mpcompile.ir.numerics import exact, with_ordinary_tensors
from mpcompile.ir.shapes import propagate
from mpcompile.ir.view import as_stored, layers
from mpcompile.kernels import ops
from mpcompile.kernels.nm_format import Pattern
from mpcompile.passes.accounts import Accounts
from mpcompile.passes.allocate.decide import Allocate
from mpcompile.passes.analyze import Analyze
from mpcompile.passes.base import Calibration, Context, Pass, Results, run_pass
from mpcompile.passes.consistency import Consistency, output_shapes
from mpcompile.passes.context import Observer
from mpcompile.passes.dead_tokens import SkipDeadTokens
from mpcompile.passes.fold_norm import FoldNorm
from mpcompile.passes.fold_scale import FoldScale
from mpcompile.passes.fuse import Fuse
from mpcompile.passes.lower import Lower
from mpcompile.passes.mask import Mask
from mpcompile.passes.merge_tokens.insert import MergeTokens, unmerged
from mpcompile.passes.merge_tokens.outputs import select_outputs
from mpcompile.passes.permute import Permute
from mpcompile.passes.reconstruct.decide import Reconstruct
from mpcompile.passes.restore import Restore
from mpcompile.plan import LayerPlan, Plan
from mpcompile.reconstruction.options import Reconstruction

log = logging.getLogger(__name__)


class Pipeline:
    """An ordered list of passes. Without arguments, the one that :func:`mpcompile.transform` runs.

    Args:
        passes: instances of :class:`mpcompile.passes.base.Pass`.
        reconstruction: options of a pass Reconstruct, which then is among the default passes, behind Restore.
        after_each: called after every pass with the pass, the code of the graph before it (text), the graph after it,
            and the decision. For example, a :class:`mpcompile.dump.Dump` writes these to files.

    Example:
        >>> [p.name for p in Pipeline()]
        ['analyze', 'allocate', 'permute', 'merge_tokens', 'mask', 'restore', 'skip_dead_tokens']
        >>> [p.name for p in Pipeline([Mask(), MergeTokens()])]
        ['mask', 'merge_tokens']
    """

    def __init__(
        self,
        passes: Sequence[Pass] | None = None,
        *,
        reconstruction: Reconstruction | None = None,
        after_each: Observer | None = None,
    ) -> None:
        chosen: list[Pass] = list(passes or ())
        if passes is None:
            chosen = [step() for step in (Analyze, Allocate, Permute, MergeTokens, Mask, Restore)]
            chosen += [] if reconstruction is None else [Reconstruct(reconstruction)]
            chosen += [SkipDeadTokens()]
        for step in chosen:
            if not isinstance(step, Pass):
                raise ConfigError(
                    "this is not a pass", expected="an instance of mpcompile.passes.base.Pass", found=repr(step)
                )
        self.passes = chosen
        self.after_each = after_each

    def __iter__(self) -> Iterator[Pass]:
        return iter(self.passes)

    def __repr__(self) -> str:
        return f"Pipeline([{', '.join(p.name for p in self.passes)}])"

    def __call__(self, model: Imported, ctx: Context) -> IRModule:
        """Run every pass on the imported graph, and check its shapes after every change.

        Raises:
            MPCompileError: a pass refuses the graph, or leaves it with shapes that do not fit together.
        """
        gm = model.gm
        output = output_shapes(propagate(gm, ctx.inputs))
        if explicit(gm):
            gm.recompile()
        for step in self.passes:
            step.check(gm, ctx)
        accounts = Accounts(gm, ctx)
        check = Consistency(gm, ctx, output)
        for step in self.passes:
            if step.closes_accounts:
                accounts.close(gm)
            gm = run_pass(step, gm, ctx, functools.partial(check, step)).graph_module
        accounts.close(gm)
        accounts.enter(ctx.plan)
        gm.plan = ctx.plan
        return gm


@with_ordinary_tensors
def transform(
    model: nn.Module,
    example_inputs: Any = None,
    config: Config | None = None,
    calibration: Iterable[Any] | None = None,
    *,
    pipeline: Pipeline | None = None,
    statistics: str | os.PathLike[str] | None = None,
    memory: int = 2 << 30,
    prior: Mapping[str, torch.Tensor] | None = None,
    prior_weight: float = 0.1,
    calibrate: str = "pruned_to_dense",
    reconstruction: Reconstruction | None = None,
    seed: int = 0,
    dump: str | os.PathLike[str] | None = None,
    dynamic_shapes: Any = None,
) -> IRModule:
    """Analyse and mask a model and merge its tokens: return a trainable fx.GraphModule whose weights keep their names.

    The model itself is not changed. The result follows ``train()`` and ``eval()``. It can be trained (gradients of
    masked weights are zero), deep-copied, saved with :func:`mpcompile.save`, and lowered with
    ``torch.compile(gm, backend="mpsparse")``. ``gm.plan`` holds the decisions.

    Args:
        model: a module, or a GraphModule. A module is captured by symbolic tracing, else by torch.export (strict, then
            non-strict), else by dynamo, the first that takes it: ``gm.plan.captured`` says which.
        example_inputs: a tensor, a tuple of inputs, or a mapping of keyword inputs, in which labels and what forward
            does not take are left out; only shapes and dtypes matter. For a dynamo graph, the list that the backend
            received. Not needed if the graph carries shapes, or if there is calibration data.
        config: the options; see :class:`mpcompile.Config`.
        calibration: an iterable of batches (a tensor, a tuple whose first item is the input, or a dict of keyword
            inputs), for a score that needs data and for ``tome_r="auto"``. Without it, the score falls back to
            magnitude and the schedule to one that is not searched, and the Plan says so.
        pipeline: passes to run instead of the default ones.
        statistics: a folder for the moments of every layer, from which an interrupted run on the same weights, data
            and options resumes.
        memory: maximum bytes of calibration statistics, and also of the activations held between layers. Beyond that,
            statistics are reduced to diagonal blocks, or to the diagonal, and activations go to a temporary folder.
        prior: layer name -> boolean mask of its weight, towards which ``score="covariance"`` is drawn.
        prior_weight: the weight alpha of that Hamming prior.
        calibrate: ``"pruned_to_dense"`` takes each layer's statistics from the outputs of the pruned layers before it,
            fits the layer a quarter of the way towards the dense model's outputs, and matches BatchNorms to these;
            ``"adapted"`` gives BatchNorms the statistics of the calibration data, and fits all the way;
            ``"pruned"`` fits each layer to its own weights' outputs on pruned inputs; ``"dense"`` takes all
            statistics from one pass over the dense model, which is faster and less accurate.
        reconstruction: options of the pass that trains masked blocks towards the dense model's activations, which needs
            calibration data; None for none. See :func:`mpcompile.reconstruct`. Not with ``pipeline``.
        seed: seeds every random choice.
        dump: a folder for the graph before and after every pass, as readable Python with a diff; see
            :class:`mpcompile.dump.Dump`. Setting the environment variable ``MPCOMPILE_DUMP`` to a folder does the same.
        dynamic_shapes: as for ``torch.export.export``, which then captures the model: the axes that stay free. By
            default that is axis 0, the batch, where the model allows it.

    Raises:
        MPCompileError: the model cannot be traced, an option is wrong, no layer is eligible, or the data does not fit.

    Example:
        >>> model = nn.Sequential(nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 4)).eval()
        >>> gm = transform(model, torch.randn(2, 16), Config(pattern="2:4"))
        >>> gm.plan.layers["0"].pattern, gm.plan.layers["2"].reason
        ('2:4', 'head')
    """
    config = Config() if config is None else config
    if not isinstance(config, Config):
        raise ConfigError(
            "config has the wrong type",
            expected="mpcompile.Config",
            found=type(config).__name__,
            hint="Config.from_options(mapping) makes one from a dict",
        )
    if calibration is not None:
        first, calibration = peek(calibration)
        if example_inputs is None and not isinstance(model, torch.fx.GraphModule):
            example_inputs = first if isinstance(first, (torch.Tensor, Mapping)) else (first[0],)
    if pipeline is not None and reconstruction is not None:
        raise ConfigError("reconstruction and pipeline exclude each other", expected="Reconstruct() in the pipeline")
    imported = import_model(model, example_inputs, dynamic_shapes=dynamic_shapes)
    if pipeline is None:
        check_values(imported.gm)
    return run_pipeline(
        imported,
        config,
        pipeline or Pipeline(reconstruction=reconstruction),
        calibration=calibration,
        statistics=None if statistics is None else Path(statistics),
        memory=memory,
        prior=prior,
        prior_weight=prior_weight,
        calibrate=calibrate,
        seed=seed,
        dump=dump,
    )


@with_ordinary_tensors
def lower(
    model: nn.Module,
    example_inputs: Any = None,
    config: Config | None = None,
    *,
    dump: str | os.PathLike[str] | None = None,
) -> IRModule:
    """Lower a model ahead of time: packed weights, fused layers, no dense copy of masked weights.

    The result does not depend on the model, which can be deleted. It is for inference, and runs as it is; faster with
    ``torch.compile(lowered, backend="mpsparse", options={"frozen": True})``. It can be saved with
    :func:`mpcompile.save`; its weights are packed for the kind of processor that it was lowered on, and it runs slowly
    on another.

    Args:
        model: from :func:`transform`, or any model that it takes, which is then masked by magnitude first.
        example_inputs: as in :func:`transform`; engines are timed for their batch size.
        config: ``engine`` names the engine of masked layers.
        dump: as in :func:`transform`.

    Raises:
        MPCompileError: as :func:`transform`.

    Example:
        >>> gm = transform(nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 8)).eval(), torch.randn(2, 64))
        >>> lowered = lower(gm, torch.randn(2, 64), Config(engine="reference"))
        >>> sorted(name for name, _ in lowered.named_buffers())
        ['packed.0.values', 'packed.0.words']
    """
    config = replace(Config() if config is None else config, score="magnitude", frozen=True)
    imported = import_model(model, example_inputs)
    check_values(imported.gm)
    imported.gm.eval()
    gm = complete(imported, config, [FoldNorm(), FoldScale(), Lower(), Fuse()], dump=dump)
    for reason in unmerged(gm.plan):
        log.warning("nothing merged: %s", reason)
    return gm


def plan_of(gm: torch.fx.GraphModule) -> Plan | None:
    """Return the plan that a graph carries, or None if it was never transformed."""
    try:
        return gm.plan if isinstance(gm, IRModule) else None
    except GraphError:
        return None


def transformed(imported: Imported) -> bool:
    """Return True if :func:`transform` made a graph: it has a plan or, as captured graphs have none, our operators."""
    return (
        plan_of(imported.gm) is not None
        or any(spec.operator_of(node) for node in imported.gm.graph.nodes)
        or any(layer.pattern is not None for layer in layers(imported.gm, imported.lifted))
    )


def complete(
    imported: Imported,
    config: Config,
    passes: Sequence[Pass] = (),
    dump: str | os.PathLike[str] | None = None,
) -> IRModule:
    """Run the default passes, of a graph that was transformed before those that it has not seen, then ``passes``."""
    plan = plan_of(imported.gm)
    known = plan is not None and any(record.name == SkipDeadTokens.name for record in plan.passes)
    again: list[Pass] = [] if known else [SkipDeadTokens()]
    first = again if transformed(imported) else list(Pipeline())
    return run_pipeline(imported, config, Pipeline([*first, *passes]), tolerant=True, dump=dump)


def _begun(imported: Imported, config: Config, pipeline: Pipeline) -> Plan:
    """Return the plan that a run starts with: that of earlier runs, the graph's masks, and the options of this run."""
    before = plan_of(imported.gm)
    plan = Plan() if before is None else copy.deepcopy(before)
    options, old = config.to_dict(), plan.config
    merged = any(node.target is ops.token_merge for node in imported.gm.graph.nodes)
    decides = any(step.decides for step in pipeline)
    kept = [key for key in old if key not in ("engine", "frozen")] if before and not decides else []
    if before and decides and not config.outputs:
        kept += [key for key in old if key == "outputs"]  # outputs that are gone stay gone
    if before and decides and merged:
        kept += [key for key in old if key.startswith(("tome_", "prefix_"))]
    if before and decides and config.pattern == "dense" and plan.masked:
        kept += [key for key in old if not key.startswith(("tome_", "prefix_", "engine", "frozen"))]
    plan.config = {**options, **{key: old[key] for key in kept}}
    plan.notes = list(dict.fromkeys([*plan.notes, *imported.notes]))
    plan.captured = plan.captured or imported.captured
    plan.figures = {}  # the old ones were measured on the module before this run
    for use in layers(imported.gm, imported.lifted):
        if use.pattern is not None:
            for layer in (as_stored(imported.gm, use, imported.lifted), use):
                fresh = LayerPlan(layer.kind, tuple(layer.weight.tensor.shape))
                entry = plan.layers.setdefault(layer.name, fresh)
                entry.pattern, entry.density, entry.reason = str(use.pattern), use.pattern.density, None
    return plan


@exact()
def run_pipeline(
    imported: Imported,
    config: Config,
    pipeline: Pipeline,
    *,
    calibration: Iterable[Any] | None = None,
    masks: Mapping[str, torch.Tensor] | None = None,
    owned: bool = True,
    statistics: Path | None = None,
    memory: int = 2 << 30,
    prior: Mapping[str, torch.Tensor] | None = None,
    prior_weight: float = 0.1,
    calibrate: str = "pruned_to_dense",
    seed: int = 0,
    allocated: Mapping[str, Pattern | None] | None = None,
    tolerant: bool = False,
    results: Results | None = None,
    dump: str | os.PathLike[str] | None = None,
) -> IRModule:
    """Run passes on an imported graph and attach the Plan: the common part of :func:`transform` and the backend."""
    for name, value in (("memory", memory), ("prior_weight", prior_weight)):
        if value < 0:
            raise ConfigError(f"{name} is negative", expected="0 or more", found=value)
    if calibrate not in CALIBRATIONS:
        raise ConfigError("calibrate has no such value", expected=f"one of {', '.join(CALIBRATIONS)}", found=calibrate)
    if allocated is None:
        _check_needs(pipeline, config)
    select_outputs(imported, config.outputs)
    plan = _begun(imported, config, pipeline)
    data: Calibration | None = None
    if calibration is not None:
        rereadable = iter(as_batches(calibration)) is not calibration
        if not rereadable and (calibrate != "dense" or config.reads_again):
            calibration, rereadable = list(calibration), True  # held between layers anyway, or read more than once
        data = Calibration(calibration, rereadable, memory, statistics, calibrate)
    ctx = Context(
        config,
        imported.inputs,
        imported.lifted,
        owned,
        calibration=data,
        plan=plan,
        results=results,
        requests=[request for step in pipeline for request in step.requests],
        observers=[*([pipeline.after_each] if pipeline.after_each else []), *observers(dump)],
        prior=_checked(prior or {}, imported),
        prior_weight=prior_weight,
        seed=seed,
        patterns=allocated or {},
        masks=masks or {},
        tolerant=tolerant,
    )
    gm = pipeline(imported, ctx)
    if config.score != "magnitude" and calibration is None and config.pattern != "dense" and plan.masked:
        plan.note(f"no calibration data: score={config.score!r} fell back to magnitude")
    return gm


def _check_needs(pipeline: Pipeline, config: Config) -> None:
    """Refuse a pipeline in which a pass lacks the result of an earlier one that it needs."""
    provided: set[type] = set()
    for step in pipeline:
        for option, result in step.needs:
            if getattr(config, option) is not None and result not in provided:
                provider = getattr(result, "provider", result.__name__)
                raise ConfigError(
                    f"{option} needs the pass {provider}",
                    expected=f"{provider}() before {type(step).__name__}()",
                    found=pipeline,
                )
        provided.update(step.provides)


def _checked(prior: Mapping[str, torch.Tensor], model: Imported) -> Mapping[str, torch.Tensor]:
    """Return the source masks after checking each against its weight.

    Raises:
        InputError: an unknown layer, or a mask of the wrong shape or type.
    """
    shapes = {layer.name: layer.weight.tensor.shape for layer in layers(model.gm, model.lifted)}
    for name, mask in prior.items():
        if name not in shapes:
            raise InputError("prior names a layer that is not in the graph", layer=name, expected=", ".join(shapes))
        if mask.shape != shapes[name] or mask.dtype != torch.bool:
            found, expected = f"{tuple(mask.shape)}, {mask.dtype}", f"{tuple(shapes[name])}, torch.bool"
            raise InputError("a source mask does not fit", layer=name, expected=expected, found=found)
    return prior
