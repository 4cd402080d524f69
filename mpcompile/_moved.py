"""Import paths of modules that have moved: each still works for one release, with a DeprecationWarning."""

from __future__ import annotations

import importlib
import sys
import warnings
from collections.abc import Callable, Mapping
from types import ModuleType
from typing import Any

# Old path -> new path, both below ``mpcompile``. A module that was split has several, joined by spaces.
MOVED = {
    "allocation": "pruning.knapsack",
    "analysis": "rmt.analysis",
    "artifact.combinations": "artifact.packed.combinations",
    "artifact.native_nodes": "artifact.packed.nodes",
    "artifact.packing": "artifact.packed.tensors",
    "audit": "measure.audit measure.builds",
    "certify": "certificates.api",
    "certify.batches": "certificates.batches",
    "certify.bounds": "certificates.bounds",
    "certify.enclosure": "certificates.enclosures.enclosure",
    "certify.functions": "certificates.enclosures.functions",
    "certify.pair": "certificates.pair",
    "certify.registry": "certificates.enclosures.registry",
    "certify.report": "certificates.report",
    "certify.rules": "certificates.enclosures.rules",
    "certify.rules_linear": "certificates.enclosures.rules_linear",
    "certify.rules_nonlinear": "certificates.enclosures.rules_nonlinear",
    "certify.steps": "certificates.steps",
    "certify.summary": "certificates.summary",
    "certify.work": "certificates.work",
    "cli.analyze": "cli.commands.measuring.analyze",
    "cli.audit": "cli.commands.measuring.audit",
    "cli.certify": "cli.commands.measuring.certify",
    "cli.common": "cli.options cli.models sources.timm_models sources.loading",
    "cli.compile": "cli.commands.compile",
    "cli.demo": "cli.commands.demo",
    "cli.distill": "cli.commands.distill",
    "cli.explain": "cli.commands.measuring.explain",
    "cli.export": "cli.commands.export",
    "cli.report": "cli.commands.report",
    "cli.verify": "cli.commands.measuring.verify",
    "cli.visualize": "cli.commands.measuring.visualize",
    "damage": "pruning.damage",
    "data.archives": "data.sources.archives",
    "data.class_maps": "data.sources.class_maps",
    "data.folders": "data.sources.folders",
    "data.pictures": "data.sources.pictures",
    "data.regular": "data.sources.regular",
    "data.splits": "data.sources.splits",
    "demo": "cli.demo_job",
    "distill": "training.distill",
    "effects": "ir.effects",
    "events": "training.events",
    "explain": "measure.explain",
    "files": "io.reading io.writing io.ownership io.checkpoints",
    "flops": "ir.macs",
    "graph": "ir.view ir.nodes ir.shapes ir.module ir.numerics ir.parts",
    "images": "data.images",
    "importers": "capture.importers",
    "ir_module": "ir.module",
    "isolation": "ir.isolation",
    "kernels.nm_linear.build": "kernels.cpu.build",
    "kernels.nm_linear.cpu": "kernels.cpu.engine",
    "kernels.nm_linear.cpu.abi": "kernels.cpu.abi",
    "kernels.nm_linear.cpu.build": "kernels.cpu.build",
    "kernels.nm_linear.cpu.engine": "kernels.cpu.engine",
    "kernels.nm_linear.cusparselt": "kernels.nm_linear.gpu.cusparselt",
    "kernels.nm_linear.expand": "kernels.nm_linear.gpu.expand",
    "kernels.nm_linear.expand_kernel": "kernels.nm_linear.gpu.expand_kernel",
    "kernels.nm_linear.gluon_mma_conv": "kernels.nm_linear.gluon.mma_conv",
    "kernels.nm_linear.gluon_mma_sp": "kernels.nm_linear.gluon.mma_sp",
    "kernels.nm_linear.gluon_parts": "kernels.nm_linear.gluon.parts",
    "kernels.nm_linear.gluon_wgmma_sp": "kernels.nm_linear.gluon.wgmma_sp",
    "kernels.nm_linear.gpu_build": "kernels.nm_linear.gpu.build",
    "kernels.nm_linear.gpu_cubin": "kernels.nm_linear.gpu.cubin",
    "kernels.nm_linear.gpu_launch": "kernels.nm_linear.gpu.launch",
    "kernels.nm_linear.gpu_model": "kernels.nm_linear.gpu.model",
    "kernels.nm_linear.gpu_tiles": "kernels.nm_linear.gpu.tiles",
    "kernels.nm_linear.gpu_triton": "kernels.nm_linear.gpu.triton_support",
    "kernels.nm_linear.native": "kernels.nm_linear.operators",
    "labels": "data.labels",
    "macs": "ir.macs",
    "modes": "capture.modes ir.numerics",
    "numerics": "ir.numerics",
    "package_guard": "export.package_guard",
    "parts": "ir.parts",
    "passes.axes": "passes.channels.axes",
    "passes.fold": "passes.fold_norm",
    "passes.idle_masks": "passes.merge_tokens.idle_masks",
    "passes.project": "pruning.project",
    "passes.merge_tokens.schedule": "passes.merge_tokens.schedules.solve passes.merge_tokens.schedules.stream",
    "passes.token_axis": "passes.merge_tokens.axis",
    "passes.token_moves": "passes.merge_tokens.moves",
    "passes.token_schedule": "passes.merge_tokens.schedules.solve passes.merge_tokens.schedules.stream",
    "passes.token_sites": "passes.merge_tokens.sites",
    "permutation": "pruning.column_order",
    "refit": "pruning.refit",
    "regions": "ir.regions",
    "report": "measure.report",
    "roles": "ir.roles",
    "schema": "io.schema",
    "scores": "pruning.scores",
    "sensitivity": "calibration.sensitivity",
    "ser": "pruning.ser",
    "state_dicts": "io.state_dicts",
    "stream": "calibration.stream calibration.norms",
    "tracing": "capture.tracing",
    "training.batches": "data.batches",
    "training.datasets": "data.datasets",
    "training.evaluate": "measure.evaluate",
    "training.images": "data.loader",
    "training.lock": "io.lock",
    "training.masks": "training.policies",
    "training.norms": "training.result",
    "training.ranks": "data.ranks",
    "training.recipe": "training.recipes.recipe",
    "training.streamed": "data.streamed",
    "verify": "artifact.verify",
    "visualize": "page.merged",
    "yaml_options": "io.yaml_options",
}


class _Moved(ModuleType):
    """An old path in ``sys.modules``: every attribute is looked up in the modules at the new paths."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.__path__ = []  # old paths below this one are importable, too

    @property
    def __dict__(self) -> dict[str, Any]:  # type: ignore[override]  # so that patches reach the new module
        targets = self._targets()
        if len(targets) == 1:
            return targets[0].__dict__
        return {name: value for target in reversed(targets) for name, value in vars(target).items()}

    def _targets(self) -> list[ModuleType]:
        package, _, old = self.__name__.partition(".")
        return [importlib.import_module(f"{package}.{new}") for new in MOVED[old].split()]

    def _holder(self, name: str) -> ModuleType:
        """Return the target that defines the attribute, else one that has it, else the first."""
        targets = self._targets()
        holders = [target for target in targets if hasattr(target, name)] or targets[:1]
        owners = [t for t in holders if getattr(getattr(t, name, None), "__module__", None) == t.__name__]
        return (owners or holders)[0]

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") and name.endswith("__"):  # the import system looks for __spec__ and the like
            raise AttributeError(name)
        target = self._holder(name)
        value = getattr(target, name)
        text = f"{self.__name__} has moved: import {name} from {target.__name__}"
        warnings.warn(text, DeprecationWarning, stacklevel=2)
        return value

    def __setattr__(self, name: str, value: Any) -> None:
        if name.startswith("__") and name.endswith("__"):
            super().__setattr__(name, value)
        else:
            setattr(self._holder(name), name, value)

    def __delattr__(self, name: str) -> None:
        delattr(self._holder(name), name)

    def __dir__(self) -> list[str]:
        return sorted({name for target in self._targets() for name in dir(target)})


def install(package: str) -> None:
    """Register every old path below ``package``. Imports nothing: a target is imported when it is first used.

    The stand-ins go straight into ``sys.modules``, past the import system, which would otherwise overwrite functions of
    the same name: ``mpcompile.audit`` stays the function, and ``from mpcompile.audit import audit`` works.
    """
    for old in MOVED:
        sys.modules.setdefault(f"{package}.{old}", _Moved(f"{package}.{old}"))


def attribute(name: str) -> ModuleType:
    """Return ``mpcompile.NAME`` for a module that has moved; this is the package's ``__getattr__``."""
    if name in MOVED:
        return sys.modules[f"mpcompile.{name}"]
    raise AttributeError(f"module 'mpcompile' has no attribute {name!r}")


def renamed(module: str, names: Mapping[str, str]) -> Callable[[str], Any]:
    """Return the ``__getattr__`` of a module whose public names changed: old ones still work, with a warning.

    Args:
        module: the ``__name__`` of the module.
        names: old name -> new path of the object, below ``mpcompile``: ``"data.loader.ImageOptions"``.
    """

    def attribute(name: str) -> Any:
        if name not in names:
            raise AttributeError(f"module {module!r} has no attribute {name!r}")
        path, _, new = names[name].rpartition(".")
        target = f"{module.partition('.')[0]}.{path}"
        text = f"{module}.{name} has a new name: use {target}.{new}"
        warnings.warn(text, DeprecationWarning, stacklevel=2)
        return getattr(importlib.import_module(target), new)

    return attribute
