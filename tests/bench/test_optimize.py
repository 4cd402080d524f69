"""bench.optimization: the page that quotes it, and the order of its random plans."""

import json

from bench.common import RESULTS, ROOT
from bench.optimization import plans, search


def test_the_page_quotes_the_last_measurement():
    page = (ROOT / "docs" / "optimize.md").read_text(encoding="utf-8")
    data = json.loads((RESULTS / f"{search.NAME}.json").read_text(encoding="utf-8"))
    assert search.markdown(data) in page, "another table: python -m bench.optimization.search --tables"


def test_every_search_kept_its_promise_on_the_images_of_the_choice():
    data = json.loads((RESULTS / f"{search.NAME}.json").read_text(encoding="utf-8"))
    for row in data["rows"]:
        (chosen,) = [entry for entry in row["frontier"]["entries"] if entry["verdict"] == "chosen"]
        assert chosen["dense"] or chosen["upper"] <= row["max_drop"]
        assert row["speedup"] >= 1 and row["minutes"] < 30


def test_the_order_of_random_plans_is_counted():
    rows = [{"damage": d, "held_out": {"drop": d}, "other": {"drop": -d, "divergence": d**2}} for d in (0.1, 0.3, 0.2)]
    found = plans.correlations(rows)
    assert found["rank correlation, held out"] == 1 and found["rank correlation, other images"] == -1
