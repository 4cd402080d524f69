"""Distillation refuses bad models, bad data and bad options."""

from __future__ import annotations

import itertools

import torch
from torch import nn

from mpcompile.errors import ConfigError, InputError
from tests.support.distilling import Breaking, Raising, data, loader, mlp, refused, student


def test_bad_input_is_refused():
    x, y = data()[:]
    refused(InputError, "label is out of range.*0 to 4.*found 9", train=[(x, y), (x, torch.full_like(y, 9))])
    refused(InputError, "out of range.*found -1", train=[(x, torch.full_like(y, -1))])
    refused(InputError, "different classes", teacher=nn.Linear(16, 7))
    refused(InputError, "no masks", gm=mlp())
    refused(InputError, "nothing to train on", train=[])
    refused(InputError, "no length", train=iter([(x, y)]))
    refused(InputError, "no labels", train=[x])
    refused(InputError, "labels have the wrong", train=[(x, y.float())])
    refused(InputError, "batch is empty", train=[(x[:0], y[:0])])
    refused(InputError, r"teacher fails on a batch: mat1.*\(48, 4\)", train=[(x[:, :4], y)])
    refused(InputError, "fails on a batch.*uint8", train=[(x.byte(), y)])
    refused(InputError, "batch 0 of epoch 1 cannot be read: 'gone'", train=Raising(KeyError("gone")))
    refused(InputError, "yields nothing", train=Raising(None), features=1.0)
    refused(InputError, "batch 0 of epoch 1 cannot be read: lost", train=Raising(OSError("lost")), features=1.0)
    refused(InputError, "val cannot be.*no batch", val=[])
    refused(InputError, "val cannot be.*read once", val=iter([(x, y)]))
    refused(InputError, "evaluation failed.*out of range.*found 9", val=[(x, torch.full_like(y, 9))], epochs=1)
    refused(InputError, "0.weight: weights in half.*float32, found torch.float16", gm=student(mlp()).half())
    refused(InputError, "no parameter.*can be trained", gm=student(mlp()).requires_grad_(False))
    refused(InputError, "cache=True needs", cache=True)
    refused(ConfigError, "no option 'epoch'.*Did you mean 'epochs'", epoch=3)
    refused(ConfigError, "out of range", alpha=2.0)
    refused(ConfigError, "wrong type", epochs="3")
    refused(ConfigError, "needs a folder", resume="auto")
    refused(ConfigError, "fsdp", sharding="fsdp", ema=0.9)


def test_a_loader_shorter_than_its_length_is_refused(tmp_path):
    class Short(Breaking):
        def __iter__(self):
            return itertools.islice(iter(self.inner), self.left)

    refused(InputError, "yields nothing", train=Short(loader(), 0))
    refused(InputError, "fewer batches", train=Short(loader(), 2), out=tmp_path)
