"""Lowering ahead of time, and native operators through torch.compile, torch.export and a saved file."""

import gc

import pytest
import torch
from torch import nn

import mpcompile
from mpcompile import Config, export, transform
from mpcompile.artifact import opset
from mpcompile.backend import mpsparse
from mpcompile.errors import ArtifactError
from mpcompile.kernels import ops
from mpcompile.kernels.nm_linear.operators import GENERAL
from tests.support.helpers import convolutional, images, mlp, relative, tiny_vit


def wide_vit():
    return tiny_vit(embed_dim=64)


MODELS = {
    "vit": (wide_vit, images, {"tome_r": 3}),
    "resnet18": (lambda: convolutional("resnet18"), lambda b: images(b, 64), {}),
    "mlp": (mlp, lambda b: torch.randn(b, 32), {}),
}


@pytest.mark.parametrize(("name", "pattern"), [("vit", "auto"), ("vit", "2:4"), ("mlp", "auto"), ("resnet18", "auto")])
def test_lower_equals_the_masked_module(name, pattern):
    make, data, options = MODELS[name]
    gm = transform(make(), data(2), Config(pattern, score="magnitude", **options)).eval()
    lowered = mpcompile.lower(gm, data(2), Config(engine="cpu"))
    assert not any(node.target in ops.MASKED for node in lowered.graph.nodes)
    assert any(node.target in ops.NATIVE for node in lowered.graph.nodes)
    with torch.no_grad():
        for batch in (1, 3):
            x = data(batch)
            assert relative(lowered(x), gm(x)) < 1e-5


def test_lower_masks_a_dense_model():
    lowered = mpcompile.lower(mlp(), torch.randn(2, 32), Config("8:16", engine="cpu"))
    assert lowered.plan.masked == ["0", "2"]


def test_bytes_with_the_source_deleted():
    """At 50 % in fp32, a model with few other layers than masked ones takes at most 66 % of its dense bytes."""
    model = tiny_vit(embed_dim=256, num_heads=4)
    dense = sum(p.nbytes for p in model.parameters())
    gm = transform(model, images(2), Config("auto", score="magnitude"))
    lowered = mpcompile.lower(gm, images(2), Config(engine="cpu"))
    del model, gm
    gc.collect()
    kept = sum(t.nbytes for t in [*lowered.parameters(), *lowered.buffers()])
    assert kept < 0.66 * dense


def test_save_and_load(tmp_path):
    gm = transform(wide_vit(), images(2), Config("8:16", score="magnitude"))
    lowered = mpcompile.lower(gm, images(2), Config(engine="cpu"))
    mpcompile.save(lowered, tmp_path / "lowered.mpc")
    again = mpcompile.load(tmp_path / "lowered.mpc")
    with torch.no_grad():
        assert torch.equal(again(images(3)), lowered(images(3)))


def test_a_file_cannot_make_a_kernel_read_out_of_bounds(tmp_path):
    gm = transform(mlp(), torch.randn(2, 32), Config("8:16", score="magnitude"))
    lowered = mpcompile.lower(gm, torch.randn(2, 32), Config(engine="cpu"))
    lowered.get_buffer("packed.0.index")[3] = 250
    mpcompile.save(lowered, tmp_path / "bad.mpc")
    with pytest.raises(ArtifactError, match="outside its block"):
        mpcompile.load(tmp_path / "bad.mpc")


def test_a_file_cannot_call_the_inner_operators():
    """The arguments of inner operators are not checked; only those of the public operators are."""
    for name in ("nm_gemm", "nm_mlp", "nm_conv"):
        assert opset.function_of(f"mpcompile.{name}.default") is getattr(ops, name)
        assert opset.function_of(f"mpcompile.{name}{GENERAL}.default") is None


def test_layers_whose_names_differ_in_a_dot():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = nn.Sequential()
            self.a.add_module("b", nn.Linear(32, 32))
            self.a_b = nn.Linear(32, 32)
            self.head = nn.Linear(32, 4)

        def forward(self, x):
            return self.head(self.a_b(self.a.b(x).relu()).relu())

    torch.manual_seed(0)
    gm = transform(Net().eval(), torch.randn(2, 32), Config(score="magnitude"))
    lowered = mpcompile.lower(gm, torch.randn(2, 32), Config(engine="cpu"))
    x = torch.randn(5, 32)
    assert relative(lowered(x), gm(x)) < 1e-6


@pytest.mark.parametrize("frozen", [False, True])
def test_frozen_and_live_builds(frozen):
    torch._dynamo.reset()
    gm = transform(wide_vit(), images(2), Config("8:16", score="magnitude", tome_r=3)).eval()
    compiled = torch.compile(gm, backend=mpsparse, options={"frozen": frozen, "engine": "cpu"})
    with torch.no_grad():
        assert relative(compiled(images(2)), gm(images(2))) < 1e-5
        if not frozen:
            # Another mask of the same pattern: pairs need another number of entries, and the buffers are resized.
            for name in gm.plan.masked:
                layer = gm.get_submodule(name)
                layer.mask.copy_(layer.mask.flip(1))
            assert relative(compiled(images(2)), gm(images(2))) < 1e-5
    torch._dynamo.reset()


def test_bf16_masks_that_change():
    torch._dynamo.reset()
    gm = transform(mlp().bfloat16(), torch.randn(2, 32).bfloat16(), Config("8:16", score="magnitude")).eval()
    compiled = torch.compile(gm, backend=mpsparse, options={"engine": "cpu"})
    x = torch.randn(5, 32).bfloat16()
    with torch.no_grad():
        assert relative(compiled(x), gm(x)) < 1e-2
        layer = gm.get_submodule("0")
        mask = torch.zeros_like(layer.mask)
        mask.unflatten(1, (-1, 16))[..., ::2] = True  # no two neighbours: other pairs than before
        layer.mask.copy_(mask)
        assert relative(compiled(x), gm(x)) < 1e-2
    torch._dynamo.reset()


def test_fullgraph_and_export(tmp_path):
    gm = transform(wide_vit(), images(2), Config("8:16", score="magnitude"))
    lowered = mpcompile.lower(gm, images(2), Config(engine="cpu"))
    program = torch.export.export(lowered, (images(2),))
    targets = {str(node.target) for node in program.graph.nodes}
    assert {"mpcompile.nm_gemm.default", "mpcompile.nm_mlp.default"} <= targets
    torch.export.save(program, tmp_path / "program.pt2")
    again = torch.export.load(tmp_path / "program.pt2").module()
    with torch.no_grad():
        assert relative(again(images(2)), lowered(images(2))) < 1e-6


def test_aot_inductor(tmp_path):
    gm, x = transform(mlp(), torch.randn(2, 32), Config("8:16", score="magnitude")), torch.randn(2, 32)
    export.save_aoti(gm, x, tmp_path / "model.pt2", engine="cpu")
    assert [path.name for path in tmp_path.iterdir()] == ["model.pt2"]
    with torch.no_grad():
        assert relative(export.run_exported(tmp_path / "model.pt2", "aoti", x), gm(x)) < 1e-6
