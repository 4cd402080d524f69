"""The bias of merged tokens, from that of every pair of input tokens."""

import pytest
import torch
import torch.nn.functional as F

from mpcompile.kernels.token_merge.pairs import token_pairs
from tests.support.helpers import relative

PLACE = torch.tensor([[0, 1, 2, 0, 2, 3, 4, 2, 1], [0, 4, 3, 2, 1, 0, 0, 1, 2]])


def sizes(place, before):
    return torch.zeros(len(place), 5, 1).scatter_add(1, place.unsqueeze(-1), before)


@pytest.mark.parametrize(("shape", "start"), [((9, 9), 0), ((3, 9, 9), 0), ((2, 3, 9, 9), 0), ((3, 8, 8), 1)])
def test_rows_are_means_of_priors_and_columns_their_sums(shape, start):
    place = PLACE if start == 0 else torch.tensor([[0, 1, 2, 1, 2, 3, 4, 2, 1]]).expand(2, -1)
    before, table = torch.rand(2, 9, 1) + 0.5, torch.randn(shape)
    size = sizes(place, before)
    found = token_pairs(table, place, before, size, start, start, True)
    mean = token_pairs(table, place, before, size, start, start, False)
    prior = table.double().softmax(-1).reshape((1,) * (4 - len(shape)) + shape).expand(2, *(-1,) * 3)
    for sample in range(2):
        for query in range(start, 5):
            for key in range(start, 5):
                rows, columns = ((place[sample] == token).nonzero()[:, 0] for token in (query, key))
                share = (before[sample, rows, 0] / before[sample, rows, 0].sum()).double()
                block = prior[sample][:, rows - start][:, :, columns - start]
                total = torch.einsum("hqk,q,k->h", block, share, before[sample, columns, 0].double()).log()
                assert torch.allclose(found[sample, :, query - start, key - start].double(), total, atol=1e-5)
                average = total - before[sample, columns, 0].double().sum().log()
                assert torch.allclose(mean[sample, :, query - start, key - start].double(), average, atol=1e-5)


def test_keys_that_are_duplicates_draw_the_same_attention():
    """Parts with equal keys and values but different biases: the merged key is exact, for every query of its own."""
    place = PLACE[:1]
    before, bias = torch.ones(1, 9, 1), 3 * torch.randn(1, 2, 9, 9)
    size = sizes(place, before)
    query, key, value = torch.randn(1, 2, 9, 4), torch.randn(1, 2, 5, 4), torch.randn(1, 2, 5, 4)
    everything = F.scaled_dot_product_attention(query, key[:, :, place[0]], value[:, :, place[0]], attn_mask=bias)
    for row in range(9):  # one query, which never merges, at a time
        merged = token_pairs(bias[:, :, row : row + 1], place, before, size, 0, 0, True)
        assert merged.shape == (1, 2, 1, 5)
        found = F.scaled_dot_product_attention(query[:, :, row : row + 1], key, value, attn_mask=merged)
        assert relative(found, everything[:, :, row : row + 1]) < 1e-6


def test_a_constant_added_to_a_row_changes_no_weights():
    before, bias = torch.ones(2, 9, 1), torch.randn(2, 9, 9)
    shifted = bias + 20 * torch.randn(2, 9, 1)
    found, again = (
        token_pairs(b, PLACE, before, sizes(PLACE, before), 0, 0, True).softmax(-1) for b in (bias, shifted)
    )
    assert torch.allclose(found, again, atol=1e-5)


def test_hidden_keys_stay_hidden_and_finite():
    bias = torch.zeros(9, 9)
    bias[:, [1, 8]] = -torch.inf  # all parts of token 1 of the first sample
    before = torch.ones(2, 9, 1)
    found = token_pairs(bias, PLACE, before, sizes(PLACE, before), 0, 0, True)
    assert bool(found.isfinite().all())
    assert float(found[0].softmax(-1)[..., 1].max()) < 1e-30
