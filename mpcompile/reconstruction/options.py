"""Options of reconstruction. The same fields serve Python, recipes in YAML and the command line."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from mpcompile.config import only_fields
from mpcompile.errors import ConfigError
from mpcompile.io.fields import check_fields

INPUTS = ("pruned", "dense")
PRECISIONS = ("fp32", "bf16", "auto")


@dataclass(frozen=True)
class Reconstruction:
    """Options of :func:`mpcompile.reconstruct`.

    Attributes:
        minutes: time budget of the whole run, from which ``views`` and ``epochs`` follow where they are None; with
            both given it is ignored, and the result does not depend on the speed of the machine.
        views: rounds over the images: the images themselves, then random views of them.
        epochs: passes over all views in each region.
        batch: views per step, over all ranks.
        lr: peak learning rate of AdamW in a region, reached after a tenth of its steps (one-cycle).
        halves: train the attention and the MLP of a block one after the other; False trains the block as a whole.
        inputs: ``"pruned"`` trains a region on the outputs of the reconstructed regions before it, ``"dense"`` on those
            of the dense model.
        importance: 0 to 1, the share of the squared error that is weighted by how much the dense model's outputs
            depend on each token and channel; 0 weights all alike.
        mix: share of views that are mixes of two images.
        final_epochs: epochs of a last pass over the whole model, on its outputs and the outputs of all regions.
        final_lr: peak learning rate of that pass.
        final_views: rounds of new views in each epoch of that pass.
        precision: ``"fp32"``; ``"bf16"`` for autocast; ``"auto"`` for autocast where the processor multiplies bf16.
        seed: seeds every random choice.

    Raises:
        ConfigError: an unknown option or an invalid value.

    Example:
        >>> Reconstruction(views=4, epochs=3).timed
        False
    """

    minutes: float | None = 20.0
    views: int | None = None
    epochs: int | None = None
    batch: int = 20
    lr: float = 1e-3
    halves: bool = True
    inputs: str = "pruned"
    importance: float = 0.8
    mix: float = 0.3
    final_epochs: int = 0
    final_lr: float = 3e-5
    final_views: int = 1
    precision: str = "auto"
    seed: int = 0

    def __post_init__(self) -> None:
        check_fields(self, *_RANGES)
        for name, allowed in {"inputs": INPUTS, "precision": PRECISIONS}.items():
            if getattr(self, name) not in allowed:
                raise ConfigError(
                    f"option {name!r} has no such value",
                    expected=f"one of {', '.join(allowed)}",
                    found=getattr(self, name),
                )
        if self.minutes is None and self.timed:
            raise ConfigError(
                "the length of a reconstruction is open",
                expected="minutes, or both views and epochs",
                found=f"minutes=None, views={self.views}, epochs={self.epochs}",
            )

    @property
    def timed(self) -> bool:
        """True if the number of views or epochs follows from the time budget."""
        return self.views is None or self.epochs is None

    @classmethod
    def from_options(cls, options: Mapping[str, Any] | None, base: Reconstruction | None = None) -> Reconstruction:
        """Return the options in a mapping, such as a recipe's ``reconstruct``; the rest come from ``base``.

        Raises:
            ConfigError: an unknown option (the message lists the valid ones), or an invalid value.
        """
        only_fields(cls, options or {}, "reconstruction has no option")
        return dataclasses.replace(base or cls(), **dict(options or {}))

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as plain JSON values."""
        return dataclasses.asdict(self)


_RANGES: tuple[tuple[str, float, float], ...] = (
    ("minutes", 0, math.inf),
    ("views", 1, math.inf),
    ("epochs", 1, math.inf),
    ("batch", 1, math.inf),
    ("lr", 0, math.inf),
    ("importance", 0, 1),
    ("mix", 0, 1),
    ("final_epochs", 0, math.inf),
    ("final_lr", 0, math.inf),
    ("final_views", 1, math.inf),
    ("seed", 0, 2**63 - 1),
)
