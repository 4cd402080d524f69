"""Files that hold packed weights: numbers, indices and operators that would lead a kernel out of bounds are refused."""

from __future__ import annotations

import operator

import pytest
import torch
from torch import fx, nn

from mpcompile import load, save
from mpcompile.errors import ArtifactError
from mpcompile.ir.module import IRModule
from mpcompile.kernels import ops
from mpcompile.kernels.nm_linear import layouts
from mpcompile.kernels.nm_linear.layouts import ROWS
from mpcompile.plan import Plan
from tests.support.packed_layers import GEMM, layer, matrix


def network(build, **tensors):
    root, graph = nn.Module(), fx.Graph()
    for name, tensor in tensors.items():
        root.register_buffer(name, tensor)
    graph.output(build(graph, graph.placeholder("x")))
    gm = IRModule(root, graph)
    gm.plan = Plan()
    return gm


def product(graph, x, **changes):
    given = GEMM | changes
    return graph.call_function(ops.nm_gemm, (x, graph.get_attr("v"), graph.get_attr("i"), None, None, *given.values()))


def held(values=None, index=None):
    v, i = matrix()
    return {"v": v if values is None else values, "i": i if index is None else index}


def test_a_good_file(tmp_path):
    gm, x = network(product, **held()), torch.randn(4, 64)
    save(gm, tmp_path / "file")
    assert torch.equal(load(tmp_path / "file")(x), gm(x))


BAD = [{"n": 0}, {"n": 100, "m": 32}, {"n": 2**32}, {"m": -4}, {"out": -1}, {"out": 2**40}, {"layout": 9}]
BAD += [{"activation": "x"}, {"n": 2.0}, {"n": None}, {"out": [16]}]


@pytest.mark.parametrize("changes", BAD, ids=str)
def test_numbers_in_a_file(changes, tmp_path):
    with pytest.raises(ArtifactError, match=r"node nm_gemm_default: no"):
        save(network(lambda g, x: product(g, x, **changes), **held()), tmp_path / "file")


def test_an_index_that_packing_cannot_have_made(tmp_path):
    """It would read positions of a tile that no block fills, or columns of another partition."""
    v, i = matrix(16, 480, 16, 32)
    changed = {"n": 10, "m": 20}  # as many entries, in blocks of 80 columns
    with pytest.raises(ArtifactError, match="packed weights"):
        save(network(lambda g, x: product(g, x, **changed), v=v, i=i), tmp_path / "file")
        load(tmp_path / "file")
    v, i = matrix()
    twice, elsewhere = int(i[1]), (int(i[0]) + 4) % 64  # a place of the same row again, and one of another group
    for place, wrong in ((0, twice), (0, elsewhere), (31, 64), (31, 95)):
        bad = i.clone()
        bad[place] = wrong
        with pytest.raises(ArtifactError, match=r"is not 2:4|outside"):
            save(network(product, **held(v, bad)), tmp_path / "file")
            load(tmp_path / "file")


@pytest.mark.parametrize(("n", "m"), [(1, 1), (1, 2), (1, 3), (2, 4), (5, 9), (31, 32), (32, 32)])
def test_an_index_is_checked_with_or_without_its_number_of_columns(n, m):
    for groups in (1, 2, 3, 5, 48, 97):
        for out in (1, 5):
            _, index = matrix(out, m * groups, n, m)
            layouts.check_places(index, (out, None), n, m)
            layouts.check_places(index, (out, m * groups), n, m)


def test_numbers_that_a_graph_computes(tmp_path):
    def build(graph, x):
        return product(graph, x, out=graph.call_method("size", (x, 0)))

    with pytest.raises(ArtifactError, match="no packed weight has these numbers"):
        save(network(build, **held()), tmp_path / "file")


READERS = {
    "aten": lambda g, x, i: g.call_function(torch.ops.aten.fill_.Scalar, (i, 255)),
    "method": lambda g, x, i: g.call_method("fill_", (i, 255)),
    "view": lambda g, x, i: g.call_method("view", (i, -1)),
    "function": lambda g, x, i: g.call_function(torch.add, (i, 1)),
    "in place": lambda g, x, i: g.call_function(operator.iadd, (i, 1)),
    "attribute": lambda g, x, i: g.call_function(getattr, (i, "T")),
    "keyword": lambda g, x, i: g.call_method("copy_", (x,), {"src": i}),
    "list": lambda g, x, i: g.call_function(torch.cat, ([i, i],)),
}


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("name", ["i", "v", "twin"])
def test_no_other_operator_reads_a_packed_weight(reader, name, tmp_path):
    def build(graph, x):
        READERS[reader](graph, x, graph.get_attr(name))
        return product(graph, x)

    tensors = held()
    with pytest.raises(ArtifactError, match="a packed weight"):
        save(network(build, **tensors, twin=tensors["i"]), tmp_path / "file")


def test_a_packed_weight_is_not_an_output_a_bias_or_a_layers_parameter(tmp_path):
    def output(graph, x):
        return (product(graph, x), graph.get_attr("i"))

    def bias(graph, x):
        v = graph.get_attr("v")
        return graph.call_function(ops.nm_gemm, (x, v, graph.get_attr("i"), v, None, *GEMM.values()))

    for build in (output, bias):
        with pytest.raises(ArtifactError, match="a packed weight"):
            save(network(build, **held()), tmp_path / "file")
    gm = network(product, **held(values=torch.zeros(4), index=torch.zeros(4, dtype=torch.uint8)))
    gm.norm = nn.BatchNorm1d(4)
    gm.norm.running_mean = gm.v
    with pytest.raises(ArtifactError, match="layer norm holds v, a packed weight"):
        save(gm, tmp_path / "file")


@pytest.mark.parametrize(
    ("kernel", "n", "m"), [((3, 3), 10, 20), ((5, 5), 15, 30), ((3, 3), 9, 21), ((7, 7), 15, 31), ((3, 3), 2, 4)]
)
def test_convolutions_round_trip_through_a_file(kernel, n, m, tmp_path):
    shape = [6, m, *kernel]
    v, i = layouts.pack(*layer(shape, n, m, torch.float32), n, m, ROWS)
    rest = ([1, 1], [1, 1], [1, 1], n, m, shape, ROWS, "none")

    def build(graph, x):
        return graph.call_function(ops.nm_conv, (x, graph.get_attr("v"), graph.get_attr("i"), None, None, *rest))

    gm, x = network(build, v=v, i=i), torch.randn(1, m, 12, 12)
    save(gm, tmp_path / "file")
    assert torch.equal(load(tmp_path / "file")(x), gm(x))
    gm.i[-1] = 255
    save(gm, tmp_path / "file")
    with pytest.raises(ArtifactError, match="outside its block"):
        load(tmp_path / "file")
    with pytest.raises(ArtifactError, match="do not fit"):
        save(network(build, v=v[:-4], i=i[:-4]), tmp_path / "file")
        load(tmp_path / "file")
