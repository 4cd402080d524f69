"""Verification: which weights are legal N:M, and where the others violate it, judged by values, not by metadata."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from tabulate import tabulate
from torch import Tensor, nn

from mpcompile.errors import ArtifactError, printable
from mpcompile.ir.module import IRModule
from mpcompile.kernels.nm_format import Pattern, check_nm, to_rows

_GROUPS = (4, 8, 12, 16, 32)
_TENSORRT = Pattern(2, 4)


@dataclass
class Verdict:
    """The result for one weight.

    Attributes:
        shape: (out, in) or (out, in / groups, kh, kw).
        zeros: share of exact zeros.
        legal: the patterns that the weight meets, sparsest first: for every M of 4, 8, 12, 16 and 32 that divides its
            inputs, the smallest N, if that is below M.
        pattern: the required pattern: the one asked for, else that of the layer's mask; None without either.
        groups: number of groups of that pattern in the weight; 0 if M does not divide the inputs.
        bad: groups with more than N nonzeros.
        first: where the first bad group starts: output row, input channel, and kernel tap of a convolution.
        tensorrt: True if TensorRT treats it as 2:4: at most 2 nonzeros in every 4 input channels, at every tap.
        note: further remarks.
    """

    shape: tuple[int, ...]
    zeros: float
    legal: list[str] = field(default_factory=list)
    pattern: str | None = None
    groups: int = 0
    bad: int = 0
    first: dict[str, Any] | None = None
    tensorrt: bool = False
    note: str = ""

    @property
    def ok(self) -> bool:
        """True if the weight meets its required pattern, or has none."""
        return self.pattern is None or (self.groups > 0 and self.bad == 0)


@dataclass
class Verification:
    """Verdicts by weight name."""

    verdicts: dict[str, Verdict]

    @property
    def ok(self) -> bool:
        """True if every weight with a required pattern meets it."""
        return all(v.ok for v in self.verdicts.values())

    def to_json(self, indent: int | None = None) -> str:
        """Return all verdicts as JSON."""
        return json.dumps({name: {**asdict(v), "ok": v.ok} for name, v in self.verdicts.items()}, indent=indent)

    def __str__(self) -> str:
        rows = []
        for name, v in self.verdicts.items():
            met = "" if v.pattern is None else f"{v.pattern}: " + ("yes" if v.ok else f"{v.bad} of {v.groups} bad")
            where = "" if v.first is None else ", ".join(f"{k} {p}" for k, p in v.first.items())
            shape = "x".join(map(str, v.shape))
            legal = " ".join(v.legal) or "none"
            tensorrt = "yes" if v.tensorrt else "no"
            rows.append([printable(name, 200), shape, f"{v.zeros:.1%}", legal, met, where, tensorrt, v.note])
        head = ["weight", "shape", "zeros", "legal", "required", "first bad group", "TensorRT 2:4", "note"]
        required = [v for v in self.verdicts.values() if v.pattern is not None]
        good, sparse = sum(v.ok for v in required), sum(bool(v.legal) for v in self.verdicts.values())
        text = f"{len(self.verdicts)} weights, {sparse} legal under some N:M"
        if required:
            text += f"; {good} of {len(required)} meet their required pattern"
        text += f"; TensorRT accepts {sum(v.tensorrt for v in self.verdicts.values())} as 2:4"
        return f"{tabulate(rows, headers=head, disable_numparse=True)}\n\n{text}"


def _first_bad(weight: Tensor, pattern: Pattern) -> dict[str, Any]:
    """Return where the first group with too many nonzeros starts."""
    counts = (to_rows(weight) != 0).unflatten(-1, (-1, pattern.m)).sum(-1)
    row, group = (int(i) for i in (counts > pattern.n).nonzero()[0])
    column = group * pattern.m
    if weight.dim() == 2:
        return {"row": row, "channel": column}
    _, cin, _, kw = weight.shape
    tap, channel = divmod(column, cin)
    return {"row": row, "channel": channel, "tap": [tap // kw, tap % kw]}


def inspect(weight: Tensor, pattern: Pattern | None = None) -> Verdict:
    """Return the verdict on one weight.

    Args:
        weight: (out, in) or (out, in / groups, kh, kw).
        pattern: the required pattern, if any.

    Example:
        >>> inspect(torch.tensor([[1.0, 0.0, 2.0, 0.0]]), Pattern(2, 4)).ok
        True
        >>> inspect(torch.tensor([[1.0, 3.0, 2.0, 0.0]]), Pattern(2, 4)).first
        {'row': 0, 'channel': 0}
    """
    weight = weight.detach()
    cin = weight.shape[1]
    verdict = Verdict(tuple(weight.shape), float((weight == 0).double().mean()))
    nonzero = to_rows(weight) != 0
    for m in _GROUPS:
        if cin % m == 0:
            n = max(1, int(nonzero.unflatten(-1, (-1, m)).sum(-1).max()))
            if n < m:
                verdict.legal.append(f"{n}:{m}")
    verdict.legal.sort(key=lambda text: Pattern.parse(text).density)
    verdict.tensorrt = cin % _TENSORRT.m == 0 and check_nm(weight, *_TENSORRT) == 0
    flat = weight.flatten(1)
    if weight.dim() == 4 and not verdict.tensorrt and flat.shape[1] % 4 == 0 and check_nm(flat, *_TENSORRT) == 0:
        verdict.note = "2:4 along kernel taps only, not along input channels"
    if pattern is not None:
        verdict.pattern = str(pattern)
        if cin % pattern.m:
            verdict.note = f"{cin} inputs are not divisible by {pattern.m}"
            return verdict
        verdict.groups = nonzero.numel() // pattern.m
        verdict.bad = check_nm(weight, *pattern)
        if verdict.bad:
            verdict.first = _first_bad(weight, pattern)
    return verdict


def verify(source: Mapping[str, Tensor] | nn.Module, pattern: Pattern | str | None = None) -> Verification:
    """Check every linear and convolution weight of a state dict or a model.

    Args:
        source: a state dict, or a module; masked layers of a transformed module must meet their own pattern.
        pattern: the pattern that all weights must meet instead; None requires only the masked layers' own.

    Raises:
        ConfigError: ``pattern`` is not a pattern.
        ArtifactError: the source has no weight to check.

    Example:
        >>> verify({"fc.weight": torch.tensor([[1.0, 0.0, 2.0, 0.0]])}, "2:4").ok
        True
    """
    if isinstance(pattern, str):
        pattern = Pattern.parse(pattern)
    own: dict[str, Pattern] = {}
    if isinstance(source, nn.Module):
        for name, module in source.named_modules():
            masking = getattr(module, "pattern", None)
            if isinstance(masking, Pattern):
                own[f"{name}.weight"] = masking
        source = source.state_dict()
    verdicts = {}
    for name, tensor in source.items():
        if tensor.dim() not in (2, 4) or not tensor.is_floating_point() or tensor.numel() == 0:
            continue
        if name.startswith("packed."):
            continue
        verdicts[name] = inspect(tensor, pattern or own.get(name))
    if not verdicts:
        raise ArtifactError("there is no weight to verify", expected="floating-point tensors with 2 or 4 axes")
    return Verification(verdicts)


def read(path: Path) -> Mapping[str, Tensor] | IRModule:
    """Read a file or folder of :func:`mpcompile.save`, or a checkpoint: safetensors, or a torch file of tensors.

    Raises:
        ArtifactError: the file is missing or cannot be read.
    """
    from mpcompile.artifact.loading import load
    from mpcompile.io.checkpoints import is_artifact, read_checkpoint

    return load(path) if is_artifact(path) else read_checkpoint(path)
