"""Class scores and numbers among the outputs of a model, in every form that a model returns."""

import collections
import dataclasses

import pytest
import torch
from torch import Tensor
from transformers.modeling_outputs import ImageClassifierOutput

from mpcompile.data.outputs import class_scores, described, logits_of, numbers_of, tensors_of
from mpcompile.errors import InputError

SCORES, TOKENS, PIXELS = torch.randn(4, 10), torch.randn(4, 5, 8), torch.randn(4, 3, 8, 8)
Result = collections.namedtuple("Result", "features logits")


@dataclasses.dataclass
class Record:
    pooled: Tensor
    logits: Tensor


FORMS = {
    "a tensor": SCORES,
    "an output": ImageClassifierOutput(logits=SCORES, hidden_states=(TOKENS, TOKENS)),
    "a dict": {"pooled": torch.randn(4, 8), "logits": SCORES},
    "a namedtuple": Result(torch.randn(4, 8), SCORES),
    "a dataclass": Record(torch.randn(4, 8), SCORES),
    "a tuple": (TOKENS, torch.arange(4), SCORES, torch.randn(4, 2)),
    "nested": [{"a": (PIXELS, None)}, {"b": SCORES}],
}


@pytest.mark.parametrize("form", FORMS)
def test_scores(form):
    assert (
        class_scores(FORMS[form]) is SCORES and logits_of(FORMS[form]) is SCORES and numbers_of(FORMS[form]) is SCORES
    )


@pytest.mark.parametrize(
    ("output", "found"),
    [
        ({"logits": PIXELS, "pooled": SCORES}, r"logits \(4, 3, 8, 8\), pooled \(4, 10\)"),
        ({"boxes": TOKENS, "ids": torch.arange(4)}, r"boxes \(4, 5, 8\), ids \(4,\)"),
        (PIXELS, r"found \(4, 3, 8, 8\)"),
        (torch.ones(4, 2, dtype=torch.long), r"found \(4, 2\)"),
        ({"text": "none"}, "found dict"),
    ],
)
def test_no_scores(output, found):
    assert class_scores(output) is None
    with pytest.raises(InputError, match=f"the teacher does not return logits; expected .*{found}"):
        logits_of(output, "teacher")


def test_all_numbers_in_a_row():
    assert numbers_of(PIXELS) is PIXELS
    row = numbers_of({"boxes": TOKENS, "kept": torch.arange(4), "masks": (PIXELS, None)})
    assert torch.equal(row, torch.cat([TOKENS.flatten(), PIXELS.flatten()]))
    assert numbers_of([torch.arange(3)]).tolist() == [0.0, 1.0, 2.0]
    with pytest.raises(InputError, match="returns no tensor"):
        numbers_of({"a": None})


def test_names_of_tensors():
    assert described((TOKENS, {"a": [SCORES]})) == "0 (4, 5, 8), 1.a.0 (4, 10)"
    assert [t.shape[-1] for t in tensors_of((TOKENS, {"a": [SCORES]}))] == [8, 10]
