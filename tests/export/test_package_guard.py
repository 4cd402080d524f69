"""AOTInductor packages check their inputs, in a process that has only torch."""

import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from mpcompile import Config, export, transform
from mpcompile.errors import GraphError
from mpcompile.export import package_guard

SERVE = """import sys, torch
from safetensors.torch import load_file, save_file
assert "mpcompile" not in sys.modules
tensors, layouts, found = load_file("in"), eval(open("layouts").read()), {}
model = torch._inductor.aoti_load_package(sys.argv[1])
for name, tensor in tensors.items():
    x = layouts[name](tensor) if name in layouts else tensor
    try:
        y = model(x)
        found[name] = (y[0] if isinstance(y, (tuple, list)) else y).contiguous()
    except RuntimeError as error:
        print(name, str(error).splitlines()[0])
save_file(found, "out")
"""
LAYOUTS = """{
    "channels_last": lambda x: x.contiguous(memory_format=torch.channels_last),
    "expanded": lambda x: x.expand(2, -1, -1, -1),
    "sliced": lambda x: x[::2],
    "transposed": lambda x: x.transpose(2, 3),
    "sparse": lambda x: x.to_sparse(),
    "on meta": lambda x: x.to("meta"),
}"""
RIGHT = {
    "fits": (2, 3, 8, 8),
    "channels_last": (2, 3, 8, 8),
    "expanded": (1, 3, 8, 8),
    "sliced": (4, 3, 8, 8),
    "transposed": (2, 3, 8, 8),
}
WRONG = {
    "no image": (0, 3, 8, 8),
    "another size": (2, 3, 16, 16),
    "as many values": (2, 3, 4, 16),
    "an axis less": (3, 8, 8),
    "an axis more": (2, 3, 8, 8, 1),
    "a number": (),
    "sparse": (2, 3, 8, 8),
    "on meta": (2, 3, 8, 8),
}
DTYPES = (torch.float64, torch.float16, torch.bfloat16, torch.uint8, torch.int64, torch.bool)


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 8, 4, 4), nn.Flatten(), nn.Linear(32, 16), nn.ReLU(), nn.Linear(16, 4)).eval()


def laid_out(name, tensor):
    layout = eval(LAYOUTS).get(name)
    return tensor if layout is None else layout(tensor)


@pytest.mark.parametrize("free", [False, True], ids=["fixed", "free"])
def test_a_package_refuses_what_it_was_not_compiled_for(free, tmp_path):
    gm = transform(net(), torch.randn(2, 3, 8, 8), Config(pattern="2:4"))
    export.save_aoti(gm, torch.randn(2, 3, 8, 8), tmp_path / "p.pt2", engine="dense", dynamic_batch=free)
    batches = {f"batch {n}": (n, 3, 8, 8) for n in (1, 3, 5, export.MAX_BATCH, export.MAX_BATCH + 1)}
    inputs = {name: torch.randn(shape) for name, shape in (RIGHT | WRONG | batches).items()}
    inputs |= {str(dtype): inputs["fits"].to(dtype) for dtype in DTYPES}
    save_file({name: tensor.contiguous() for name, tensor in inputs.items()}, tmp_path / "in")
    (tmp_path / "layouts").write_text(LAYOUTS)
    done = subprocess.run(
        [sys.executable, "-c", SERVE, "p.pt2"], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    right = {*RIGHT, *(list(batches)[:-1] if free else ())}
    outputs = load_file(tmp_path / "out")
    assert set(outputs) == right
    with torch.no_grad():
        for name, found in outputs.items():
            torch.testing.assert_close(found, gm(laid_out(name, inputs[name])), rtol=1e-4, atol=1e-5)
    refusals = done.stdout.splitlines()
    assert len(refusals) == len(inputs) - len(right)
    batch = f"1 to {export.MAX_BATCH}" if free else "2"
    assert f"as many values input 0: expected float32 ({batch}, 3, 8, 8) on cpu, found (2, 3, 4, 16)" in refusals
    assert f"torch.int64 input 0: expected float32 ({batch}, 3, 8, 8) on cpu, found int64" in refusals


def test_without_a_place_for_checks_no_package_is_written(tmp_path, monkeypatch):
    from torch._inductor.codegen.cpp_wrapper_cpu import CppWrapperCpu

    gm = transform(net(), torch.randn(2, 3, 8, 8), Config(pattern="2:4"))
    monkeypatch.setattr(torch._inductor, "aoti_compile_and_package", lambda *_, package_path: None)
    monkeypatch.delattr(CppWrapperCpu, package_guard._HOOK)
    with pytest.raises(GraphError, match="cannot check their inputs"):
        export.save_aoti(gm, torch.randn(2, 3, 8, 8), tmp_path / "p.pt2", engine="dense")
    assert not list(tmp_path.iterdir())
