"""Dense products on packed panels: the layout, the kernel at every size of its tiles, and the choice of the engine."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from mpcompile.errors import InputError
from mpcompile.kernels import ops, timing
from mpcompile.kernels.cpu import build
from mpcompile.kernels.dispatch import CpuDenseEngine, LayerSpec, choose, choose_dense, engine_named
from mpcompile.kernels.nm_format import Pattern
from mpcompile.kernels.nm_linear import operators as native
from mpcompile.kernels.nm_linear import packed, panels

CPU = torch.device("cpu")
SPEC = LayerSpec((24, 40), torch.float32, CPU, Pattern(1, 1), inputs=(2, 5, 40))


@pytest.fixture(params=build._processor_isas())
def isa(request, monkeypatch):
    """Each instruction set in turn, as if the processor had no wider one."""
    loaded = build.load(request.param)
    monkeypatch.setattr(native, "kernels", lambda: loaded)
    native.use(loaded)
    yield request.param
    monkeypatch.undo()
    native.use(native.kernels())


@pytest.fixture(autouse=True)
def restore():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)
    timing.set_cost_model(None)


def product(x, weight, bias=None, residual=None, activation="none"):
    values, index = panels.pack(weight)
    return ops.nm_gemm(x, values, index, bias, residual, len(weight), 1, 1, panels.PANELS, activation)


def error(y, x, weight, *others):
    """The largest error of a product, in units of the sum of the sizes of its terms."""
    exact = x.double() @ weight.double().T + sum(o.double() for o in others)
    size = x.double().abs() @ weight.double().abs().T + sum(o.double().abs() for o in others)
    return float(((y - exact).abs() / size).max())


@given(out=st.integers(1, 70), columns=st.integers(1, 40))
@settings(deadline=None)
def test_panels_hold_the_weight(out, columns):
    weight = torch.randn(out, columns)
    values, index = panels.pack(weight)
    assert panels.fits(values.numel(), index.numel(), weight.shape) and not index.numel()
    assert torch.equal(panels.unpack(values, weight.shape), weight)
    padded = values.view(-1, columns, panels.OUTPUTS).transpose(1, 2).flatten(0, 1)
    assert not padded[out:].any()


def test_the_gradient_reaches_every_value_once():
    weight = torch.randn(20, 6)
    values = panels.pack(weight)[0].requires_grad_()
    (panels.unpack(values, weight.shape) * weight).sum().backward()
    assert torch.equal(panels.unpack(values.grad, weight.shape), weight)
    assert values.grad.count_nonzero() == weight.numel()


@pytest.mark.isa
@pytest.mark.parametrize("tokens", range(1, 31))
def test_every_number_of_rows(isa, tokens):
    """Tiles of all heights, with a whole and a cut vector of outputs at the end."""
    torch.manual_seed(tokens)
    for out in (5, 16, 37, 64):
        x, weight, bias = torch.randn(tokens, 50), torch.randn(out, 50), torch.randn(out)
        assert error(product(x, weight, bias), x, weight, bias) < 1e-6


@pytest.mark.isa
@pytest.mark.parametrize(("tokens", "columns", "out"), [(197, 768, 100), (600, 1000, 33), (30, 384, 96), (40, 385, 64)])
@pytest.mark.parametrize("threads", [1, 2, 3])
def test_blocks_of_channels_and_chunks_of_tokens(isa, tokens, columns, out, threads):
    torch.set_num_threads(threads)
    torch.manual_seed(columns)
    x, weight = torch.randn(tokens, columns), torch.randn(out, columns)
    bias, residual = torch.randn(out), torch.randn(tokens, out)
    assert error(product(x, weight, bias, residual), x, weight, bias, residual) < 1e-6


@pytest.mark.isa
@pytest.mark.parametrize("epilogue", packed.EPILOGUES)
def test_epilogues(isa, epilogue):
    torch.manual_seed(0)
    x, weight, bias, residual = torch.randn(2, 9, 20), torch.randn(19, 20), torch.randn(19), torch.randn(2, 9, 19)
    y = product(x, weight, bias, residual, epilogue)
    exact = packed.finish(F.linear(x.double(), weight.double(), bias.double()), residual.double(), epilogue)
    assert float((y - exact).abs().max()) < 1e-5


@pytest.mark.isa
def test_values_that_are_not_finite_stay_in_their_rows_and_columns(isa):
    x, weight = torch.randn(20, 33), torch.randn(40, 33)
    x[3, 32], x[19, 0], weight[17, 5] = torch.nan, torch.inf, torch.nan
    y = product(x, weight)
    touched = torch.zeros(20, 40, dtype=torch.bool)
    touched[3], touched[19], touched[:, 17] = True, True, True
    assert torch.equal(~y.isfinite(), touched)


def test_a_result_does_not_depend_on_the_number_of_threads():
    x, weight = torch.randn(197, 96), torch.randn(192, 96)
    results = []
    for threads in (1, 2, 5):
        torch.set_num_threads(threads)
        results.append(product(x, weight))
    assert all(torch.equal(a, b) for a, b in itertools.pairwise(results))


def test_two_products_in_a_row_are_an_mlp():
    x, one, two = torch.randn(10, 24), torch.randn(30, 24), torch.randn(24, 30)
    h = product(x, one, activation="gelu")
    values = (*panels.pack(one), None, *panels.pack(two), None, x, 30, 24, 1, 1, 1, 1, panels.PANELS, panels.PANELS)
    assert torch.equal(ops.nm_mlp(x, *values, "gelu"), product(h, two, residual=x))


@pytest.mark.parametrize("fault", ["short", "index", "dtype", "columns"])
def test_values_of_another_weight_are_refused(fault):
    x, (values, index) = torch.randn(4, 40), panels.pack(torch.randn(24, 40))
    if fault == "short":
        values = values[:-16]
    elif fault == "index":
        index = torch.zeros(4, dtype=torch.uint8)
    elif fault == "dtype":
        values = values.bfloat16()
    else:
        x = x[:, :39].contiguous()
    with pytest.raises(InputError, match="packed weights do not fit a weight"):
        ops.nm_gemm(x, values, index, None, None, 24, 1, 1, panels.PANELS, "none")


def test_a_convolution_has_no_panels():
    values, index = panels.pack(torch.randn(8, 8))
    with pytest.raises(InputError, match="no packed weight has these numbers"):
        axes = ([1, 1], [0, 0], [1, 1])
        ops.nm_conv(torch.randn(1, 8, 4, 4), values, index, None, None, *axes, 1, 1, [8, 8, 1, 1], 4, "none")


def test_without_kernels_plain_torch_computes_the_same(monkeypatch):
    x, weight, bias = torch.randn(5, 24), torch.randn(30, 24), torch.randn(30)
    expected = product(x, weight, bias)
    monkeypatch.setattr(native, "kernels", lambda: None)
    native.use(None)
    try:
        torch.testing.assert_close(product(x, weight, bias), expected)
    finally:
        monkeypatch.undo()
        native.use(native.kernels())


def modelled(**us):
    """Make the engines take these microseconds."""
    timing.set_cost_model(lambda name, spec, threads: us.get(name.replace(" ", "_")))


def test_the_fastest_runs_a_dense_layer():
    modelled(cpu_dense=10.0, dense=12.0, dense_prepacked=11.0)
    choice = choose_dense(SPEC)
    assert (choice.engine.name, choice.us, choice.dense_us) == ("cpu_dense", 10.0, 11.0)
    modelled(cpu_dense=12.0, dense=12.0, dense_prepacked=11.0)
    choice = choose_dense(SPEC)
    assert choice.engine.name == "dense" and "only 0.92x" in choice.why


def test_as_fast_is_enough_for_the_epilogue():
    modelled(cpu_dense=11.3, dense=12.0, dense_prepacked=11.0)
    assert choose_dense(SPEC).engine.name == "cpu_dense"


@pytest.mark.parametrize("name", ["dense", "reference", "gluon_mma_sp"])
def test_another_engine_that_was_asked_for_leaves_dense_layers_alone(name):
    modelled(cpu_dense=1.0, dense=12.0)
    choice = choose_dense(SPEC, name)
    assert choice.engine.name == "dense" and choice.why == f"engine {name} was asked for"


def test_the_engine_can_be_asked_for():
    modelled(cpu_dense=99.0, dense=1.0)
    assert choose_dense(SPEC, "cpu_dense").engine.name == "cpu_dense"


@pytest.mark.parametrize(
    ("us", "picked"),
    [
        ({"cpu": 9.6, "cpu_dense": 10.0, "dense": 12.0}, "cpu"),
        ({"cpu": 9.8, "cpu_dense": 10.0, "dense": 12.0}, "cpu_dense"),
        ({"cpu": 12.5, "cpu_dense": 12.5, "dense": 12.0}, "cpu_dense"),
        ({"cpu": 12.5, "cpu_dense": 12.7, "dense": 12.0}, "dense"),
    ],
)
def test_a_mask_has_to_beat_the_best_dense_product_our_own_among_them(us, picked):
    modelled(reference=99.0, **us)
    masked = LayerSpec((24, 40), torch.float32, CPU, Pattern(2, 4), inputs=(2, 5, 40))
    choice = choose(masked)
    assert choice.engine.name == picked and choice.dense_us == min(us["cpu_dense"], us["dense"])
    assert choice.us == (choice.dense_us if picked == "dense" else us[picked])


def test_nothing_is_chosen_untimed(monkeypatch):
    monkeypatch.setenv("MPCOMPILE_TIMING", "off")
    assert choose_dense(SPEC).why == "not timed: timing is off"
    assert "shape is unknown" in choose_dense(LayerSpec((24, 40), torch.float32, CPU, Pattern(1, 1))).why


@pytest.mark.parametrize(
    ("spec", "why"),
    [
        (LayerSpec((8, 8), torch.bfloat16, CPU, Pattern(1, 1)), "dtype bfloat16 (fp32 has a kernel)"),
        (LayerSpec((8, 8), torch.float32, torch.device("meta"), Pattern(1, 1)), "device meta"),
        (LayerSpec((8, 8, 1, 1), torch.float32, CPU, Pattern(1, 1), ([1, 1], [0, 0], [1, 1], 1)), "convolution"),
    ],
)
def test_what_it_does_not_support(spec, why):
    assert CpuDenseEngine().supports(spec) == why


def test_a_masked_weight_keeps_its_zeros():
    weight = torch.randn(24, 40)
    mask = torch.rand(24, 40) > 0.5
    engine = engine_named("cpu_dense")
    buffers = engine.pack(weight, mask, SPEC)
    target, args = engine.call(SPEC, torch.eye(40), buffers, None)
    assert torch.equal(target(*args), (weight * mask).T)
