"""Config: the options of the compiler. Python, ``options={}`` and the command line share the same fields."""

from __future__ import annotations

import dataclasses
import difflib
import fnmatch
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mpcompile.errors import ConfigError
from mpcompile.kernels.dispatch import auto_menu, auto_pattern
from mpcompile.kernels.nm_format import Pattern, group_axis

SCORES = ("magnitude", "wanda", "covariance", "obs", "ser")
_WITHOUT_DATA = frozenset({"magnitude"})  # scores computed from the weights alone
# Values of the argument calibrate of mpcompile.transform.
CALIBRATIONS = ("pruned_to_dense", "adapted", "pruned", "dense")
_GPU_ENGINES = ("gluon_wgmma_sp", "gluon_mma_sp", "cusparselt", "triton_expand")
ENGINES = ("auto", "cpu", "cpu_dense", *_GPU_ENGINES, "reference", "dense")
SCHEDULES = ("auto", "constant", "linear", "parabolic")
METHODS = ("tome", "saliency")
ROLES = ("stem", "head", "depthwise")

_WORDS = (str,)
_TYPES: dict[str, tuple[type, ...]] = {
    "pattern": _WORDS,
    "mac_reduction": (float, type(None)),
    "patterns": (tuple,),
    "tome_r": (int, str, tuple),
    "layer_patterns": (tuple,),
    "tome_method": _WORDS,
    "tome_schedule": _WORDS,
    "tome_reduction": (float, type(None)),
    "tome_proportional": (bool,),
    "score": _WORDS,
    "permute": (bool, type(None)),
    "restore": (bool,),
    "engine": _WORDS,
    "exclude": (tuple,),
    "include": (tuple,),
    "prefix_tokens": (int, type(None)),
    "frozen": (bool,),
    "outputs": (tuple,),
    "skip_dead_tokens": (bool,),
}


def only_fields(cls: type, options: Mapping[str, Any], complaint: str) -> None:
    """Check that every option is a field of a dataclass.

    Raises:
        ConfigError: one is not. The message consists of ``complaint``, the option, the valid names and the closest one.
    """
    valid = [f.name for f in dataclasses.fields(cls)]
    for key in options:
        if key not in valid:
            near = difflib.get_close_matches(str(key), valid, n=1)
            raise ConfigError(
                f"{complaint} {key!r}",
                expected=f"one of {', '.join(valid)}",
                hint=f"did you mean {near[0]!r}?" if near else None,
            )


@dataclass(frozen=True)
class Config:
    """Options of :func:`mpcompile.transform` and of the ``mpsparse`` backend.

    Attributes:
        pattern: ``"N:M"`` keeps N of every M consecutive input values (1 <= N <= M <= 32), ``"dense"`` masks nothing,
            and ``"auto"`` keeps half, in the widest groups that the device's engines run at full speed and that divide
            the layer's inputs (on CPUs 8:16, 4:8 or 2:4).
        mac_reduction: the share of the model's multiply-accumulates to save by masks, between 0 and 1. If given, each
            layer gets its own pattern from ``patterns``, and ``pattern`` is ignored. Merging tokens saves more on top.
        patterns: with ``mac_reduction``, the patterns that a layer may get: ``"N:M"`` and ``"dense"``. Empty: those
            that the device's engines run well (on CPUs 12:16 to 4:16, in narrower groups where 16 does not divide the
            layer's inputs; on CUDA 2:4), or dense.
        tome_r: number of tokens merged per attention block (ToMe); 0 merges none. A list gives one number per block.
            ``"auto"`` finds the numbers that save ``tome_reduction``.
        tome_schedule: ``"constant"``; ``"linear"``, from 2 * tome_r in the first block down to 0 in the last; or
            ``"parabolic"``, most in the middle blocks and 0 in the last. ``"auto"`` is constant for a number. With
            ``tome_r="auto"``, it is the schedule whose outputs diverge least from those of the dense model, if there
            are at least 32 calibration images, and else one that merges most behind the middle.
        tome_reduction: with ``tome_r="auto"``, the share of multiply-accumulates to save by tokens alone, dead ones
            included, between 0 and 1.
        tome_proportional: weight a merged token in attention by the number of tokens it represents. Without training,
            some models (those pretrained as masked autoencoders) keep more accuracy if this is off.
        score: which values a group keeps: ``"magnitude"`` the largest; ``"wanda"`` the largest products of value and
            input norm; ``"covariance"`` the set whose complement can be removed with the smallest error of the output;
            ``"obs"`` (optimal brain surgeon) likewise, with the remaining values of the row adjusted to compensate;
            ``"ser"`` like ``"covariance"``, but drawn towards a source mask, for which it prunes, trains the removed
            values for a short while, and restores those that moved furthest. All but the first need calibration data;
            without any, they fall back to magnitude, with a note in the Plan.
        permute: reorder channels, by reordering the weights, so that the masks keep more energy; None does so only if
            there is calibration data.
        restore: with calibration data, refit kept values by least squares, and swap kept for removed ones where that
            lowers the error. (BatchNorm statistics are re-estimated in any case.)
        engine: the engine of masked layers: ``"cpu"`` (native kernels on packed weights); on CUDA
            ``"gluon_wgmma_sp"``, ``"gluon_mma_sp"``, ``"cusparselt"`` (2:4 on sparse tensor cores) and
            ``"triton_expand"`` (any N:M, expanded in registers); ``"reference"`` (packed values + bitmask, plain
            torch), ``"dense"`` (masked weight, torch's dense GEMM), ``"cpu_dense"`` (the same on the CPU engine's
            kernel), ``"auto"`` (the fastest, as timed on this machine). Frozen dense layers run on that kernel, too,
            where it is the fastest; not with the engines for GPUs, ``"reference"`` and ``"dense"``.
        exclude: layers that stay dense: the roles ``"stem"`` (the layer that reads the image), ``"head"`` (a layer
            whose values are an output) and ``"depthwise"``, layer names, or globs such as ``"*.downsample.*"``. A
            value given here replaces the default.
        include: layer names or globs that are masked although ``exclude`` names them. A layer named here without a
            wildcard that cannot be masked is an error.
        prefix_tokens: number of class, distillation and register tokens at the front of the sequence, which never
            merge; None finds it in the graph.
        frozen: promise that weights do not change after compilation: BatchNorm is folded into convolutions, Inductor
            folds constants and prepacks dense weights, and no call checks for changed weights.
        outputs: names or globs of the outputs that are needed, such as ``"logits"`` or ``"*_embeds"``. The others are
            None in what the model returns, and nothing is computed for them. Empty: all.
        skip_dead_tokens: compute only the tokens that something reads: behind the last attention, usually the class
            token alone. The outputs are the same.
        tome_method: which tokens merge: ``"tome"`` pairs them by the similarity of their keys alone (Bolya et al.);
            ``"saliency"`` by the similarity of the tokens, spares those that the class token attends to and those that
            represent many input tokens, and keeps the norms of tokens (docs/token_merging.md).
        layer_patterns: patterns of single layers, such as ``("blocks.0.*=dense", "*.mlp.fc1=8:16")``: a layer name or
            glob, and its pattern; the first that matches counts, and ``pattern`` is for the layers that none matches.
            :func:`mpcompile.optimize` finds them.

    Raises:
        ConfigError: an unknown option, or a value that an option does not accept.

    Example:
        >>> Config(pattern="8:16", tome_r=8).pattern
        '8:16'
        >>> Config(layer_patterns=["blocks.*.attn.qkv=dense"]).named_pattern("blocks.3.attn.qkv")
        'dense'
    """

    pattern: str = "2:4"
    mac_reduction: float | None = None
    patterns: tuple[str, ...] = ()
    tome_r: int | str | tuple[int, ...] = 0
    tome_schedule: str = "auto"
    tome_reduction: float | None = None
    tome_proportional: bool = True
    score: str = "obs"
    permute: bool | None = None
    restore: bool = True
    engine: str = "auto"
    exclude: tuple[str, ...] = ROLES
    include: tuple[str, ...] = ()
    prefix_tokens: int | None = None
    frozen: bool = False
    outputs: tuple[str, ...] = ()
    skip_dead_tokens: bool = True
    tome_method: str = "saliency"
    layer_patterns: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for name in ("exclude", "include", "patterns", "outputs", "layer_patterns"):
            value = getattr(self, name)
            if isinstance(value, str):
                value = (value,)
            if isinstance(value, (list, tuple)) and all(isinstance(v, str) for v in value):
                object.__setattr__(self, name, tuple(value))
        if isinstance(self.tome_r, list):
            object.__setattr__(self, "tome_r", tuple(self.tome_r))
        for name, types in _TYPES.items():
            value = getattr(self, name)
            words = name == "tome_r" or not isinstance(value, tuple) or all(isinstance(v, str) for v in value)
            if not words or not isinstance(value, types) or (isinstance(value, bool) and bool not in types):
                wanted = " or ".join("None" if t is type(None) else t.__name__ for t in types)
                raise ConfigError(f"option {name!r} has the wrong type", expected=wanted, found=repr(value))
        if self.pattern not in ("dense", "auto"):
            Pattern.parse(self.pattern)
        named = {"score": SCORES, "engine": ENGINES, "tome_method": METHODS, "tome_schedule": SCHEDULES}
        for name, allowed in named.items():
            if getattr(self, name) not in allowed:
                raise ConfigError(
                    f"option {name!r} has no such value",
                    expected=f"one of {', '.join(allowed)}",
                    found=repr(getattr(self, name)),
                )
        if self.prefix_tokens is not None and self.prefix_tokens < 0:
            raise ConfigError("option 'prefix_tokens' is negative", expected="0 or more", found=self.prefix_tokens)
        self._check_merging()
        self._check_allocation()

    def _check_allocation(self) -> None:
        share = self.mac_reduction
        if share is not None and not 0 < share < 1:
            raise ConfigError("option 'mac_reduction' is not a share", expected="a number between 0 and 1", found=share)
        if share is not None and self.pattern == "dense":
            raise ConfigError(
                "pattern='dense' masks nothing, so it saves no MACs",
                expected="mac_reduction=None with it",
                found=share,
            )
        if self.patterns and share is None:
            raise ConfigError(
                "option 'patterns' is only for mac_reduction",
                expected="mac_reduction, a share between 0 and 1",
                found="None",
                hint="for one pattern everywhere, give pattern='N:M'",
            )
        for text in self.patterns:
            if text != "dense":
                Pattern.parse(text)
        if self.patterns and not any(text != "dense" for text in self.patterns):
            raise ConfigError("option 'patterns' allows only dense layers", expected="at least one 'N:M' in it")

        self._check_layer_patterns()

    def _check_layer_patterns(self) -> None:
        for text in self.layer_patterns:
            name, _, pattern = text.rpartition("=")
            if not name:
                raise ConfigError(
                    "option 'layer_patterns' is malformed", expected="LAYER=N:M or LAYER=dense", found=repr(text)
                )
            if pattern != "dense":
                Pattern.parse(pattern)
        if self.layer_patterns and (self.pattern == "dense" or self.mac_reduction is not None):
            found = "pattern='dense'" if self.pattern == "dense" else f"mac_reduction={self.mac_reduction}"
            raise ConfigError(
                "option 'layer_patterns' refines one pattern",
                expected="pattern='N:M', for the layers that it does not name, and no mac_reduction",
                found=found,
                hint="layer_patterns=(..., '*=dense') leaves all other layers dense",
            )

    def _check_merging(self) -> None:
        r, reduction = self.tome_r, self.tome_reduction
        numbers = () if isinstance(r, str) else (r,) if isinstance(r, int) else r
        if (isinstance(r, str) and r != "auto") or not all(type(number) is int for number in numbers):
            raise ConfigError(
                "option 'tome_r' has no such value", expected="a number, a list of numbers, or 'auto'", found=repr(r)
            )
        if any(number < 0 for number in numbers):
            raise ConfigError("option 'tome_r' is negative", expected="0 or more", found=r)
        if (r == "auto") != (reduction is not None) or (reduction is not None and not 0 < reduction < 1):
            raise ConfigError(
                "options tome_r='auto' and 'tome_reduction' go together",
                expected="a share between 0 and 1 with tome_r='auto', and None otherwise",
                found=f"{reduction} with tome_r={r!r}",
                hint="Config(tome_r='auto', tome_reduction=0.25) saves a quarter of the multiply-accumulates",
            )
        if isinstance(r, tuple) and self.tome_schedule == "linear":
            raise ConfigError(
                "a list of tome_r is a schedule already", expected="tome_schedule='auto'", found=self.tome_schedule
            )

    @property
    def needs_data(self) -> bool:
        """True if the score uses calibration data; without any it falls back to magnitude."""
        return self.score not in _WITHOUT_DATA

    @property
    def reads_again(self) -> bool:
        """True if choices are compared on the calibration data, which is then read more often than by the score."""
        return self.mac_reduction is not None or (self.tome_r == "auto" and self.tome_schedule == "auto")

    def choices(self, device: torch.device, dtype: torch.dtype = torch.float32) -> tuple[Pattern, ...]:
        """Return the patterns that a layer may get on ``device`` in ``dtype``, best first; none for ``"dense"``."""
        if self.mac_reduction is not None:
            named = tuple(Pattern.parse(text) for text in self.patterns if text != "dense")
            return named or auto_menu(device, dtype)
        if self.pattern == "dense":
            return ()
        return auto_pattern(device, dtype) if self.pattern == "auto" else (Pattern.parse(self.pattern),)

    def menu(self, weight: Tensor) -> tuple[Pattern, ...]:
        """Return the patterns that a weight (out, in, ...) may get with ``mac_reduction``, densest first.

        Of the device's default menu, these are only the patterns with the widest groups that divide the weight's
        inputs.
        """
        k = group_axis(weight.shape)
        fits = [p for p in dict.fromkeys(self.choices(weight.device, weight.dtype)) if k % p.m == 0]
        if not self.patterns and fits:
            widest = max(p.m for p in fits)
            fits = [p for p in fits if p.m == widest]
        return tuple(sorted(fits, key=lambda p: (-p.density, -p.m)))

    def pattern_for(self, weight: Tensor) -> Pattern | None:
        """Return the pattern of a weight (out, in, ...), or None if no group divides its inputs."""
        k = group_axis(weight.shape)
        return next((p for p in self.choices(weight.device, weight.dtype) if k % p.m == 0), None)

    def named_pattern(self, layer: str) -> str | None:
        """Return the pattern that ``layer_patterns`` gives a layer, or None if none matches."""
        pairs = (text.rpartition("=") for text in self.layer_patterns)
        return next((pattern for glob, _, pattern in pairs if fnmatch.fnmatchcase(layer, glob)), None)

    @classmethod
    def from_options(cls, options: Mapping[str, Any] | None) -> Config:
        """Build a Config from a mapping such as ``torch.compile``'s ``options``.

        Raises:
            ConfigError: an unknown key; the message lists the valid ones.
        """
        if options is not None and not isinstance(options, Mapping):
            raise ConfigError("options are not a mapping", expected="a dict of option names", found=repr(options))
        options = dict(options or {})
        only_fields(cls, options, "unknown option")
        return cls(**options)

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as plain JSON values; :meth:`from_options` accepts them."""
        return {k: list(v) if isinstance(v, tuple) else v for k, v in dataclasses.asdict(self).items()}
