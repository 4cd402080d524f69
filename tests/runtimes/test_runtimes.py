"""Other runtimes: the interface with a fake one, and the real ones on a merged transformer."""

import importlib.util
import subprocess
import sys

import numpy as np
import pytest
import torch
from torch import nn

from mpcompile import Config, transform
from mpcompile.errors import ConfigError, InputError
from mpcompile.runtimes import catalogue
from mpcompile.runtimes.base import Build, Port
from mpcompile.runtimes.catalogue import RUNTIMES, build, named
from tests.support.helpers import images, relative, tiny_vit


def test_a_shorter_batch_is_filled_up_and_its_outputs_are_cut():
    seen = []

    def run(feed):
        seen.append(feed["x"])
        return [feed["x"].sum(1), np.float32(3)]

    double = Build("Double", "1", "int8", (Port("x", (4, 2)),), ("sums", "constant"), run)
    outputs = double(torch.tensor([[1.0, 2.0], [3.0, 4.0]]))
    assert double.name == "Double int8" and seen[0][:, 0].tolist() == [1, 3, 3, 3]
    assert outputs["sums"].tolist() == [3, 7] and outputs["constant"] == 3
    free = Build("Double", "1", "fp32", (Port("x", (None, 2)),), ("sums", "constant"), run)
    assert free(x=torch.ones(7, 2))["sums"].shape == (7,)
    for wrong in (torch.ones(5, 2), torch.ones(2, 3), torch.ones(0, 2), torch.ones(2)):
        with pytest.raises(InputError, match=r"another shape of its input 'x'; expected \(4, 2\)"):
            double(wrong)
    with pytest.raises(InputError, match="the input 'x' is missing"):
        double(y=torch.ones(4, 2), z=torch.ones(4, 2))


@pytest.mark.parametrize("name", RUNTIMES)
def test_a_missing_package_is_an_error_that_names_the_extra(name, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda package: None)
    with pytest.raises(ConfigError, match=rf"needs the package {name}. Run pip install 'mpcompile\[(onnx|openvino)\]'"):
        named([name])


def test_an_unknown_runtime_is_refused():
    with pytest.raises(ConfigError, match="one of onnxruntime, openvino, found 'onnxrt'"):
        build(nn.Linear(2, 2), torch.ones(1, 2), "onnxrt")


def test_a_precision_that_a_runtime_lacks_is_refused():
    with pytest.raises(ConfigError, match="ONNX Runtime does not run int8 here; expected fp32"):
        build(nn.Linear(2, 2), torch.ones(1, 2), "onnxruntime", "int8")


@pytest.fixture(params=["onnxruntime", "openvino"])
def runtime(request):
    pytest.importorskip(request.param)
    return request.param


@pytest.mark.parametrize("merged", [False, True])
def test_a_model_in_a_runtime_computes_the_same(runtime, merged):
    model, x = tiny_vit(), images(3)
    graph = transform(model, x, Config(pattern="2:4", tome_r=3, score="magnitude")) if merged else model
    weights = {name: tensor.clone() for name, tensor in graph.state_dict().items()}
    found = build(graph, x, runtime, threads=1)
    assert found.version and found.weight_bytes is None
    with torch.no_grad():
        assert relative(found(x), graph(x)) < 1e-5
        assert relative(found(x[:2]), graph(x[:2])) < 1e-5
    assert all(torch.equal(tensor, weights[name]) for name, tensor in graph.state_dict().items())


def test_every_runtime_gets_the_number_of_threads(runtime, monkeypatch):
    """Threads are a setting of the session in the one, of the compiled model in the other."""
    library = importlib.import_module(runtime)
    given = []
    if runtime == "onnxruntime":
        session = library.InferenceSession
        monkeypatch.setattr(
            library,
            "InferenceSession",
            lambda path, options, providers: (
                given.append(options.intra_op_num_threads) or session(path, options, providers)
            ),
        )
    else:
        core = library.Core

        class Counting(core):
            def compile_model(self, model, device, options):
                given.append(options["INFERENCE_NUM_THREADS"])
                return super().compile_model(model, device, options)

        monkeypatch.setattr(library, "Core", Counting)
    build(nn.Linear(4, 2), torch.ones(1, 4), runtime, threads=3)
    build(nn.Linear(4, 2), torch.ones(1, 4), runtime)
    assert given == [3, torch.get_num_threads()]


def test_int8_in_openvino():
    pytest.importorskip("openvino")
    pytest.importorskip("nncf")
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 8)).eval()
    x = torch.randn(16, 64)
    found = build(model, x, "openvino", "int8", threads=1, calibration=[((x,), {}), ((x[:5],), {})])
    assert found.name == "OpenVINO int8"
    assert 1e-5 < relative(found(x), model(x)) < 0.1
    parameters = sum(p.numel() for p in model.parameters())
    assert parameters < found.weight_bytes < 2 * parameters
    with pytest.raises(ConfigError, match="int8 needs calibration data"):
        build(model, x, "openvino", "int8")


ENDING = """
import faulthandler, os, signal, torch
from torch import nn
from mpcompile.runtimes.catalogue import build
faulthandler.enable()  # as pytest does: it needs a signal stack of its own
signal.signal(signal.SIGUSR1, lambda *_: print("handled"))  # such handlers run on that stack, like a loader's
model, x = nn.Sequential(nn.Linear(8, 8)).eval(), torch.ones(1, 8)
for _ in range(2):
    first, second = (build(model, x, "openvino") for _ in range(2))
    del first
    third = build(model, x, "openvino")
    del second, third
os.kill(os.getpid(), signal.SIGUSR1)
"""


def test_signals_are_handled_after_openvino_has_gone():
    pytest.importorskip("openvino")
    ended = subprocess.run([sys.executable, "-c", ENDING], check=False, capture_output=True, text=True, timeout=300)
    assert (ended.returncode, ended.stdout) == (0, "handled\n"), ended.stderr


def test_a_dense_model_is_exported_with_all_of_its_tokens(monkeypatch):
    """What a user would export: dead tokens are computed, unlike in our own builds."""
    import onnx

    counts = []

    def noted(path, *rest):
        shapes = onnx.shape_inference.infer_shapes(onnx.load(path)).graph.value_info
        counts.append(sum([d.dim_value for d in v.type.tensor_type.shape.dim] == [2, 17, 128] for v in shapes))
        return load(path, *rest)

    load = RUNTIMES["onnxruntime"].load
    monkeypatch.setattr(RUNTIMES["onnxruntime"], "load", noted)
    model, x = tiny_vit(), images(2)
    catalogue.build(model, x, "onnxruntime")
    catalogue.build(transform(model, x, Config(pattern="dense")), x, "onnxruntime")
    assert counts[0] == 2 * counts[1] > 0  # hidden layers of the MLPs, of two blocks and of one
