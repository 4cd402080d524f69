"""A small model, its data, and loaders that fail, for tests of distillation."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import mpcompile
from mpcompile.training.distill import distill


def mlp() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Dropout(0.1), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 5))


def data(count: int = 48, seed: int = 0) -> TensorDataset:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(count, 16, generator=generator)
    return TensorDataset(x, torch.randint(0, 5, (count,), generator=generator))


def loader(batch: int = 8, **kwargs) -> DataLoader:
    return DataLoader(data(), batch, shuffle=True, **kwargs)


def data_val() -> list:
    x, y = data(20, 1)[:]
    return list(zip(x.split(7), y.split(7), strict=True))


def student(model: nn.Module, config: mpcompile.Config | None = None) -> nn.Module:
    return mpcompile.transform(model.eval(), torch.randn(2, 16), config or mpcompile.Config(score="magnitude"))


def run(model: nn.Module, **kwargs) -> nn.Module:
    gm = student(model)
    kwargs = {"lr": 1e-2, "progress": False, **kwargs}
    distill(gm, model, kwargs.pop("train", None) or loader(), **kwargs)
    return gm


def same(a: nn.Module, b: nn.Module) -> bool:
    ours, theirs = a.state_dict(), b.state_dict()
    return ours.keys() == theirs.keys() and all(torch.equal(ours[k], theirs[k]) for k in ours)


class Stop(BaseException):
    pass


class Raising(list):
    """A loader of length three that raises when it is iterated, or yields nothing."""

    def __init__(self, error: Exception | None) -> None:
        super().__init__([None] * 3)
        self.error = error

    def __iter__(self):
        if self.error is not None:
            raise self.error
        return iter(())


class Breaking:
    """A loader that raises Stop after ``count`` batches in total."""

    def __init__(self, inner: DataLoader, count: int) -> None:
        self.inner, self.left = inner, count

    def __len__(self) -> int:
        return len(self.inner)

    def __iter__(self):
        for batch in self.inner:
            if not self.left:
                raise Stop
            self.left -= 1
            yield batch


def refused(error, match, model=None, gm=None, **kwargs):
    model = model or mlp()
    with pytest.raises(error, match=match):
        distill(gm or student(model), kwargs.pop("teacher", model), progress=False, **{"train": loader(), **kwargs})
