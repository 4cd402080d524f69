"""Forged graphs with valid checksums, loaded and run in child processes: refused or run, never a crash."""

from __future__ import annotations

import os
import sys
from collections import Counter

import pytest
import torch

from tests.support import forged_graphs
from tests.support.forged_graphs import ENDED, Forger, outcomes

ROUNDS = int(os.environ.get("MPCOMPILE_TEST_FORGED", "300"))

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs fork")


@pytest.fixture(scope="module")
def forger(tmp_path_factory):
    before = torch.get_num_threads()
    torch.set_num_threads(1)  # threads do not survive a fork
    yield Forger(tmp_path_factory.mktemp("forged"), seed=1)
    torch.set_num_threads(before)


def test_no_forged_graph_crashes(forger):
    results = dict(outcomes(forger, ROUNDS))
    crashed = {number: result for number, result in results.items() if result not in ENDED}
    assert len(results) == ROUNDS and not crashed
    counts = Counter(results.values())
    assert counts[ENDED[0]] > ROUNDS / 4 and counts[ENDED[1]] > 5  # neither all refused nor all harmless


def test_a_crash_is_counted_and_the_next_file_is_tried(forger, monkeypatch):
    def outcome(path, seconds, seen=[]):  # noqa: B006
        seen.append(path)
        if len(seen) == 3:
            os.kill(os.getpid(), 11)
        return ENDED[0]

    monkeypatch.setattr(forged_graphs, "outcome", outcome)
    results = [result for _, result in outcomes(forger, 5)]
    assert results == [ENDED[0], ENDED[0], "crashed: SIGSEGV", ENDED[0], ENDED[0]]
