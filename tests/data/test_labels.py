"""Labels: every integer type is accepted, in every command that reads labels; anything else is refused."""

import numpy as np
import pytest
import torch
from torch import nn

from mpcompile import Config, audit, certify, distill, errors, transform
from mpcompile.data.labels import Labels, class_numbers, draw, whole_numbers
from mpcompile.errors import InputError
from mpcompile.measure.evaluate import evaluate
from mpcompile.training.distill import distillation_loss

COUNT = 12
WHOLE = [torch.bool, torch.uint8, torch.uint16, torch.uint32, torch.uint64, torch.int8, torch.int16, torch.int32]
KINDS = {
    **{str(dtype): lambda y, dtype=dtype: y.to(dtype) for dtype in WHOLE},
    "column": lambda y: y[:, None],
    "numpy int16": lambda y: y.numpy().astype(np.int16),
    "numpy uint64, big-endian": lambda y: y.numpy().astype(">u8"),
    "list": lambda y: y.tolist(),
    "tuple of tensors": lambda y: tuple(y.to(torch.uint8)),
}


def model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 2)).eval()


def masked(dense):
    return transform(dense, torch.randn(2, 16), Config(pattern="2:4", score="magnitude")).eval()


def data(dense):
    x = torch.randn(COUNT, 16, generator=torch.Generator().manual_seed(1))
    y = dense(x).argmax(1)
    y[:4] = 1 - y[:4]
    return x, y


def trained(x, y):
    dense = model()
    return distill(masked(dense), dense, [(x, y)], [(x, y)], epochs=1, progress=False).to_dict()


def audited(x, y, **apart):
    dense = model()
    batches = [(x[:5], y[:5]), (x[5:], y[5:])] if not apart else [x[:5], x[5:]]
    report = audit(dense, masked(dense), batches, rounds=0, dense_compiled=dense, progress=False, **apart)
    return [(row.correct, row.lost, row.won, row.interval) for row in report.rows]


def certified(x, y, **apart):
    dense = model()
    batches = [(x, y)] if not apart else [x]
    report = certify(dense, masked(dense), batches, tiers=(0, 1), progress=False, **apart)
    return report.ce_change, [tier.settled for tier in report.tiers]


JOBS = {
    "distill": trained,
    "evaluate": lambda x, y: evaluate(model(), [(x, y)]),
    "audit": audited,
    "audit, labels apart": lambda x, y: audited(x, None, labels=y),
    "audit, labels in parts": lambda x, y: audited(x, None, labels=iter([y[:7], y[7:]])),
    "certify": certified,
    "certify, labels apart": lambda x, y: certified(x, None, labels=y),
}


@pytest.mark.parametrize("job", JOBS)
def test_every_integer_type_gives_the_same_figures(job):
    x, y = data(model())
    wanted = JOBS[job](x, y)
    assert wanted is not None
    for kind, convert in KINDS.items():
        assert JOBS[job](x, convert(y)) == wanted, kind


WRONG = {
    "fractions": (lambda y: y.float(), "labels have the wrong type.*float32"),
    "one-hot": (lambda y: torch.eye(2)[y], "labels have the wrong type.*float32.*argmax"),
    "one-hot, whole": (lambda y: torch.eye(2).long()[y], r"labels do not fit.*shape \(\d+, 2\).*argmax"),
    "texts": (lambda y: ["cat"] * COUNT, "labels have the wrong type"),
    "numpy floats": (lambda y: np.full(COUNT, np.nan), "labels have the wrong type.*float64"),
    "complex": (lambda y: y.to(torch.complex64), "labels have the wrong type"),
    "sparse": (lambda y: y.to_sparse(), "labels have the wrong type.*sparse_coo"),
    "without values": (lambda y: y.to("meta"), "labels have the wrong type.*meta device"),
    "too few": (lambda y: y[:-1], "labels do not fit.*12 labels.*found 11"),
    "too many": (lambda y: torch.cat([y, y[:1]]), "labels do not fit.*12 labels.*found 13"),
    "negative": (lambda y: torch.where(torch.arange(COUNT) == 8, -100, y), "label is out of range.*0 to 1.*found -100"),
    "no such class": (lambda y: y + 1, "label is out of range.*0 to 1.*found 2"),
    "beyond int64": (
        lambda y: torch.from_numpy(y.numpy().astype(np.uint64) + np.uint64(2**63)),
        rf"label is out of range.*found ({2**63 + 1}|{2**63})",
    ),
}


@pytest.mark.parametrize("kind", WRONG)
@pytest.mark.parametrize("job", ["distill", "evaluate", "audit, labels apart", "certify", "certify, labels apart"])
def test_other_labels_are_refused_in_one_line(job, kind):
    convert, message = WRONG[kind]
    x, y = data(model())
    with pytest.raises(InputError, match=message) as caught:
        JOBS[job](x, convert(y))
    assert str(caught.value).isprintable() and len(str(caught.value)) < 600


def test_labels_in_only_some_batches_are_not_dropped():
    x, y = data(model())
    dense = model()
    for batches in ([(x[:4], y[:4]), x[4:]], [x[:4], (x[4:], y[4:])], [(x[:4], y[:4]), (x[4:], None)]):
        with pytest.raises(InputError, match="some batches have labels and others have none"):
            audit(dense, dense, batches, rounds=0, dense_compiled=dense, progress=False)
        with pytest.raises(InputError, match="some batches have labels and others have none"):
            certify(dense, dense, batches, tiers=(0,), progress=False)
    with pytest.raises(InputError, match="labels have the wrong type"):
        audit(dense, dense, [(x, y.float())], rounds=0, dense_compiled=dense, progress=False)


def test_labels_of_a_model_without_logits_are_mentioned():
    features = nn.Sequential(nn.Linear(16, 8), nn.Unflatten(1, (4, 2))).eval()
    report = audit(features, features, [torch.randn(3, 16)], [0, 1, 0], rounds=0, dense_compiled=features)
    assert any("accuracy was not measured: the model returns no logits" in note for note in report.notes)


def test_labels_need_not_be_split_like_the_batches():
    labels = Labels(part for part in (torch.tensor([3]), [1, 2], np.array([[5], [4]], np.uint8), 7))
    assert labels.of(None, 2).tolist() == [3, 1] and labels.of(None, 4).tolist() == [2, 5, 4, 7]
    labels.end()
    with pytest.raises(InputError, match="7 labels or more, found 6"):
        labels.of(None, 1)


def test_losses_and_draws_accept_any_integer_type():
    logits = torch.randn(4, 3)
    for dtype in (torch.uint8, torch.int16, torch.int64):
        labels = torch.tensor([0, 1, 2, 1]).to(dtype)
        found = distillation_loss(logits, logits, labels, 0.5, 2.0, 0.1)
        torch.testing.assert_close(found, distillation_loss(logits, logits, labels.long(), 0.5, 2.0, 0.1))
        assert draw(labels, 3) == draw(labels.tolist(), 3) == draw(iter(labels), 3)
    with pytest.raises(errors.MPCompileError, match="labels have the wrong type"):
        draw(["cat", "dog"], 1)


def test_shapes_and_emptiness():
    assert whole_numbers([]).dtype is torch.int64 and class_numbers([], 0, 3).tolist() == []
    assert whole_numbers(torch.tensor(7, dtype=torch.uint16)).item() == 7
    with pytest.raises(InputError, match="found NoneType"):
        whole_numbers(None)
