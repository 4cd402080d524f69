"""The random numbers of a run: Python's, NumPy's and torch's generators, seeded, saved and restored together."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch


def random_state() -> dict[str, Any]:
    """Return the state of all generators, as plain values and tensors."""
    version, keys, gauss = random.getstate()
    name, words, *rest = np.random.get_state(legacy=True)
    state: dict[str, Any] = {
        "python": [version, list(keys), gauss],
        "numpy": [name, np.asarray(words).tolist(), *rest],
        "torch": torch.get_rng_state(),
    }
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state_all()
    return state


def set_random_state(state: dict[str, Any]) -> None:
    """Restore a state that :func:`random_state` returned."""
    version, keys, gauss = state["python"]
    random.setstate((version, tuple(keys), gauss))
    name, words, *rest = state["numpy"]
    np.random.set_state((name, np.array(words, dtype=np.uint32), *rest))
    torch.set_rng_state(state["torch"].cpu())
    if len(state.get("cuda", ())) == torch.cuda.device_count() > 0:
        torch.cuda.set_rng_state_all([part.cpu() for part in state["cuda"]])


def seed_everything(seed: int, epoch: int, rank: int) -> None:
    """Seed all generators for one epoch on one rank."""
    words = np.random.SeedSequence([seed, epoch, rank]).generate_state(3)
    random.seed(int(words[0]))
    np.random.seed(int(words[1]))
    torch.manual_seed(int(words[2]))


@contextlib.contextmanager
def seeded(seed: int, epoch: int, part: int) -> Iterator[None]:
    """Seed all generators for the duration of a block, and leave them as they were before it."""
    before = random_state()
    try:
        seed_everything(seed, epoch, part)
        yield
    finally:
        set_random_state(before)
