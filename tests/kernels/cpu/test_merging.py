"""``nm_token_merge``: the rules of the reference, for any shape, with ties, and whatever the keys hold."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mpcompile.errors import InputError
from mpcompile.ir.macs import flop_counter
from mpcompile.kernels import ops
from mpcompile.kernels.cpu import build
from mpcompile.kernels.nm_linear import operators as native
from mpcompile.kernels.token_merge import reference

FORMS = {"C++": ops.nm_token_merge, "general": torch.ops.mpcompile.nm_token_merge_general.default}


@pytest.fixture(scope="module", params=build._processor_isas())
def isa(request):
    """Each instruction set in turn, as if the processor had no wider one."""
    patch, threads = pytest.MonkeyPatch(), torch.get_num_threads()
    loaded = build.load(request.param)
    patch.setattr(native, "kernels", lambda: loaded)
    native.use(loaded)
    yield request.param
    patch.undo()
    native.use(native.kernels())
    torch.set_num_threads(threads)


@st.composite
def merges(draw):
    """The arguments of a merge."""
    torch.manual_seed(draw(st.integers(0, 2**31)))
    batch, tokens, channels = draw(st.integers(1, 3)), draw(st.integers(1, 70)), draw(st.integers(1, 40))
    heads, depth = draw(st.integers(1, 3)), draw(st.integers(1, 40))
    prefix = draw(st.integers(0, min(3, tokens)))
    suffix = draw(st.integers(0, min(2, tokens - prefix)))
    x, keys = torch.randn(batch, tokens, channels), torch.randn(batch, heads, tokens, depth)
    if draw(st.booleans()):  # ties
        keys = keys[:, :, torch.randint(tokens, (tokens,)) // 3].clone()
    for value in draw(st.lists(st.sampled_from([float("nan"), float("inf"), -float("inf"), 0.0]), max_size=3)):
        keys[draw(st.integers(0, batch - 1)), :, draw(st.integers(0, tokens - 1))] = value
    size, saliency = torch.randint(0, 5, (batch, tokens, 1)).float(), None
    if draw(st.booleans()):
        saliency = torch.rand(batch, tokens)
        saliency[0, draw(st.integers(0, tokens - 1))] = draw(st.sampled_from([0.5, float("nan"), float("inf")]))
    if draw(st.booleans()):  # views
        x = torch.stack([x, x], 2)[:, :, 1]
        keys = keys.permute(2, 0, 1, 3).contiguous().permute(1, 2, 0, 3)
        size = torch.cat([size, size], 2)[:, :, 1:]
        saliency = None if saliency is None else saliency.T.contiguous().T
    weights = (draw(st.sampled_from([0.0, 0.2])), draw(st.sampled_from([0.0, 0.05])), draw(st.booleans()))
    return (x, keys, size, draw(st.integers(-1, tokens)), prefix, suffix, saliency, *weights)


@pytest.mark.parametrize("form", FORMS)
@given(args=merges(), threads=st.integers(1, 3))
@settings(deadline=None)
def test_it_follows_the_rules_of_the_reference(isa, form, args, threads):
    torch.set_num_threads(threads)
    merged, sizes, places = FORMS[form](*args)
    expected = reference.token_merge(*args)
    assert torch.equal(places, expected[2])
    torch.testing.assert_close(sizes, expected[1], rtol=1e-6, atol=0)
    torch.testing.assert_close(merged, expected[0], rtol=1e-4, atol=1e-5)
    x = args[0]
    alone = torch.zeros(merged.shape[:2]).scatter_add(1, places, torch.ones(places.shape)).gather(1, places) == 1
    assert torch.equal(merged.gather(1, places[..., None].expand_as(x))[alone], x[alone])  # bit for bit


@pytest.mark.parametrize("batch", [1, 3])
def test_threads_change_no_bit(isa, batch):
    torch.manual_seed(0)
    x, size = torch.randn(batch, 197, 192), torch.ones(batch, 197, 1)
    args = (x, x.unsqueeze(1), size, 13, 1, 0, torch.rand(batch, 197), 0.2, 0.05, True)
    results = []
    for threads in (1, 2, 5):
        torch.set_num_threads(threads)
        results.append(ops.nm_token_merge(*args))
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def example(**changed):
    torch.manual_seed(0)
    x = torch.randn(2, 17, 12)
    return {"x": x, "keys": x.unsqueeze(1), "size": torch.ones(2, 17, 1), "r": 3, "prefix": 1} | changed


def test_other_dtypes_and_gradients_take_the_reference():
    args = example(**{name: example()[name].bfloat16() for name in ("x", "keys")})
    for a, b in zip(ops.nm_token_merge(**args), reference.token_merge(*args.values()), strict=True):
        assert torch.equal(a, b)
    x = example()["x"].requires_grad_()
    ops.nm_token_merge(**example(x=x))[0].square().sum().backward()
    grad, x.grad = x.grad, None
    reference.token_merge(*example(x=x).values())[0].square().sum().backward()
    torch.testing.assert_close(grad, x.grad)


def test_without_kernels_the_reference_runs(monkeypatch):
    monkeypatch.setattr(native, "kernels", lambda: None)
    native.use(None)
    try:
        for a, b in zip(ops.nm_token_merge(**example()), reference.token_merge(*example().values()), strict=True):
            assert torch.equal(a, b)
    finally:
        monkeypatch.undo()
        native.use(native.kernels())


@pytest.mark.parametrize(
    "changed",
    [
        pytest.param({"size": torch.ones(2, 16, 1)}, id="sizes of fewer tokens"),
        pytest.param({"size": torch.ones(2, 17, 2)}, id="two sizes a token"),
        pytest.param({"keys": torch.ones(2, 17, 12)}, id="keys without heads"),
        pytest.param({"keys": torch.ones(1, 1, 17, 12)}, id="keys of fewer samples"),
        pytest.param({"saliency": torch.ones(2, 16)}, id="saliency of fewer tokens"),
        pytest.param({"prefix": -1}, id="negative prefix"),
        pytest.param({"prefix": 9, "suffix": 9}, id="prefix and suffix overlap"),
    ],
)
@pytest.mark.parametrize("form", FORMS)
def test_tensors_that_do_not_match_are_refused(form, changed):
    with pytest.raises(InputError):
        FORMS[form](**example(**changed))


@pytest.mark.parametrize("form", FORMS)
def test_traced_results_have_the_shapes_of_real_ones(form):
    torch.library.opcheck(FORMS[form], (), example(), test_utils=("test_schema", "test_faketensor"))


@pytest.mark.parametrize("suffix", [0, 2])
@pytest.mark.parametrize("r", [0, 3, 50])
def test_its_flops_are_those_of_the_plain_operator(r, suffix):
    def flops(operator):
        with flop_counter() as counter:
            operator(**example(r=r, suffix=suffix))
        return counter.get_total_flops()

    assert flops(ops.nm_token_merge) == flops(ops.token_merge) and bool(flops(ops.token_merge)) == bool(r)
