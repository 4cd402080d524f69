"""The operators of token merging: matching, averages, proportional attention."""

import pytest
import torch
from hypothesis import given, reject, settings
from hypothesis import strategies as st

from mpcompile.kernels import ops
from mpcompile.kernels.token_merge import attention as attention_in_torch
from mpcompile.kernels.token_merge import reference
from mpcompile.kernels.token_merge.reference import merged_count, token_merge
from tests.support.helpers import an_ulp_off, relative, tied_keys
from tests.support.merging_reference import Undecided, merge_one


@settings(max_examples=60, deadline=None)
@given(
    tokens=st.integers(2, 40),
    prefix=st.integers(0, 5),
    r=st.integers(0, 45),
    batch=st.integers(1, 3),
    seed=st.integers(),
)
def test_equals_merging_one_token_at_a_time(tokens, prefix, r, batch, seed):
    prefix = min(prefix, tokens)
    random = torch.Generator().manual_seed(seed % 2**63)
    x, keys = torch.randn(batch, tokens, 6, generator=random), torch.randn(batch, 2, tokens, 4, generator=random)
    merged, size, place = token_merge(x, keys, torch.ones(batch, tokens, 1), r, prefix)
    for sample in range(batch):
        members = [[i] for i in range(tokens)]
        try:
            expected, members = merge_one(x[sample], members, [1.0] * tokens, keys[sample].mean(0), r, prefix)
        except Undecided:
            reject()
        assert torch.allclose(merged[sample], expected, atol=1e-6)
        assert size[sample, :, 0].tolist() == [len(group) for group in members]
        assert all(int(place[sample, i]) == new for new, group in enumerate(members) for i in group)
        alone = [new for new, group in enumerate(members) if len(group) == 1]
        assert torch.equal(merged[sample][alone], x[sample][[members[new][0] for new in alone]])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_merging_preserves_the_size_weighted_sum(dtype):
    x, keys = torch.randn(2, 17, 8).to(dtype), torch.randn(2, 2, 17, 4).to(dtype)
    size = torch.randint(1, 5, (2, 17, 1)).float()
    merged, sizes, _ = token_merge(x, keys, size, 4, 1)
    assert merged.shape == (2, 13, 8) and merged.dtype == dtype and sizes.dtype == torch.float32
    assert torch.equal(sizes.sum(1), size.sum(1))
    tolerance = {torch.float32: 1e-6, torch.bfloat16: 1e-2, torch.float16: 2e-3}[dtype]
    assert relative((merged.float() * sizes).sum(1), (x.float() * size).sum(1)) < tolerance
    assert torch.equal(merged[:, 0], x[:, 0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_ties_go_to_the_lower_index(dtype):
    x = torch.arange(7.0)[None, :, None].to(dtype)
    merged, size, _ = token_merge(x, torch.ones(1, 1, 7, 2, dtype=dtype), torch.ones(1, 7, 1), 2, 1)
    # tokens 2, 4, 6 all match 1, 3 and 5 equally well: 2 and 4 go into 1
    assert merged.flatten().tolist() == [0, 6, pytest.approx(7 / 3, rel=1e-2), 3, 5]
    assert size.flatten().tolist() == [1, 1, 3, 1, 1]


@pytest.mark.parametrize(("tokens", "heads", "depth"), [(17, 3, 20), (50, 12, 64), (66, 1, 5), (40, 2, 256)])
@pytest.mark.parametrize("kinds", [1, 2, 5])
def test_rounding_does_not_break_ties(tokens, heads, depth, kinds):
    """Equal keys merge by index, even if they are an ulp apart or their products are added in another order."""
    torch.manual_seed(tokens + kinds)
    x, size = torch.randn(2, tokens, 6), torch.ones(2, tokens, 1)
    keys = tied_keys(2, heads, tokens, depth, kinds)
    for r in (1, tokens // 4, tokens // 2):
        place = token_merge(x, keys, size, r, 1)[2]
        for sample in range(2):
            members = [[i] for i in range(tokens)]
            _, members = merge_one(x[sample], members, [1.0] * tokens, keys[sample].mean(0), r, 1)
            assert all(int(place[sample, i]) == new for new, group in enumerate(members) for i in group)
        for _ in range(5):
            assert torch.equal(token_merge(x, an_ulp_off(keys), size, r, 1)[2], place)
            assert torch.equal(token_merge(x, keys[..., torch.randperm(depth)], size, r, 1)[2], place)


def test_rounding_does_not_break_ties_of_compiled_code():
    torch.manual_seed(0)
    x, size, keys = torch.randn(2, 37, 6), torch.ones(2, 37, 1), tied_keys(2, 3, 37, 20, 3)
    place = token_merge(x, keys, size, 7, 1)[2]
    compiled = torch.compile(ops.token_merge, dynamic=False)
    for _ in range(10):
        assert torch.equal(compiled(x, an_ulp_off(keys), size, 7, 1)[2], place)


def test_rounded_scores_keep_the_order_of_indices():
    torch.manual_seed(0)
    best = torch.tensor([0.9, 0.5, 0.9, 0.7, 0.5, 0.9, 0.7, 0.5])
    for r, merged in enumerate([[0], [0, 2], [0, 2, 5], [0, 2, 3, 5], [0, 2, 3, 5, 6], [0, 1, 2, 3, 5, 6]], 1):
        for _ in range(20):
            place, listed = reference._split(an_ulp_off(best)[None], r)
            assert listed[0, -r:].tolist() == merged
            assert listed[0, place[0]].tolist() == list(range(8))


def test_similarities_within_the_tolerance_go_by_index():
    """The first within the tolerance of the highest is chosen, even if smaller steps lead from one to the other."""
    step = 0.75 * reference.TIE
    cosines = torch.tensor([1 - 4 * step, 1 - 3 * step, 1 - 2 * step, 1 - step, 1.0])
    b = torch.stack([cosines, (1 - cosines**2).sqrt()], -1)
    keys = torch.stack([torch.tensor([1.0, 0.0]).expand(5, 2), b], 1).reshape(1, 1, 10, 2)
    assert reference._match(keys, 0, 1)[1].tolist() == [[3] * 5]
    places = [reference._split(cosines[None], r)[1][0, -r:].tolist() for r in (1, 2, 3)]
    assert places == [[3], [2, 3], [1, 2, 4]]


def test_autocast_does_not_reach_the_matching():
    torch.manual_seed(0)
    x, keys, size = torch.randn(2, 41, 6), torch.randn(2, 3, 41, 16), torch.ones(2, 41, 1)
    whole = ops.token_merge(x, keys, size, 9, 1)
    table = ops.token_follow(torch.randn(41, 8), whole[2], size, whole[1], 0, -2, 3)
    assert table.dtype == torch.float32
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.is_autocast_enabled("cpu")
        for found, wanted in zip(ops.token_merge(x, keys, size, 9, 1), whole, strict=True):
            assert torch.equal(found, wanted)
        assert torch.is_autocast_enabled("cpu")


def test_a_nan_key_has_similarity_zero():
    x, keys, size = torch.randn(1, 8, 3), torch.zeros(1, 2, 8, 2), torch.ones(1, 8, 1)
    keys[..., 0] = 1.0
    for broken in (torch.nan, torch.inf, -torch.inf):
        keys[0, 0, 2, 0], keys[0, 1, 1, 1] = broken, broken  # one key of A and one of B
        place = token_merge(x, keys, size, 3, 0)[2]
        # 0, 4 and 6 match 3, the first of B that is as good as any; 2 stays
        assert place.tolist() == [[2, 1, 0, 2, 2, 3, 2, 4]]


def test_hidden_tokens_weigh_nothing():
    x, keys = torch.randn(1, 6, 3), torch.ones(1, 1, 6, 2)
    size = torch.tensor([[[0.0], [1.0], [0.0], [0.0], [1.0], [1.0]]])
    merged, sizes, _ = token_merge(x, keys, size, 2, 0)  # 0 and 2 go into 1
    assert torch.equal(merged[0, 1], x[0, 1]) and sizes[0, 1] == 1
    assert bool(torch.isfinite(merged).all())


def test_nan_stays_where_it_is():
    x, keys = torch.randn(2, 9, 3), torch.randn(2, 1, 9, 2)
    whole = token_merge(x, keys, torch.ones(2, 9, 1), 3, 1)[0]
    keys[1, 0, 4] = torch.nan
    assert torch.equal(token_merge(x, keys, torch.ones(2, 9, 1), 3, 1)[0][0], whole[0])


def test_merged_count_is_clamped_to_half_of_the_mergeable_tokens():
    cases = [(17, 0, 1, 17), (17, 8, 1, 9), (17, 9, 1, 9), (2, 4, 1, 2), (5, 3, 5, 5)]
    assert [merged_count(tokens, r, prefix) for tokens, r, prefix, _ in cases] == [left for *_, left in cases]


def test_gradients_are_those_of_the_average():
    x, keys = torch.randn(1, 8, 2, dtype=torch.float64, requires_grad=True), torch.randn(1, 2, 8, 3)
    merged, size, place = token_merge(x, keys, torch.ones(1, 8, 1), 2, 1)
    (gradient,) = torch.autograd.grad(merged.sum(), x)
    assert torch.allclose(gradient[0, :, 0].float(), (1 / size[0, place[0], 0]), atol=1e-6)


def test_operators_pass_opcheck():
    x, size = torch.randn(2, 9, 4, requires_grad=True), torch.ones(2, 9, 1)
    heads = torch.randn(2, 2, 9, 8)
    place = token_merge(x, heads, size, 2, 1)[2]
    table = torch.randn(9, 8, requires_grad=True)
    calls = [
        (ops.token_size, (x, torch.zeros(2, 1, 1, 9))),
        (ops.token_merge, (x, heads, size, 2, 1)),
        (ops.token_mean, (x, size, 0, 1, False)),
        (ops.token_bias, (size, torch.randn(2, 2, 9, 9), 0, 3)),
        (ops.token_follow, (table, place, size, torch.ones(2, 7, 1), 0, -2, 4)),
        (ops.token_pairs, (torch.randn(2, 9, 9, requires_grad=True), place, size, torch.ones(2, 7, 1), 0, 0, True)),
        (ops.token_attention, (heads, heads, heads, size, 0, 0.0, None, False)),
    ]
    for operator, args in calls:
        torch.library.opcheck(operator, args, test_utils=("test_schema", "test_faketensor"))


@pytest.mark.parametrize(
    ("dim", "shape"), [(-2, (9, 5)), (-2, (3, 9, 5)), (-2, (2, 3, 9, 5)), (-1, (4, 9)), (1, (2, 9, 3, 5))]
)
def test_tables_follow_as_means(dim, shape):
    """For a merged token, a table holds the mean of the rows of all tokens that it represents."""
    place = torch.tensor([[0, 1, 2, 0, 2, 3, 4, 2, 1], [4, 3, 2, 1, 0, 0, 1, 2, 3]])
    before = torch.ones(2, 9, 1)
    size = torch.zeros(2, 5, 1).scatter_add(1, place.unsqueeze(-1), before)
    table = torch.randn(shape)
    dim = dim if dim < 0 else dim - 4
    found = reference.token_follow(table, place, before, size, 0, dim, 4)
    full = table.reshape((1,) * (4 - table.dim()) + shape).expand(2, *((-1,) * 3)).movedim(dim, 1)
    for sample in range(2):
        for token in range(5):
            rows = full[sample, (place[sample] == token).nonzero()[:, 0]]
            assert torch.allclose(found.movedim(dim, 1)[sample, token], rows.mean(0), atol=1e-6)


def attention(query, key, value, size, start=0):
    """Proportional attention written out, in float64."""
    size = torch.cat([torch.ones(size.shape[0], max(0, -start), 1), size[:, max(0, start) :]], 1).double()
    logits = query.double() @ key.double().transpose(-1, -2) * query.shape[-1] ** -0.5
    weights = logits.exp() * size[:, None, None, :, 0]
    return weights / weights.sum(-1, keepdim=True) @ value.double()


@pytest.mark.parametrize("start", [0, 3, -2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_proportional_attention(dtype, start):
    query, key, value = (torch.randn(2, 3, n, 16).to(dtype) for n in (5, 11, 11))
    size = torch.randint(1, 60, (2, 11 + start, 1)).float()
    expected = attention(query, key, value, size, start)
    tolerance = {torch.float32: 1e-6, torch.bfloat16: 1e-2, torch.float16: 2e-3}[dtype]
    assert relative(ops.token_attention(query, key, value, size, start, 0.0, None, False), expected) < tolerance
    bias = size.clamp(min=1) if start == 0 else None
    if bias is not None:
        by_channel = attention_in_torch._attention_by_channel(
            query, key, value, size.log().transpose(-1, -2).unsqueeze(1), 0.0, 0.25
        )
        assert relative(by_channel, expected) < tolerance


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_flash_attention_stays_eligible(dtype):
    """The bias must not rule out flash attention."""
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA GPU")
    query, key, value = (torch.randn(2, 3, 189, 64, device="cuda", dtype=dtype) for _ in range(3))
    size = torch.randint(1, 6, (2, 189, 1), device="cuda").float()
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.FLASH_ATTENTION):
        found = ops.token_attention(query, key, value, size, 0, 0.0, None, False)
    expected = attention(query.cpu(), key.cpu(), value.cpu(), size.cpu())
    assert relative(found.cpu(), expected) < 1e-2
