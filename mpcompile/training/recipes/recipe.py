"""Recipes: a model, its compilation, data and training in one YAML file, from a row of the paper or your own."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypedDict

from torch import Tensor, nn

from mpcompile.config import CALIBRATIONS, Config, only_fields
from mpcompile.data.loader import ImageOptions
from mpcompile.errors import ConfigError
from mpcompile.io.fields import check_fields, check_type
from mpcompile.io.reading import read_text
from mpcompile.io.schema import Mismatch, check
from mpcompile.io.yaml_options import LARGEST, parse
from mpcompile.ir.module import IRModule
from mpcompile.passes.reconstruct.api import reconstruct
from mpcompile.pipeline import transform
from mpcompile.reconstruction.options import Reconstruction
from mpcompile.training.options import Training

FOLDER = Path(__file__).parent
_PARTS = ("compile", "train", "data", "calibration", "reconstruct")


@dataclass(frozen=True)
class Calibration:
    """Calibration of masks and channel orders.

    Attributes:
        images: number of training images.
        batch: images per batch.
        calibrate: option of :func:`mpcompile.transform`.

    Raises:
        ConfigError: an invalid value.
    """

    images: int = 256
    batch: int = 32
    calibrate: str = "pruned_to_dense"

    def __post_init__(self) -> None:
        check_fields(self, ("images", 1, math.inf), ("batch", 1, math.inf))
        if self.calibrate not in CALIBRATIONS:
            raise ConfigError(
                "option 'calibrate' has no such value",
                expected=f"one of {', '.join(CALIBRATIONS)}",
                found=self.calibrate,
            )


class _Described(TypedDict):
    macs: Mapping[str, float]
    source: str


@dataclass(frozen=True)
class Recipe:
    """The steps from a dense model to a distilled one.

    Attributes:
        name: name of the recipe.
        model: timm's name of the model, with the tag of its weights.
        compile: options of :func:`mpcompile.transform`.
        train: options of :func:`mpcompile.distill`.
        data: options for reading and augmenting images.
        calibration: calibration of masks and channel orders, and the images of a reconstruction.
        reconstruct: options of :func:`mpcompile.reconstruct`, which runs before the training, with the seed of
            ``train`` unless another one is given; None for none.
        prior_weight: weight of the source mask with ``score="ser"``.
        macs: expected multiply-accumulates: ``dense`` in G, ``executed`` and ``paper`` as percent saved.
        source: origin of the recipe, and the choices made where sources disagree.

    Raises:
        ConfigError: an option of the wrong type or out of range, or options that exclude each other.

    Example:
        >>> recipe = Recipe.load("deit_tiny_2of4_tome8")
        >>> recipe.compile.pattern, recipe.train.epochs
        ('2:4', 3)
    """

    name: str
    model: str
    compile: Config = field(default_factory=Config)
    train: Training = field(default_factory=Training)
    data: ImageOptions = field(default_factory=ImageOptions)
    calibration: Calibration = field(default_factory=Calibration)
    reconstruct: Reconstruction | None = None
    prior_weight: float = 0.1
    macs: Mapping[str, float] = field(default_factory=dict)
    source: str = ""

    def __post_init__(self) -> None:
        check_type("prior_weight", "float", self.prior_weight)
        try:
            check({"macs": self.macs, "source": self.source}, _Described)
        except Mismatch as error:
            raise ConfigError(
                f"option {error.where!r} has the wrong type", expected=error.expected, found=error.found
            ) from error
        if not 0 <= self.prior_weight < math.inf:
            raise ConfigError("option 'prior_weight' is out of range", expected="0 or more", found=self.prior_weight)
        if self.data.mix and self.train.alpha < 1:
            raise ConfigError(
                "data.mix mixes images, which their labels then do not describe",
                expected="train.alpha=1 with data.mix, which uses no labels",
                found=f"train.alpha={self.train.alpha:g}",
            )
        for option, value, off in (("augment", self.data.augment, "false"), ("mix", self.data.mix, "0")):
            if self.train.cache and value:
                raise ConfigError(
                    f"train.cache stores one row of logits per image, but data.{option} changes it in every epoch",
                    expected=f"data.{option}={off} with train.cache=true",
                    found=f"data.{option}={str(value).lower()}",
                )

    @staticmethod
    def names() -> list[str]:
        """Return the names of the recipes that come with mpcompile."""
        return sorted(path.stem for path in FOLDER.glob("*.yaml"))

    @classmethod
    def load(cls, name: str | Path, changes: Sequence[str] = ()) -> Recipe:
        """Load a recipe by name, or from a YAML file.

        Args:
            name: one of :meth:`names`, or a path that ends in ``.yaml`` or ``.yml``.
            changes: ``"part.option=value"``, values as in YAML, such as ``"train.lr=3e-4"``.

        Raises:
            ConfigError: the recipe does not exist, is not YAML, or has an unknown option or an invalid value.
        """
        path = Path(name) if Path(name).suffix in (".yaml", ".yml") else FOLDER / f"{name}.yaml"
        if not path.exists():
            raise ConfigError(
                f"there is no recipe {str(name)!r}", expected=f"a YAML file, or one of {', '.join(cls.names())}"
            )
        try:
            values = parse(read_text(path, LARGEST), path)
        except OSError as error:
            found = error.strerror or str(error)
            raise ConfigError(f"{path} cannot be read", expected="a YAML file", found=found) from error
        if not isinstance(values, dict):
            raise ConfigError(f"{path} holds no recipe", expected="keys such as model and compile", found=type(values))
        return cls.from_dict({"name": path.stem, **values}, changes)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], changes: Sequence[str] = ()) -> Recipe:
        """Return a recipe from plain values.

        Raises:
            ConfigError: an unknown option, or an invalid value.
        """
        values = {key: dict(value) if isinstance(value, Mapping) else value for key, value in values.items()}
        for change in changes:
            _change(values, change)
        only_fields(cls, values, "a recipe has no part")
        for key in ("name", "model"):
            if not isinstance(values.get(key), str):
                raise ConfigError(f"the recipe names no {key}", expected=f"{key}: NAME", found=values.get(key))
        values = {key: value for key, value in values.items() if key != "reconstruct" or value is not None}
        for part in _PARTS:
            if not isinstance(values.get(part, {}), Mapping):
                raise ConfigError(f"{part} has the wrong type", expected="options by name", found=values[part])
        only_fields(Calibration, values.get("calibration", {}), "calibration has no option")
        train = Training.from_options(values.get("train"))
        if "reconstruct" in values:
            options = {"seed": train.seed, **values["reconstruct"]}
            values["reconstruct"] = Reconstruction.from_options(options)
        return cls(
            **{
                **values,
                "compile": Config.from_options(values.get("compile")),
                "train": train,
                "data": ImageOptions.from_options(values.get("data")),
                "calibration": Calibration(**values.get("calibration", {})),
            }
        )

    def student(self, teacher: nn.Module, calibration: Iterable[Tensor]) -> IRModule:
        """Return the student before training: the teacher, masked and with merged tokens as the recipe says.

        Args:
            teacher: the dense model.
            calibration: batches of images, readable more than once.

        Raises:
            MPCompileError: as :func:`mpcompile.transform`.
        """
        how = {"prior_weight": self.prior_weight, "calibrate": self.calibration.calibrate, "seed": self.train.seed}
        return transform(teacher, None, self.compile, calibration, **how)  # type: ignore[arg-type]

    def reconstructed(
        self, student: IRModule, teacher: nn.Module, calibration: Iterable[Tensor], folder: Path | None = None
    ) -> IRModule:
        """Return the student with its blocks reconstructed, if the recipe says so, else the student itself.

        Args:
            student: from :meth:`student`, or loaded.
            teacher: the dense model.
            calibration: batches of images, the same on every rank.
            folder: keeps finished blocks, so that an interrupted reconstruction can resume.

        Raises:
            MPCompileError: as :func:`mpcompile.reconstruct`.
        """
        if self.reconstruct is None:
            return student
        return reconstruct(student, teacher, calibration, options=self.reconstruct, folder=folder)

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values, from which :meth:`from_dict` restores the recipe."""
        values = {**dataclasses.asdict(self), "compile": self.compile.to_dict(), "macs": dict(self.macs)}
        return {key: value for key, value in values.items() if key != "reconstruct" or value is not None}


def _change(values: dict[str, Any], change: str) -> None:
    path, equals, text = change.partition("=")
    *parts, last = path.split(".")
    if not equals or len(parts) > 1 or not last:
        raise ConfigError("a change has the wrong form", expected="part.option=value", found=change)
    target = values
    for part in parts:
        target = target.setdefault(part, {})
        if not isinstance(target, dict):
            raise ConfigError(
                "a change names no part of the recipe", expected=f"one of {', '.join(_PARTS)}", found=part
            )
    target[last] = parse(text, f"the value in {change!r}")
