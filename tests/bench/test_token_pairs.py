"""bench.tokens.pairs: what it counts, and the page that quotes it."""

import json

import pytest
import torch

from bench.common import RESULTS, ROOT
from bench.tokens import pairs


def test_the_page_quotes_the_last_measurement():
    page = (ROOT / "docs" / "token_merging.md").read_text(encoding="utf-8")
    data = json.loads((RESULTS / f"{pairs.NAME}.json").read_text(encoding="utf-8"))
    tables = pairs.tables(data)
    assert list(tables) == [pairs.CHOSEN_ON, pairs.REPORTED_ON]
    for name, table in tables.items():
        assert table in page, f"another table of {name}: python -m bench.tokens.pairs --tables"


def test_answers_are_compared_image_by_image():
    dense = torch.tensor([[0.75, 0.25], [0.25, 0.75], [0.5, 0.5], [0.9, 0.1]]).double().log()
    other = torch.tensor([[0.25, 0.75], [0.25, 0.75], [0.5, 0.5], [0.9, 0.1]]).double().log()
    labels = torch.tensor([1, 1, 0, 1])
    before, after = (pairs.answer(found, dense, labels) for found in (dense, other))
    assert before.right.tolist() == [False, True, True, False]
    assert not before.changed.any()
    assert not before.divergence.any()
    line = pairs.record(after, before)
    assert (line["right"], line["changed"], line["won"], line["lost"]) == (3, 1, 1, 0)
    # KL of (3/4, 1/4) from (1/4, 3/4) is ln(3) / 2, on one image of four.
    expected = 0.5 * torch.tensor(3.0).log().item() / 4
    assert line["divergence"]["mean"] == pytest.approx(expected)
    assert line["divergence"]["error"] == pytest.approx(expected)  # one of four values is not 0
    assert line["divergence_difference"] == line["divergence"]
