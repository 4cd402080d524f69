"""Token merging in the operators of ONNX equals the reference, and stays small in an exported file."""

import onnx
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mpcompile import Config, transform
from mpcompile.export import run_exported, save_onnx
from mpcompile.kernels.token_merge import exported, reference
from tests.support.helpers import images, relative, tiny_vit


@settings(max_examples=150, deadline=None)
@given(
    tokens=st.integers(2, 40),
    prefix=st.integers(0, 5),
    suffix=st.integers(0, 2),
    r=st.integers(0, 25),
    shape=st.tuples(st.integers(1, 3), st.integers(1, 3)),  # batch, heads
    kinds=st.integers(1, 60),  # of keys: with few of them, most are equal to others
    weights=st.tuples(st.sampled_from([0.0, 0.2]), st.sampled_from([0.0, 0.05])),
    keep_norm=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_equals_the_reference(tokens, prefix, suffix, r, shape, kinds, weights, keep_norm, seed):
    torch.manual_seed(seed)
    prefix = min(prefix, tokens)
    suffix = min(suffix, tokens - prefix)
    batch, heads = shape
    x, keys = torch.randn(batch, tokens, 6), torch.randn(batch, heads, kinds, 5)
    keys = keys[:, :, torch.randint(kinds, (tokens,))]
    size, saliency = torch.randint(1, 4, (batch, tokens, 1)).float(), torch.rand(batch, tokens)
    args = (x, keys, size, r, prefix, suffix, saliency, *weights, keep_norm)
    merged, sizes, place = exported.token_merge(*args)
    expected = reference.token_merge(*args)
    assert torch.equal(place, expected[2])
    torch.testing.assert_close(merged, expected[0], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(sizes, expected[1], rtol=1e-6, atol=0)


def test_hidden_tokens_stay_hidden():
    torch.manual_seed(0)
    x, keys, size = torch.randn(2, 21, 6), torch.randn(2, 1, 21, 5), torch.ones(2, 21, 1)
    size[:, 14:] = 0
    args = (x, keys, size, 5, 1, 0, None, 0.0, 0.05, True)
    merged, sizes, _ = exported.token_merge(*args)
    expected = reference.token_merge(*args)
    assert torch.equal(sizes, expected[1]) and bool((sizes == 0).any())
    torch.testing.assert_close(merged * (sizes > 0), expected[0] * (sizes > 0), rtol=1e-5, atol=1e-6)
    assert merged.isfinite().all()


@pytest.mark.parametrize("batch", [1, 3])
def test_a_merge_is_few_operators_of_onnx(batch, tmp_path):
    """ONNX Runtime spends microseconds on each call, however small: the reference takes 136 calls per merge."""
    model, x = tiny_vit(depth=3), images(batch)
    counts = []
    for r in (0, 3):
        gm = transform(model, x, Config(pattern="dense", tome_r=r, skip_dead_tokens=False))
        save_onnx(gm, x, tmp_path / "m.onnx")
        counts.append(len(onnx.load(tmp_path / "m.onnx").graph.node))
        with torch.no_grad():
            assert relative(run_exported(tmp_path / "m.onnx", "onnx", x), gm(x)) < 1e-5
    assert counts[1] - counts[0] < 3 * 90  # with the saliency and the sizes in attention
