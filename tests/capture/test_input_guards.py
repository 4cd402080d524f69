"""The check of inputs of captured graphs: other sizes are right or refused, in every form that a module takes."""

import copy
import pickle

import pytest
import torch
from torch import nn

from mpcompile import Config, load, lower, save, transform
from mpcompile.capture.importers import import_model
from mpcompile.errors import InputError
from mpcompile.layers import InputGuard

FREE = torch.export.Dim.AUTO


class Tokens(nn.Module):
    """Patches behind a class token: the batch is written into the expand of a static export."""

    def __init__(self):
        super().__init__()
        self.stem, self.head = nn.Conv2d(3, 16, 4, 4), nn.Linear(16, 4)
        self.token = nn.Parameter(torch.zeros(1, 1, 16))

    def forward(self, pixel_values, scale=None, top=2):
        y = self.stem(pixel_values).flatten(2).transpose(1, 2)
        y = torch.cat([self.token.expand(y.shape[0], 1, 16), y], 1)
        y = self.head(y.mean(1))
        y = y if scale is None else y * scale[:, None]
        return y.topk(top).values


def exported(free=None, *more, size=16, **named):
    inputs = (torch.randn(2, 3, size, size), *more)
    shapes = None if free is None else {"pixel_values": free, **named}
    return torch.export.export(Tokens().eval(), inputs, dynamic_shapes=shapes).module(), inputs


def every_form(gm, inputs, folder):
    """The module itself, copied, pickled, loaded, lowered and compiled."""
    save(gm, folder / "file")
    lowered = lower(gm, inputs, Config(engine="reference"))
    forms = {"direct": gm, "copy": copy.deepcopy(gm), "pickle": pickle.loads(pickle.dumps(gm)), "lowered": lowered}
    return forms | {"loaded": load(folder / "file"), "compiled": torch.compile(gm, backend="aot_eager")}


def test_another_batch_is_refused_by_name_in_every_form(tmp_path):
    source, inputs = exported()
    gm = transform(source, inputs, Config("dense"))
    for name, form in every_form(gm, inputs, tmp_path).items():
        torch.testing.assert_close(form(*inputs), source(*inputs), msg=name)
        for shape in ((5, 3, 16, 16), (1, 3, 16, 16), (2, 3, 16, 20), (2, 3, 16), (0, 3, 16, 16)):
            with pytest.raises(InputError, match=r"input pixel_values .*batch 2, 3, 16, 16.* found \(" + f"{shape[0]}"):
                form(torch.randn(shape))


def test_a_free_batch_is_right_in_every_form(tmp_path):
    source, inputs = exported({0: FREE})
    gm = transform(source, inputs, Config("dense"))
    for name, form in every_form(gm, inputs, tmp_path).items():
        for batch in (1, 2, 5):
            x = torch.randn(batch, 3, 16, 16)
            torch.testing.assert_close(form(x), source(x), msg=name)
        with pytest.raises(InputError, match=r"\(batch any, 3, 16, 16\) float, found \(5, 3, 8, 8\)"):
            form(torch.randn(5, 3, 8, 8))


def test_inputs_that_share_a_size_and_inputs_that_are_values():
    source, inputs = exported({0: FREE}, torch.ones(2), 3, scale={0: FREE}, top=None)
    gm = import_model(source, inputs).gm
    x = torch.randn(5, 3, 16, 16)
    assert torch.equal(gm(x, torch.ones(5), 3), source(x, torch.ones(5), 3))
    with pytest.raises(InputError, match=r"input scale .*batch 5\) float, found \(4,\)"):
        gm(x, torch.ones(4), 3)
    with pytest.raises(InputError, match=r"input top .*expected 3, found 2"):
        gm(x, torch.ones(5), 2)
    with pytest.raises(InputError, match=r"input scale .*found None"):
        gm(x, None, 3)


def test_only_the_kind_of_a_dtype_is_checked():
    source, inputs = exported()
    gm = import_model(source, inputs).gm
    assert gm.double()(inputs[0].double()).dtype is torch.float64
    with pytest.raises(InputError, match=r"16\) float, found \(2, 3, 16, 16\) integer"):
        gm((inputs[0] * 100).byte())


class Picky(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(4, 4)

    def forward(self, x):
        y = self.fc(x)
        return y + 1 if x.shape[0] % 16 == 0 and x.shape[1] // 2 != 5 else y - 1


def test_what_torch_assumed_of_free_sizes_is_checked(tmp_path):
    x = torch.randn(32, 8, 4)
    gm = import_model(torch.export.export(Picky(), (x,), dynamic_shapes=({0: FREE, 1: FREE},)).module(), x).gm
    save(transform(gm, x, Config("dense")), tmp_path / "file")
    for form in (gm, load(tmp_path / "file")):
        assert form(torch.randn(48, 12, 4)).shape == (48, 12, 4)
        with pytest.raises(InputError, match=r"input x .*\(x.shape\[0\] % 16\) == 0, found \(33, 8, 4\)"):
            form(torch.randn(33, 8, 4))
        with pytest.raises(InputError, match=r"\(x.shape\[1\] // 2\) != 5, found \(32, 10, 4\)"):
            form(torch.randn(32, 10, 4))


def test_a_size_that_is_a_multiple_of_a_free_one():
    half = torch.export.Dim("half", min=4)
    x = torch.randn(16, 4)
    gm = import_model(
        torch.export.export(nn.Sequential(nn.Linear(4, 4)), (x,), dynamic_shapes=({0: 2 * half},)).module(), x
    ).gm
    assert len(gm(torch.randn(10, 4))) == 10
    for batch in (9, 6):
        with pytest.raises(InputError, match=f"found .*{batch}"):
            gm(torch.randn(batch, 4))


def test_compiled_without_a_break():
    source, inputs = exported({0: FREE})
    gm = import_model(source, inputs).gm
    step = torch.compile(gm, backend="aot_eager", fullgraph=True)
    for batch in (2, 3, 4):
        assert len(step(torch.randn(batch, 3, 16, 16))) == batch


def test_exported_again():
    source, inputs = exported({0: FREE})
    gm = transform(source, inputs, Config("dense"))
    program = torch.export.export(gm, inputs, dynamic_shapes={"pixel_values": {0: FREE}})
    assert len(program.module()(torch.randn(7, 3, 16, 16))) == 7


def test_example_inputs_of_another_size_are_refused():
    source, _ = exported()
    with pytest.raises(InputError, match=r"input pixel_values .*batch 2"):
        transform(source, torch.randn(3, 3, 16, 16), Config("dense"))


def test_symbolic_graphs_fix_no_size():
    gm = transform(nn.Sequential(nn.Linear(4, 4)), torch.randn(2, 4), Config("dense"))
    again = import_model(gm, torch.randn(2, 4)).gm
    assert not any(isinstance(m, InputGuard) for module in (gm, again) for m in module.modules())
    assert len(again(torch.randn(5, 4))) == 5


def test_a_root_with_the_same_name():
    source, inputs = exported()
    source.register_buffer("input_guard", torch.ones(1))
    assert "input_guard" in dict(import_model(source, inputs).gm.named_buffers())
