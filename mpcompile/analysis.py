"""Analysis."""

from __future__ import annotations

import re
from typing import Any

from torch import Tensor

from mpcompile import rmt

_ORDER = {"mp": 0, "low_confidence": 1, "not_mp": 2}
_QKV = re.compile(r"qkv|in_proj")


def study(name: str, weight: Tensor) -> dict[str, Any]:
    parts = 3 if _QKV.search(name) and weight.dim() == 2 and weight.shape[0] == 3 * weight.shape[1] else 1
    fits = rmt.fit_qkv(weight, parts)
    energy = [float(w.double().square().sum()) for w in weight.detach().tensor_split(parts)]
    noise = sum(f.noise_share * e for f, e in zip(fits, energy, strict=True))
    return {
        "sigma": (sum(f.sigma**2 for f in fits) / parts) ** 0.5,
        "edge": max(f.edge for f in fits),
        "edge_tw": max(f.edge_tw for f in fits),
        "spikes": sum(f.n_spikes for f in fits),
        "fit_error": max(f.fit_error for f in fits),
        "noise_share": noise / (sum(energy) or 1.0),
        "verdict": max((f.verdict for f in fits), key=_ORDER.__getitem__),
    }
