"""The steps that are tried on every architecture, and what counts as right.

Outputs are compared by their largest difference, relative to the largest value of the tensor that is expected; integers
have to be equal. A lowered, saved or loaded module may differ by 1e-5, an exported program by 1e-4.
"""

from __future__ import annotations

import copy
import inspect
import random
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

import mpcompile
from mpcompile import Config, MPCompileError
from mpcompile.capture.inputs import call_for
from mpcompile.errors import printable
from mpcompile.export import dense_state, run_exported, save_onnx, save_pt2
from mpcompile.ir.module import IRModule, masked

STEPS = ("trace", "mask", "merge", "lower", "save", "pt2", "onnx", "train")
EXACT, EXPORTED = 1e-5, 1e-4
R = 2  # tokens merged per block
_DRAWS = 8  # images that the reference is tried on
_LONGEST = 300  # characters of a reason


class WrongError(Exception):
    """A step ended with another result than it should."""


def call(model: nn.Module, example: Any) -> Any:
    """Return the outputs of a model or graph for an example: a tensor, a tuple, or a mapping of keyword inputs."""
    arguments = call_for(model, example)
    return model(*arguments.args, **arguments.kwargs)


def seed() -> None:
    """Seed everything that a builder or a model draws from."""
    torch.manual_seed(0)
    random.seed(0)


def leaves(outputs: Any) -> list[Any]:
    """The tensors of outputs; a mapping that pytree does not know (``ModelOutput``) is opened by its values."""
    if isinstance(outputs, Mapping):
        return [leaf for value in outputs.values() for leaf in leaves(value)]
    found = pytree.tree_leaves(outputs)
    if len(found) == 1 and found[0] is outputs:
        return [outputs] if isinstance(outputs, Tensor) else []
    return [leaf for part in found for leaf in leaves(part)]


def difference(found: Any, expected: Any) -> float:
    """The largest relative difference of two trees of outputs; infinite if they do not have the same shapes."""
    ours, theirs = leaves(found), leaves(expected)
    if [leaf.shape for leaf in ours] != [leaf.shape for leaf in theirs]:
        return float("inf")
    return max((_relative(a, b) for a, b in zip(ours, theirs, strict=True)), default=0.0)


def _relative(found: Tensor, expected: Tensor) -> float:
    if not expected.is_floating_point() or not expected.numel():
        return 0.0 if torch.equal(found.to(expected.dtype), expected) else float("inf")
    a, b = (value.detach().double() for value in (found, expected))
    finite = b.isfinite()
    if not torch.equal(a[~finite].nan_to_num(), b[~finite].nan_to_num()):
        return float("inf")
    a, b = a[finite], b[finite]
    return float((a - b).abs().max() / b.abs().max().clamp_min(1e-9)) if len(b) else 0.0


@torch.no_grad()
def settle(model: nn.Module, example: Any) -> None:
    """Give a model with random weights parts that all matter: no zero tables or scales, and BatchNorm statistics.

    Biases are not negative, so that an activation behind the last layer does not hide everything.
    """
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        if parameter.is_floating_point() and (parameter.dim() == 1 or float(parameter.abs().max()) < 1e-3):
            parameter.add_(0.1 * torch.rand(parameter.shape, generator=generator))
    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.train()
        norm.momentum = 1.0
    try:
        if norms:
            call(model, example)
    except ValueError:
        pass  # a map of one value per channel has no statistics
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.eval()
        norm.momentum = momentum


def one_line(error: BaseException) -> str:
    """The reason that an error gives; its class is named unless it is one of mpcompile's."""
    if isinstance(error, (MPCompileError, WrongError)):
        return printable(str(error).splitlines()[0], _LONGEST)
    text = next(iter(str(error).strip().splitlines()), "")
    return printable(f"{type(error).__name__}: {text}", _LONGEST)


class Trial:
    """The steps on one model, in order; :meth:`results` yields each as it ends.

    Args:
        model: in ``eval()`` mode.
        example: the model's inputs.
        folder: for the files that are written and read back.
    """

    def __init__(self, model: nn.Module, example: Any, folder: Path) -> None:
        self.model, self.example, self.folder = model, example, folder
        self.gm: IRModule | None = None
        self.masked: Any = None  # the outputs of the masked module

    def results(self) -> Iterator[tuple[str, dict[str, Any]]]:
        """Yield (step, result): ``ok``, and what the table shows: ``text``, ``error`` or ``why``."""
        for step in STEPS:
            if step != "trace" and self.gm is None:
                return
            seed()
            yield step, self._result(getattr(self, step))

    def _result(self, step: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        result = self._tried(step)
        if "why" in result:
            result["why"] = result["why"].replace(f"{self.folder}/", "")
        return result

    def _tried(self, step: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        try:
            with torch.set_grad_enabled(step == self.train):
                result = step()
            bound = result.pop("bound", EXACT)
            if not result.get("error", 0.0) <= bound:
                raise WrongError(f"the outputs differ by {result['error']:.2g}")
            return {"ok": True, **result}
        except MPCompileError as error:
            return {"ok": False, "refused": True, "why": one_line(error)}
        except Exception as error:
            return {"ok": False, "refused": False, "why": one_line(error)}

    def trace(self) -> dict[str, Any]:
        """Mask at 2:4, and compare with the model itself, given the masked weights."""
        gm = mpcompile.transform(self.model, self.example, Config(pattern="2:4"))
        self.gm, self.masked = gm, call(gm, self.example)
        self.reference = copy.deepcopy(self.model)
        self.reference.load_state_dict(dense_state(gm), strict=False)
        return {"text": gm.plan.captured, "error": difference(self.masked, call(self.reference, self.example))}

    def mask(self) -> dict[str, Any]:
        """Count the layers that are masked."""
        assert self.gm is not None
        number, of = len(self.gm.plan.masked), len(self.gm.plan.layers)
        result = {"text": f"{number} of {of}"}
        if not number:
            reasons = sorted({str(layer.reason) for layer in self.gm.plan.layers.values()})
            raise WrongError(f"no layer is masked: {'; '.join(reasons)}")
        return result

    def merge(self) -> dict[str, Any]:
        """Merge tokens on top of the masks, and compare with the eager reference of the tests where it applies."""
        merged = mpcompile.transform(self.gm, self.example, Config(pattern="dense", tome_r=R, tome_method="tome"))
        streams = merged.plan.tokens
        streams = [streams] if streams and isinstance(streams[0], int) else streams
        if not streams:
            raise WrongError("; ".join(merged.plan.notes) or "no tokens merge")
        result = {"text": "; ".join(f"{stream[0]} to {stream[-1]}" for stream in streams)}
        pair = self._compared(merged) if len(streams) == 1 else None
        return result | ({"unchecked": True} if pair is None else {"error": difference(*pair)})

    def _compared(self, merged: IRModule) -> tuple[Any, Any] | None:
        """The outputs of the merged graph and of the reference, for images whose merging does not hang on rounding."""
        from tests.support import merging_reference

        example = self.example
        for _ in range(_DRAWS):
            try:
                expected = self._expected(merged, example)
                return None if expected is None else (call(merged, example), expected)
            except merging_reference.Undecided:
                example = pytree.tree_map(_drawn_again, example)
        return None

    def _expected(self, merged: IRModule, example: Any) -> Any:
        """The outputs of the eager reference; None if the model has not one tower of blocks, all of which merge."""
        from tests.support import merging_reference

        decision = next(
            record.decision
            for record in merged.plan.passes
            if record.name == "merge_tokens" and record.decision.get("sites")
        )
        towers = _towers(self.reference)
        if len(towers) != 1 or len(towers[0]) != len(decision["sites"]):
            return None
        arguments = call_for(self.reference, example)
        given = inspect.signature(self.reference.forward).bind(*arguments.args, **arguments.kwargs).arguments
        first, *others = given  # the reference passes the first by position
        if not isinstance(given[first], Tensor) or given[first].dim() != 4:
            return None
        named = {name: given[name] for name in others if name != "kwargs"} | given.get("kwargs", {})
        suffix = decision.get("suffix", 0)
        with torch.no_grad():
            return merging_reference.forward(
                self.reference, given[first], R, decision["prefix"], towers[0], suffix=suffix, **named
            )

    def lower(self) -> dict[str, Any]:
        """Lower for the reference engine."""
        self.lowered = mpcompile.lower(self.gm, self.example, Config(engine="reference"))
        return {"error": difference(call(self.lowered, self.example), self.masked)}

    def save(self) -> dict[str, Any]:
        """Save and load the masked module, and the lowered one."""
        errors = []
        for name in ("gm", "lowered"):
            module = getattr(self, name, None)
            if module is not None:
                path = self.folder / f"{name}.mpc"
                mpcompile.save(module, path)
                errors.append(difference(call(mpcompile.load(path), self.example), call(module, self.example)))
        return {"error": max(errors)}

    def pt2(self) -> dict[str, Any]:
        """Export for torch.export.load, with torch's operators alone."""
        path = self.folder / "model.pt2"
        save_pt2(self.gm, self.example, path, engine="dense")
        return {"error": difference(run_exported(path, "pt2", self.example), self.masked), "bound": EXPORTED}

    def onnx(self) -> dict[str, Any]:
        """Export to ONNX, and run it through onnxruntime."""
        path = self.folder / "model.onnx"
        save_onnx(self.gm, self.example, path)
        found = run_exported(path, "onnx", self.example)
        if found is None:
            return {"text": "not run"}
        return {"error": difference(found, self.masked), "bound": EXPORTED}

    def train(self) -> dict[str, Any]:
        """A step of gradient descent: removed weights stay, others move, and BatchNorm statistics follow."""
        assert self.gm is not None
        gm, text = self._training()
        before = {name: value.clone() for name, value in gm.state_dict().items()}
        removed = [(weight, ~mask, weight.detach().clone()) for weight, mask, _ in masked(gm)]
        floats = [leaf for leaf in leaves(call(gm, self.example)) if leaf.requires_grad]
        if not floats:
            raise WrongError("no output has a gradient")
        optimizer = torch.optim.SGD(gm.parameters(), lr=1e-2)
        sum((leaf * torch.randn_like(leaf)).mean() for leaf in floats).backward()
        optimizer.step()
        if any(not torch.equal(weight[out], old[out]) for weight, out, old in removed):
            raise WrongError("removed weights moved")
        if removed and all(torch.equal(weight, old) for weight, _, old in removed):
            raise WrongError("no masked weight moved")
        statistics = [name for name in before if name.endswith("running_mean")]
        after = gm.state_dict()
        fixed = [name for name in statistics if torch.equal(before[name], after[name])]
        if fixed:
            raise WrongError(f"{len(fixed)} of {len(statistics)} BatchNorm statistics stay fixed, such as {fixed[0]}")
        return {"text": text}

    def _training(self) -> tuple[IRModule, str]:
        """The masked module in ``train()``; where its graph has one mode, the model captured again in that mode."""
        try:
            return copy.deepcopy(self.gm).train(), ""
        except MPCompileError:
            model = copy.deepcopy(self.model).train()
            with torch.no_grad():
                return mpcompile.transform(model, self.example, Config(pattern="2:4")).train(), "captured in train()"


def _drawn_again(value: Any) -> Any:
    return torch.randn_like(value) if isinstance(value, Tensor) and value.is_floating_point() else value


def _towers(model: nn.Module) -> list[Any]:
    """The outermost lists of modules of one class that attend."""
    found: list[Any] = []
    inside: set[nn.Module] = set()
    for module in model.modules():
        if module not in inside and isinstance(module, (nn.ModuleList, nn.Sequential)) and len(module):
            alike = len({type(block) for block in module}) == 1
            names = [type(part).__name__.lower() for part in module[0].modules()]
            if alike and any("attention" in name or "attn" in name for name in names):
                found.append(module)
                inside |= set(module.modules())
    return found
