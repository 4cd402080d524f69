"""Recipes: what a build changes in the model, apart from the runtime and the precision that it runs in."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from mpcompile.config import Config


@dataclass(frozen=True)
class Recipe:
    """Tokens merged per block, and patterns of layers. An empty one is the dense model without dead tokens.

    Attributes:
        merges: tokens to merge in each attention block; empty if none merge.
        patterns: layer -> ``"N:M"``, in graph order; layers that are missing stay dense.
        rebuilt: minutes of reconstruction behind masking; 0 for none.

    Example:
        >>> str(Recipe((8, 8), (("fc", "8:16"),)))
        '16 tokens merged, 1 layer 8:16'
        >>> Recipe((), (("fc", "8:16"),)).config(Config()).layer_patterns
        ('fc=8:16', '*=dense')
    """

    merges: tuple[int, ...] = ()
    patterns: tuple[tuple[str, str], ...] = ()
    rebuilt: float = 0.0

    @property
    def masked(self) -> bool:
        """True if a layer is masked."""
        return bool(self.patterns)

    def config(self, base: Config) -> Config:
        """Return the options of :func:`mpcompile.transform` that carry the recipe out.

        Args:
            base: the options that recipes leave alone: score, exclude, outputs, ...
        """
        changes: dict[str, Any] = {
            "tome_r": self.merges if any(self.merges) else 0,
            "tome_reduction": None,
            "tome_schedule": "auto",
            "mac_reduction": None,
            "patterns": (),
            "layer_patterns": (),
            "pattern": "dense",
        }
        if self.patterns:
            common = Counter(pattern for _, pattern in self.patterns).most_common(1)[0][0]
            named = tuple(f"{layer}={pattern}" for layer, pattern in self.patterns)
            changes |= {"pattern": common, "layer_patterns": (*named, "*=dense")}
        return dataclasses.replace(base, **changes)

    def record(self) -> dict[str, Any]:
        """Return the fields as JSON values; :meth:`read` takes them back."""
        return {"merges": list(self.merges), "patterns": dict(self.patterns), "rebuilt": self.rebuilt}

    @classmethod
    def read(cls, values: Mapping[str, Any]) -> Recipe:
        """Return the recipe that :meth:`record` wrote."""
        return cls(tuple(values["merges"]), tuple(values["patterns"].items()), float(values.get("rebuilt", 0)))

    def __str__(self) -> str:
        parts = [f"{sum(self.merges)} tokens merged"] if any(self.merges) else []
        for pattern, count in sorted(Counter(pattern for _, pattern in self.patterns).items(), reverse=True):
            parts.append(f"{count} layer{'s' if count != 1 else ''} {pattern}")
        if self.rebuilt:
            parts.append("reconstructed")
        return ", ".join(parts) or "dense"
