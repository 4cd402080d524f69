"""One schema for each operator: torch's registration, the C++ kernels and the Python kernels agree with it."""

import inspect
import re

import pytest
import torch
from torch import fx

from mpcompile.kernels import autocast, ops, schema
from mpcompile.kernels.cpu import attention, build, merging
from mpcompile.kernels.nm_linear import operators
from mpcompile.kernels.nm_linear.gpu import launch

# Saved graphs hold these arguments by position: a change here makes artifacts unreadable.
SIGNATURES = {
    "masked_linear": "(Tensor x, Tensor weight, Tensor mask, Tensor? bias, int n, int m) -> Tensor",
    "masked_conv2d": "(Tensor x, Tensor weight, Tensor mask, Tensor? bias, int[] stride, int[] padding, "
    "int[] dilation, int groups, int n, int m) -> Tensor",
    "nm_linear": "(Tensor x, Tensor values, Tensor words, Tensor? bias, int n, int m, int k) -> Tensor",
    "nm_conv2d": "(Tensor x, Tensor values, Tensor words, Tensor? bias, int[] stride, int[] padding, "
    "int[] dilation, int groups, int n, int m, int[] shape) -> Tensor",
    "nm_gemm": "(Tensor x, Tensor values, Tensor index, Tensor? bias, Tensor? residual, int out, int n, int m, "
    "int layout, str activation) -> Tensor",
    "nm_mlp": "(Tensor x, Tensor values1, Tensor index1, Tensor? bias1, Tensor values2, Tensor index2, Tensor? bias2, "
    "Tensor? residual, int hidden, int out, int n1, int m1, int n2, int m2, int layout1, int layout2, str activation) "
    "-> Tensor",
    "nm_conv": "(Tensor x, Tensor values, Tensor index, Tensor? bias, Tensor? residual, int[] stride, int[] padding, "
    "int[] dilation, int n, int m, int[] shape, int layout, str activation) -> Tensor",
    "token_size": "(Tensor x, Tensor? mask=None) -> Tensor",
    "token_bias": "(Tensor size, Tensor logits, int start, int dim, int rows=1) -> Tensor",
    "token_merge": "(Tensor x, Tensor keys, Tensor size, int r, int prefix, int suffix=0, Tensor? saliency=None, "
    "float saliency_weight=0., float size_weight=0., bool keep_norm=False) -> (Tensor, Tensor, Tensor)",
    "token_saliency": "(Tensor query, Tensor? key, Tensor? size, int[] rows, float? scale=None, "
    "Tensor? bias=None) -> Tensor",
    "token_mean": "(Tensor x, Tensor size, int start, int dim, bool keepdim) -> Tensor",
    "token_follow": "(Tensor table, Tensor place, Tensor before, Tensor size, int start, int dim, int rank) -> Tensor",
    "token_pairs": "(Tensor table, Tensor place, Tensor before, Tensor size, int queries, int keys, bool counted) "
    "-> Tensor",
    "token_spread": "(Tensor x, Tensor place, int start, int dim) -> Tensor",
    "token_attention": "(Tensor query, Tensor key, Tensor value, Tensor size, int start, float dropout_p, "
    "float? scale, bool enable_gqa) -> Tensor",
    "nm_token_merge": "(Tensor x, Tensor keys, Tensor size, int r, int prefix, int suffix=0, Tensor? saliency=None, "
    "float saliency_weight=0., float size_weight=0., bool keep_norm=False) -> (Tensor, Tensor, Tensor)",
    "nm_attention": "(Tensor query, Tensor key, Tensor value, Tensor? bias=None, float? scale=None) -> Tensor",
}
PACKED = (schema.NmGemmArgs, schema.NmMlpArgs, schema.NmConvArgs)
NATIVE = (*PACKED, schema.NmAttentionArgs, schema.NmTokenMergeArgs)
CPP_TYPES = {
    "Tensor": r"const Tensor&",
    "Tensor?": r"const OptionalTensor&",
    "int[]": r"IntList",
    "int": r"int64_t",
    "float": r"double",
    "bool": r"bool",
    "str": r"StringView",
    "float?": r"std::optional<double>",
}


def test_signatures_are_those_of_saved_graphs() -> None:
    assert {name: args.signature() for name, args in schema.OPERATORS.items()} == SIGNATURES


@pytest.mark.parametrize("name", SIGNATURES)
def test_torch_has_registered_the_schema(name: str) -> None:
    args = schema.OPERATORS[name]
    names = [name, name + operators.GENERAL] if args in NATIVE else [name]
    for registered in names:
        found = getattr(torch.ops.mpcompile, registered).default._schema
        assert str(found) == f"mpcompile::{registered}{args.signature()}"
        assert tuple(argument.name for argument in found.arguments) == args.names()
    assert getattr(ops, name) is getattr(torch.ops.mpcompile, name).default


def _fields(signature: str) -> list[tuple[str, str]]:
    """(type, name) of each argument."""
    arguments = signature[1 : signature.index(") -> ")].split(", ")
    return [(kind, name.partition("=")[0]) for kind, name in (argument.split(" ") for argument in arguments)]


@pytest.mark.parametrize("args", NATIVE, ids=lambda args: args.operator)
def test_cpp_names_its_parameters_as_the_schema_does(args: type[schema.Args]) -> None:
    source = (build.NATIVE / "operators" / "ops.cpp").read_text(encoding="utf-8")
    function = re.search(rf'm\.impl\("{args.operator}", TORCH_FN\((\w+)\)\)', source)
    assert function is not None
    source += (build.NATIVE / "operators/tokens.h").read_text(encoding="utf-8")
    definition = re.search(rf"^(?:Tensor|MergeResult) {function[1]}\((.*?)\) {{$", source, re.M | re.S)
    assert definition is not None
    parameters = [" ".join(part.split()) for part in definition[1].split(",")]
    fields = _fields(args.signature())
    assert len(parameters) == len(fields)
    for parameter, (kind, name) in zip(parameters, fields, strict=True):
        assert re.fullmatch(rf"{CPP_TYPES[kind]} {name}", parameter), (parameter, kind, name)


@pytest.mark.parametrize("args", NATIVE, ids=lambda args: args.operator)
def test_compiled_cpp_has_the_types_of_the_schema(args: type[schema.Args]) -> None:
    """The types are those that torch derives from the compiled functions, not from their text."""
    assert operators.kernels() is not None
    assert build.operators() is not None
    dump = torch._C._dispatch_dump(f"mpcompile::{args.operator}")
    for key in ("CPU", "AutogradCPU"):
        line = next(line for line in dump.splitlines() if line.startswith(f"{key}: ") and "ops.cpp" in line)
        inferred = re.search(r":: \((.*?)\) -> (\w+|\(.*?\))", line)
        assert inferred is not None
        assert [part.split(" ")[0] for part in inferred[1].split(", ")] == [k for k, _ in _fields(args.signature())]
        assert re.sub(r" _\d", "", inferred[2]) == args.returns  # torch numbers several results


def test_python_kernels_name_their_parameters_as_the_schema_does() -> None:
    kernels = [(args, [kernel]) for args, kernel in ops._IMPLEMENTATIONS.items()]
    kernels += [(args, [kernel, formula]) for args, (kernel, _, formula) in operators._IMPLEMENTATIONS.items()]
    kernels.append((schema.NmAttentionArgs, [attention._attention, attention.plain]))
    kernels.append((schema.NmTokenMergeArgs, [merging._token_merge]))
    assert {args for args, _ in kernels} == set(schema.OPERATORS.values())
    for args, functions in kernels:
        for function in functions:
            parameters = inspect.signature(function).parameters.values()
            assert tuple(parameter.name for parameter in parameters) == args.names(), function
    assert launch.IMPLEMENTATIONS.keys() == {args.operator for args in PACKED} == autocast._RESIDUAL.keys()


def test_a_node_binds_by_position_and_by_name() -> None:
    graph = fx.Graph()
    x, size = graph.placeholder("x"), graph.placeholder("size")
    node = graph.call_function(ops.token_mean, (x, size), {"start": 1, "dim": 2, "keepdim": False})
    assert schema.bind(node) == schema.TokenMeanArgs(x, size, 1, 2, False)
    again = graph.call_function(ops.token_mean, tuple(schema.TokenMeanArgs.bind(node)))
    assert again.args == (x, size, 1, 2, False)
    assert again.args[schema.TokenMeanArgs.position("dim")] == 2
    assert schema.TokenSizeArgs.bind(graph.call_function(ops.token_size, (x,))).mask is None


def test_other_arguments_and_operators_are_refused() -> None:
    graph = fx.Graph()
    x = graph.placeholder("x")
    with pytest.raises(TypeError, match="keepdim"):
        schema.bind(graph.call_function(ops.token_mean, (x, x, 1, 2)))
    with pytest.raises(TypeError, match="other"):
        schema.bind(graph.call_function(ops.token_size, (x,), {"other": x}))
    for target in (torch.relu, torch.ops.aten.relu.default):
        with pytest.raises(KeyError):
            schema.bind(graph.call_function(target, (x,)))
    with pytest.raises(ValueError, match="residual"):
        schema.MaskedLinearArgs.position("residual")
