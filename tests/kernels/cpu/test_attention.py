"""``nm_attention`` against attention in float64 and torch's own, on every instruction set that this processor has."""

import os

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch._subclasses import FakeTensorMode

from mpcompile.errors import InputError
from mpcompile.kernels import ops, timing
from mpcompile.kernels.cpu import attention, build
from mpcompile.kernels.cpu.attention import AttentionSpec
from mpcompile.kernels.nm_linear import operators as native

ISAS = build._processor_isas()
GENERAL = torch.ops.mpcompile.nm_attention_general
INF, NAN = float("inf"), float("nan")
MANY = settings(
    max_examples=int(os.environ.get("MPCOMPILE_TEST_EXAMPLES", "60")),
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)


@pytest.fixture(params=ISAS)
def isa(request, monkeypatch):
    """Each instruction set in turn, as if the processor had no wider one."""
    loaded = build.load(request.param, os.environ.get("MPCOMPILE_SANITIZE") == "1")
    monkeypatch.setattr(native, "kernels", lambda: loaded)
    native.use(loaded)
    yield request.param
    monkeypatch.undo()
    native.use(native.kernels())


@pytest.fixture
def no_python(monkeypatch):
    """Make the operator in Python fail."""
    assert native.kernels() is not None
    assert build.operators() is not None
    monkeypatch.setattr(attention, "_runs", lambda *_: pytest.fail("the operator in Python was called"))


TOKENS = st.sampled_from([1, 2, 5, 16, 17, 24, 25, 64, 97, 101, 130, 197])
DIMS = st.sampled_from([1, 3, 8, 16, 20, 32, 64, 72, 80, 128])


@st.composite
def problems(draw):
    batch, heads = draw(st.sampled_from([(1, 1), (1, 3), (2, 2), (3, 1)]))
    queries, keys, dim = draw(TOKENS), draw(TOKENS), draw(DIMS)
    layout = draw(st.sampled_from(["projection", "contiguous", "strided", "expanded"]))
    bias = draw(st.sampled_from([None, "key", "query", "head", "full", "column"]))
    return {
        "batch": batch,
        "heads": heads,
        "queries": keys if layout == "projection" else queries,
        "keys": keys,
        "dim": dim,
        "value_dim": dim if layout == "projection" else draw(st.sampled_from([dim, 1, 24])),
        "layout": layout,
        "bias": bias,
        "scale": draw(st.sampled_from([None, 0.25, -0.5, 0.0])),
        "threads": draw(st.sampled_from([1, 2, 3])),
        "seed": draw(st.integers(0, 1 << 20)),
    }


def tensors(p):
    """Queries, keys and values as views of a memory layout, and the bias."""
    torch.manual_seed(p["seed"])
    batch, heads, queries, keys = p["batch"], p["heads"], p["queries"], p["keys"]
    shapes = [(batch, heads, queries, p["dim"]), (batch, heads, keys, p["dim"]), (batch, heads, keys, p["value_dim"])]
    if p["layout"] == "projection":
        made = list(torch.randn(batch, keys, 3, heads, p["dim"]).permute(2, 0, 3, 1, 4))
    elif p["layout"] == "contiguous":
        made = [torch.randn(shape) for shape in shapes]
    elif p["layout"] == "strided":  # channels apart, and one more token and head between
        made = [torch.randn(b, h + 1, t + 1, 2 * c)[:, 1:, :-1, ::2] for b, h, t, c in shapes]
    else:
        made = [torch.randn(1, h, t, c).expand(b, -1, -1, -1) for b, h, t, c in shapes]
    sizes = {
        "key": (batch, 1, 1, keys), "query": (1, 1, queries, keys), "head": (1, heads, queries, keys),
        "full": (batch, heads, queries, keys), "column": (batch, 1, queries, 1),
    }  # fmt: skip
    return made, None if p["bias"] is None else torch.randn(sizes[p["bias"]])


def exact(q, k, v, bias=None, scale=None):
    return attention.plain(q.double(), k.double(), v.double(), None if bias is None else bias.double(), scale)


@MANY
@given(p=problems())
def test_any_shape_and_layout(isa, p):
    (q, k, v), bias = tensors(p)
    before = torch.get_num_threads()
    torch.set_num_threads(p["threads"])
    try:
        y, general = ops.nm_attention(q, k, v, bias, p["scale"]), GENERAL(q, k, v, bias, p["scale"])
    finally:
        torch.set_num_threads(before)
    assert y.dtype is torch.float32 and y.shape == (*q.shape[:3], v.shape[-1])
    assert y.transpose(1, 2).is_contiguous()
    largest = float((q @ k.transpose(-1, -2)).abs().max()) * (
        p["dim"] ** -0.5 if p["scale"] is None else abs(p["scale"])
    )
    torch.testing.assert_close(y.double(), exact(q, k, v, bias, p["scale"]), atol=3e-6 + 1e-6 * largest, rtol=0)
    assert torch.equal(general, y)
    with FakeTensorMode() as mode:
        fakes = [None if t is None else mode.from_tensor(t) for t in (q, k, v, bias)]
        fake = ops.nm_attention(*fakes, p["scale"])
    assert (fake.shape, fake.stride(), fake.dtype) == (y.shape, y.stride(), y.dtype)


def test_many_keys_and_large_scores(isa):
    """Scores of several hundred, which exp() in float32 could not take without the largest subtracted."""
    torch.manual_seed(0)
    q, k, v = (scale * torch.randn(1, 2, tokens, 32) for tokens, scale in ((40, 8), (2500, 8), (2500, 1)))
    got, want = ops.nm_attention(q, k, v), exact(q, k, v)
    assert float((q @ k.transpose(-1, -2)).max()) / 32**0.5 > 200
    torch.testing.assert_close(got.double(), want, atol=1e-4, rtol=0)  # scores of 200 have an error of 1e-5


def test_weights_are_those_of_softmax(isa):
    """With values that pick a key each, the output is the softmax itself, small weights included."""
    scores = torch.linspace(-100, 0, 128)
    q, k, v = torch.ones(1, 1, 1, 1), scores.reshape(1, 1, -1, 1), torch.eye(128)[None, None]
    got, want = ops.nm_attention(q, k, v, scale=1.0).flatten(), scores.double().softmax(0)
    normal = scores > -87
    error = (got[normal].double() / want[normal] - 1).abs()
    assert bool((error < 4e-7 - 7e-8 * scores[normal]).all())
    assert bool((got[~normal].double() <= want[~normal] * 1.001).all())


@pytest.mark.parametrize("tokens", [3, 17, 64])
@pytest.mark.parametrize(
    ("where", "value"),
    [("q", NAN), ("q", INF), ("q", -INF), ("k", NAN), ("k", INF), ("v", NAN), ("v", INF), ("bias", NAN), ("bias", INF)],
)
def test_values_that_are_not_finite_go_where_torch_lets_them(isa, tokens, where, value):
    torch.manual_seed(0)
    operands = {
        name: torch.rand(1, 2, tokens, 8) + 0.1 for name in ("q", "k", "v")
    }  # no zeros, which times inf are NaN
    operands["bias"] = torch.randn(1, 1, tokens, tokens)
    operands[where][0, 0, 1, 2] = value
    got, want = ops.nm_attention(*operands.values()), attention.plain(*operands.values())
    assert torch.equal(got.isnan(), want.isnan()) and torch.equal(got.isinf(), want.isinf())
    torch.testing.assert_close(got, want, equal_nan=True, atol=1e-6, rtol=1e-5)
    assert bool(got[0, 1].isfinite().all()) or where == "bias"


def test_hidden_keys(isa):
    """Keys hidden by -inf have no weight, however large; a query that sees none yields zeros, as in torch."""
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 1, 2, 21, 16)
    bias = torch.zeros(1, 1, 21, 21)
    bias[..., 3], bias[0, 0, 5] = -INF, -INF
    v[:, :, 3] = 1e30
    got = ops.nm_attention(q, k, v, bias)
    assert bool((got[:, :, 5] == 0).all()) and float(got.abs().max()) < 10
    torch.testing.assert_close(got, attention.plain(q, k, v, bias), atol=2e-6, rtol=0)


def test_plain_calls_run_no_python(no_python):
    qkv, bias = torch.randn(2, 9, 3, 4, 8), torch.randn(2, 1, 1, 9)
    q, k, v = qkv.permute(2, 0, 3, 1, 4)
    for mode in (torch.no_grad, torch.inference_mode, torch.enable_grad):
        with mode():
            assert ops.nm_attention(q, k, v, bias).shape == (2, 4, 9, 8)
    with pytest.raises(BaseException, match="in Python was called"):
        ops.nm_attention(q, k, v[..., ::2])


@pytest.mark.parametrize("shapes", [((2, 0, 4), (2, 3, 4)), ((2, 3, 4), (2, 0, 4)), ((0, 3, 4), (0, 3, 4))])
def test_empty_tensors(shapes):
    (batch, queries, dim), (_, keys, _) = shapes
    q, k = torch.randn(batch, 2, queries, dim), torch.randn(batch, 2, keys, dim)
    for operator in (ops.nm_attention, GENERAL):
        assert torch.equal(operator(q, k, k), attention.plain(q, k, k))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_dtypes_run_torchs_attention(dtype):
    q, k, v = torch.randn(3, 2, 3, 9, 8).to(dtype)
    assert torch.equal(ops.nm_attention(q, k, v), attention.plain(q, k, v))


def test_expanded_operands_of_any_size_take_no_memory():
    """The kernel packs keys: it leaves those that are larger than their memory to torch, which fails or not."""
    assert not attention._runs(torch.randn(1, 1, 1, 8), *[torch.randn(1, 1, 1, 1).expand(1, 1, 1 << 40, 8)] * 2)
    assert attention.supports(AttentionSpec((1, 1, 1, 8), (1, 1, 1 << 20, 8), torch.float32, torch.device("cpu")))


@pytest.mark.parametrize("gradient", ["q", "k", "v", "bias", "all"])
def test_gradients_are_torchs(gradient):
    torch.manual_seed(0)
    operands = {name: torch.randn(2, 2, 5, 4) for name in ("q", "k", "v")} | {"bias": torch.randn(2, 1, 1, 5)}
    for name, tensor in operands.items():
        tensor.requires_grad_(gradient in (name, "all"))
    wanted = [t for t in operands.values() if t.requires_grad]
    upstream = torch.randn(2, 2, 5, 4)
    got = torch.autograd.grad(ops.nm_attention(*operands.values()), wanted, upstream)
    want = torch.autograd.grad(attention.plain(*operands.values()), wanted, upstream)
    for one, other in zip(got, want, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q": (2, 5, 4)}, "tensors of heads"),
        ({"k": (2, 2, 5, 3)}, "do not match"),
        ({"k": (2, 1, 5, 4)}, "do not match"),
        ({"v": (2, 2, 6, 4)}, "do not match"),
        ({"bias": (2, 2, 5, 6)}, "the bias does not match"),
        ({"bias": (5, 5)}, "the bias does not match"),
    ],
)
def test_operands_that_do_not_match_are_refused(change, message):
    shapes = {"q": (2, 2, 5, 4), "k": (2, 2, 5, 4), "v": (2, 2, 5, 4), "bias": (2, 1, 5, 5)} | change
    with pytest.raises(InputError, match=message):
        ops.nm_attention(*(torch.randn(shape) for shape in shapes.values()))


def test_operands_of_two_dtypes_are_refused():
    q, k, v = torch.randn(3, 1, 1, 5, 4)
    with pytest.raises(InputError, match="one floating dtype"):
        ops.nm_attention(q, k.double(), v)
    with pytest.raises(InputError, match="the bias does not match"):
        ops.nm_attention(q, k, v, torch.zeros(1, 1, 5, 5, dtype=torch.bool))


def test_autocast_leaves_it_in_its_own_dtype():
    q, k, v = torch.randn(3, 1, 2, 5, 4)
    with torch.autocast("cpu", torch.bfloat16):
        for operator in (ops.nm_attention, GENERAL):
            assert operator(q, k, v).dtype is torch.float32


def test_without_a_kernel_torchs_attention_runs(monkeypatch):
    monkeypatch.setattr(native, "kernels", lambda: None)
    native.use(None)
    try:
        q, k, v = torch.randn(2, 7, 3, 2, 8).permute(2, 0, 3, 1, 4)
        y = ops.nm_attention(q, k, v)
        assert torch.equal(y, F.scaled_dot_product_attention(q, k, v)) and y.transpose(1, 2).is_contiguous()
    finally:
        monkeypatch.undo()
        native.use(native.kernels())


SPEC = AttentionSpec((1, 3, 197, 64), (1, 3, 197, 64), torch.float32, torch.device("cpu"))


@pytest.mark.parametrize(("ours", "faster"), [(50.0, True), (99.0, False)])
def test_the_faster_one_is_chosen(monkeypatch, ours, faster):
    monkeypatch.setattr(timing, "compare", lambda key, calls: {attention.NAME: ours, attention.TORCH: 100.0})
    choice = attention.choose(SPEC)
    assert (choice.native, choice.us, choice.torch_us) == (faster, ours, 100.0)
    assert choice.why == ("2.00x as fast" if faster else "only 1.01x as fast")


def test_both_are_timed_once_and_remembered(monkeypatch, tmp_path):
    monkeypatch.setenv("MPCOMPILE_CACHE", str(tmp_path))
    monkeypatch.delenv("MPCOMPILE_TIMING", raising=False)
    monkeypatch.setattr(timing, "_MODEL", None)
    monkeypatch.setattr(timing, "_MEMORY", {})
    small = AttentionSpec((1, 2, 9, 8), (1, 2, 9, 8), torch.float32, torch.device("cpu"), (1, 1, 1, 9))
    first = attention.choose(small)
    assert first.us is not None and first.us > 0 and first.torch_us is not None and first.torch_us > 0
    monkeypatch.setattr(timing, "_MEMORY", {})
    monkeypatch.setattr(attention, "_calls", lambda spec: pytest.fail("timed again"))
    again = attention.choose(small)
    assert again == first


def test_torchs_runs_where_nothing_is_timed(monkeypatch):
    monkeypatch.setenv("MPCOMPILE_TIMING", "off")
    assert attention.choose(SPEC) == attention.AttentionChoice(False, "nothing was timed")
    assert attention.choose(SPEC, timed=False) == attention.AttentionChoice(True, "asked for")
