"""Scores of pairs in token merging: penalties for saliency and sizes; kept norms; the attention of single tokens."""

import pytest
import torch
from hypothesis import given, reject, settings
from hypothesis import strategies as st

from mpcompile.kernels import ops
from tests.support.helpers import relative
from tests.support.merging_reference import Terms, Undecided, merge_one

WEIGHTS = st.sampled_from([0.0, 0.2, 1.0])


@st.composite
def merges(draw):
    """Arguments of token_merge: sizes from 0 to 5, and some saliencies and keys that are not finite."""
    batch, tokens, ends = draw(st.integers(1, 2)), draw(st.integers(2, 30)), draw(st.integers(0, 4))
    prefix, suffix = min(ends, tokens // 2), min(draw(st.integers(0, 3)), tokens // 2)
    random = torch.Generator().manual_seed(draw(st.integers(0, 2**63 - 1)))
    x = torch.randn(batch, tokens, 6, generator=random)
    keys = x.unsqueeze(1) if draw(st.booleans()) else torch.randn(batch, 2, tokens, 4, generator=random)
    size = torch.randint(0 if draw(st.booleans()) else 1, 6, (batch, tokens, 1), generator=random).float()
    saliency = 3 * torch.rand(batch, tokens, generator=random)
    terms = (saliency, draw(WEIGHTS), draw(WEIGHTS), draw(st.booleans()))
    return x, keys, size, draw(st.integers(0, 20)), prefix, suffix, *terms


def expected_of(sample, x, keys, size, r, prefix, suffix, saliency, saliency_weight, size_weight, keep_norm):
    """One sample by the reference: every input token stands for itself, with its size as weight."""
    end = x.shape[1] - suffix
    terms = Terms(saliency=saliency_weight, size=size_weight, norm=keep_norm)
    members = [[i] for i in range(end)]
    weights, known = size[sample, :, 0].tolist(), saliency[sample].tolist()
    merged, groups = merge_one(
        x[sample, :end], members, weights, keys[sample, :, :end].mean(0), r, prefix, terms, known
    )
    return torch.cat([merged, x[sample, end:]]), [*groups, *[[i] for i in range(end, x.shape[1])]]


@settings(max_examples=80, deadline=None)
@given(merges())
def test_equals_merging_one_token_at_a_time(args):
    x, _, size, r, prefix, suffix, *_ = args
    merged, sizes, place = ops.token_merge(*args)
    r = min(r, (x.shape[1] - prefix - suffix) // 2)
    assert merged.shape[1] == x.shape[1] - r
    assert torch.equal(sizes.sum(1), size.sum(1))
    assert torch.equal(merged[:, :prefix], x[:, :prefix])
    assert torch.equal(merged[:, merged.shape[1] - suffix :], x[:, x.shape[1] - suffix :])
    for sample in range(len(x)):
        try:
            expected, groups = expected_of(sample, *args)
        except Undecided:
            reject()
        assert torch.allclose(merged[sample], expected, rtol=1e-4, atol=1e-5)
        assert [place[sample, i].item() for group in groups for i in group] == [
            new for new, group in enumerate(groups) for _ in group
        ]
        alone = [(new, group[0]) for new, group in enumerate(groups) if len(group) == 1]
        assert all(torch.equal(merged[sample, new], x[sample, old]) for new, old in alone)


@settings(max_examples=30, deadline=None)
@given(merges(), st.randoms(use_true_random=False))
def test_the_order_of_tokens_within_both_sets_does_not_matter(args, shuffle):
    x, keys, size, r, prefix, suffix, saliency, *rest = args
    order = list(range(x.shape[1]))
    for first in (prefix, prefix + 1):
        slots = list(range(first, x.shape[1] - suffix, 2))
        order = [order[i] for i in range(len(order))]
        for slot, source in zip(slots, shuffle.sample(slots, len(slots)), strict=True):
            order[slot] = source
    moved = (x[:, order], keys[:, :, order], size[:, order], r, prefix, suffix, saliency[:, order], *rest)
    for sample in range(len(x)):
        try:
            groups, others = (expected_of(sample, *given)[1] for given in (args, moved))
        except Undecided:
            reject()
        if set(map(frozenset, groups)) != {frozenset(order[i] for i in group) for group in others}:
            reject()  # of similarities that count as equal, the first one wins
    merged, _, place = ops.token_merge(*args)
    again, _, places = ops.token_merge(*moved)
    for sample in range(len(x)):  # every input token ends in a token of the same value
        assert torch.allclose(again[sample, places[sample]], merged[sample, place[sample][order]], rtol=1e-4, atol=1e-5)


def test_values_that_are_not_finite_count_as_none():
    torch.manual_seed(0)
    x, keys, size = torch.randn(1, 12, 3), torch.zeros(1, 1, 12, 2), torch.ones(1, 12, 1)
    keys[..., 0] = 1.0
    saliency = torch.zeros(1, 12)
    whole = ops.token_merge(x, keys, size, 3, 0, 0, saliency, 0.5, 0.1, True)
    for broken in (torch.nan, torch.inf, -torch.inf):
        saliency[0, 4] = broken
        for found, wanted in zip(ops.token_merge(x, keys, size, 3, 0, 0, saliency, 0.5, 0.1, True), whole, strict=True):
            assert torch.equal(found, wanted)
    keys[0, 0, 2] = torch.nan  # similarity 0: the last to go
    place = ops.token_merge(x, keys, size, 3, 0, 0, saliency, 0.5, 0.1, True)[2]
    assert place[0, ::2].tolist() == [3, 0, 3, 3, 1, 2]


def test_ties_of_scores_go_by_index():
    """Equal tokens of equal saliency merge in order, whatever rounding does to their scores."""
    x, size = torch.ones(1, 21, 8), torch.ones(1, 21, 1)
    saliency = torch.linspace(0, 1, 21).gt(0.4).float()[None]
    place = ops.token_merge(x, x.unsqueeze(1), size, 3, 1, 0, saliency, 0.2, 0.1, True)[2]
    for _ in range(10):
        noise = 1 + 1e-6 * torch.randn(1, 21)
        assert torch.equal(
            ops.token_merge(x, x.unsqueeze(1), size, 3, 1, 0, saliency * noise, 0.2, 0.1, True)[2], place
        )
    assert (place[0] == place[0, 1]).nonzero().flatten().tolist() == [1, 2, 4, 6]


def test_norms_of_merged_tokens_are_those_of_their_parts():
    x = torch.tensor([[[3.0, 0.0], [0.0, 1.0], [2.0, 2.0], [5.0, 0.0]]])  # 0 and 2 may go, into 1 or 3
    size = torch.tensor([[[1.0], [2.0], [1.0], [2.0]]])
    merged = ops.token_merge(x, x.unsqueeze(1), size, 1, 0, 0, None, 0.0, 0.0, True)[0]
    mean = (x[0, 0] + 2 * x[0, 3]) / 3
    torch.testing.assert_close(merged[0, 2], mean * (3 + 2 * 5) / 3 / mean.norm())
    opposite = torch.tensor([[[1.0, 0.0], [-1.0, 0.0]]])  # their mean is zero, and has no direction
    assert ops.token_merge(opposite, opposite.unsqueeze(1), torch.ones(1, 2, 1), 1, 0, 0, None, 0.0, 0.0, True)[
        0
    ].tolist() == [[[0.0, 0.0]]]


def test_gradients_flow_through_averages_and_norms_alone():
    torch.manual_seed(0)
    x = torch.randn(1, 8, 3, dtype=torch.float64, requires_grad=True)
    heads = torch.randn(1, 2, 8, 4, requires_grad=True)
    size = torch.ones(1, 8, 1)
    saliency = ops.token_saliency(heads, heads, size, [0], None)
    assert not saliency.requires_grad
    merged, _, place = ops.token_merge(x, x.unsqueeze(1), size, 2, 1, 0, saliency, 0.2, 0.1, True)
    assert torch.autograd.grad(merged.sum(), heads, allow_unused=True, retain_graph=True)[0] is None
    (gradient,) = torch.autograd.grad(merged.square().sum(), x)

    def again(values):
        total = torch.zeros((), dtype=torch.float64)
        for token in place[0].unique():
            part = values[0, place[0] == token]
            mean = part.mean(0)
            total = total + (mean * part.norm(dim=-1).mean() / mean.norm()).square().sum()
        return total

    (wanted,) = torch.autograd.grad(again(x), x)
    assert relative(gradient, wanted) < 1e-5


def attended(query, key, size, rows, scale, bias):
    """The saliency of one sample in float64, row by row."""
    heads, tokens = query.shape[0], query.shape[1]
    total = torch.zeros(tokens, dtype=torch.float64)
    for head in range(heads):
        keys = key[head * key.shape[0] // heads].double()
        for row in rows:
            logits = keys @ query[head, row].double() * scale
            added = size.double().log() if bias is None else bias[head, row].double()
            total += (logits + added).softmax(0) / (heads * len(rows))
    return torch.where(size > 0, total / size, 0.0) * tokens


@pytest.mark.parametrize("rows", [[0], [0, 1], [2, 5]])
@pytest.mark.parametrize(("groups", "biased"), [(4, False), (2, False), (4, True)])
def test_saliency_is_the_attention_of_single_rows(rows, groups, biased):
    torch.manual_seed(len(rows) + groups)
    query, key = torch.randn(2, 4, 11, 8), torch.randn(2, groups, 11, 8)
    size = torch.randint(1, 9, (2, 11, 1)).float()
    size[1, 7] = 0.0
    bias = torch.randn(1, 4, 11, 11) + size.squeeze(-1)[:, None, None].log() if biased else None
    for scale in (None, 0.7):
        found = ops.token_saliency(query, key, size, rows, scale, bias)
        assert found.dtype is torch.float32 and found.shape == (2, 11)
        for sample in range(2):
            own = None if bias is None else bias[sample]
            wanted = attended(query[sample], key[sample], size[sample, :, 0], rows, scale or 8**-0.5, own)
            assert relative(found[sample], wanted) < 1e-6
    weights = (query @ query.transpose(-1, -2)).softmax(-1)
    found = ops.token_saliency(weights, None, None, rows)
    assert relative(found, weights[:, :, rows].mean((1, 2)) * 11) < 1e-6
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(ops.token_saliency(query, key, size, rows), ops.token_saliency(query, key, size, rows))
        assert ops.token_saliency(query, key, size, rows).dtype is torch.float32


def test_operators_pass_opcheck():
    heads, size, x = torch.randn(2, 2, 9, 8), torch.ones(2, 9, 1), torch.randn(2, 9, 4)
    saliency = ops.token_saliency(heads, heads, size, [0])
    for operator, args in (
        (ops.token_saliency, (heads, heads, size, [0, 1], 0.5, torch.zeros(9, 9))),
        (ops.token_merge, (x, x.unsqueeze(1), size, 2, 1, 1, saliency, 0.2, 0.1, True)),
    ):
        torch.library.opcheck(operator, args, test_utils=("test_schema", "test_faketensor"))
