"""A layer that is split by rows, as queries of one token are: one entry in the Plan, packed, refilled, masked again."""

import copy
import pickle

import pytest
import torch

import mpcompile
from mpcompile import Config, backend
from mpcompile.artifact.verify import verify
from tests.support.helpers import images, relative, tiny_vit

QKV = "blocks.1.attn.qkv"
PARTS = [f"{QKV}.weight_rows_0_32", f"{QKV}.weight_rows_32_96"]
MASKED = 8


def split(model, x, pattern="2:4", **options):
    """Transform a model: the rows of its last qkv that make queries become a layer apart."""
    return mpcompile.transform(model, x, Config(pattern, score="magnitude", **options))


def source(exported, **kwargs):
    model = tiny_vit(init_values=1.0, **kwargs)
    return model, torch.export.export(model, (images(2),)).module() if exported else model


def held(gm):
    return {name for name in gm.state_dict() if QKV in name}


@pytest.mark.parametrize("exported", [False, True])
def test_one_entry_with_the_work_of_its_parts(exported):
    model, graph = source(exported)
    gm = split(graph, images(2), tome_r=2)
    # Tokens 17 -> 15 in the first block; in the last one, keys and values of 15 tokens, everything else of one.
    first = 17 * 32 * 96 / 2 + 2 * 17 * 17 * 32 + 17 * 32 * 32 / 2 + 15 * 2 * 32 * 128 / 2
    last = (32 * 32 + 15 * 32 * 64) / 2 + 2 * 15 * 32 + 32 * 32 / 2 + 2 * 32 * 128 / 2
    executed = 16 * 192 * 32 + first + last + 32 * 10
    dense = 16 * 192 * 32 + 2 * (17 * 12 * 32 * 32 + 2 * 17 * 17 * 32) + 32 * 10
    paper = executed + (17 - 15) * 2 * 32 * 128 / 2
    assert (gm.plan.macs.dense, gm.plan.macs.executed, gm.plan.macs.paper) == (dense, executed, paper)
    entry = gm.plan.layers[QKV]
    assert (entry.macs_dense, entry.macs_executed) == (17 * 32 * 96, (32 * 32 + 15 * 32 * 64) // 2)
    assert len(gm.plan.layers) == 10 and len(gm.plan.masked) == MASKED
    assert f"{QKV}.weight" in held(gm)
    copy.deepcopy(gm).load_state_dict(model.state_dict())
    assert torch.equal(pickle.loads(pickle.dumps(gm))(images(2)), gm(images(2)))


@pytest.mark.parametrize("exported", [False, True])
def test_parts_are_packed_and_saved(exported, tmp_path):
    x, (_, graph) = images(2), source(exported)
    gm = split(graph, x, tome_r=2)
    lowered = mpcompile.lower(gm, x, Config(engine="cpu"))
    assert relative(lowered(x), gm(x)) < 1e-5
    packed = {f"packed.{part}.{key}" for part in PARTS for key in ("values", "index")}
    assert held(lowered) == {f"{QKV}.bias", *packed}
    whole = lowered.plan.layers[QKV].notes
    assert list(whole["rows"]) == PARTS and whole["lower"]["engine"] == "cpu"
    assert whole["lower"]["bytes"] == sum(part["lower"]["bytes"] for part in whole["rows"].values())
    assert lowered.plan.macs == gm.plan.macs and len(lowered.plan.layers) == len(gm.plan.layers)
    assert lowered.plan.passes[-1].summary == "2 activations, 4 residual additions, 2 mlps"
    for build in (gm, lowered):
        mpcompile.save(build, tmp_path / "m.mpc")
        loaded = mpcompile.load(tmp_path / "m.mpc")
        assert torch.equal(loaded(x), build(x)) and loaded.plan == build.plan and verify(loaded).ok


@pytest.mark.usefixtures("no_inductor")
@pytest.mark.parametrize("exported", [False, True])
def test_compiled_code_sees_new_weights(exported):
    x, (_, graph) = images(2), source(exported)
    gm = split(graph, x)
    for frozen in (False, True):
        torch._dynamo.reset()
        known = set(backend.compiled_graphs())
        compiled = torch.compile(gm, backend=backend.mpsparse, options={"engine": "reference", "frozen": frozen})
        with torch.no_grad():
            assert relative(compiled(x), gm(x)) < 1e-5
            (built,) = set(backend.compiled_graphs()) - known
            assert len(built.slots) == MASKED + 1
            assert set(built.plan.layers[QKV].notes["rows"]) == set(PARTS) and len(built.plan.masked) == MASKED
            gm.get_parameter(f"{QKV}.weight").mul_(1.5)
            if frozen:
                mpcompile.refresh()
            assert relative(compiled(x), gm(x)) < 1e-5
    torch._dynamo.reset()


def test_masked_after_it_was_split(tmp_path):
    """The rows get masks of their own; tokens still merge in the blocks before."""
    x = images(2)
    dense = split(tiny_vit(), x, pattern="dense")
    gm = mpcompile.transform(dense, x, Config("8:16", tome_r=2, permute=True), [images(2), images(2)])
    assert gm.plan.macs.dense == dense.plan.macs.dense and len(gm.plan.layers) == 10
    entry = gm.plan.layers[QKV]
    assert entry.pattern == "8:16" and entry.macs_executed == (32 * 32 + 15 * 32 * 64) // 2
    lowered = mpcompile.lower(gm, x, Config(engine="reference"))
    assert relative(lowered(x), gm(x)) < 1e-5
    assert held(lowered) == {f"{QKV}.bias", *(f"packed.{part}.{key}" for part in PARTS for key in ("values", "words"))}
    mpcompile.save(gm, tmp_path / "m.mpc")
    assert torch.equal(mpcompile.load(tmp_path / "m.mpc")(x), gm(x))
    again = mpcompile.transform(gm, x, Config("8:16", tome_r=2, score="magnitude"))
    assert again.plan.macs == gm.plan.macs and torch.equal(again(x), gm(x))


def test_a_certificate_bounds_each_part():
    """The dense model skips the same tokens, so that the two differ in weights alone."""
    model, x = tiny_vit(), images(6)
    whole, parts = (split(model, x, "12:16", skip_dead_tokens=skip) for skip in (False, True))
    measured = [mpcompile.certify(model, sparse, x, progress=False) for sparse in (whole, parts)]
    names = [[layer.name for layer in report.layers] for report in measured]
    assert len(names[0]) == MASKED and len(names[1]) == MASKED + 1
    assert [name for name in names[1] if QKV in name] == PARTS
    assert measured[0]["0"].certified == measured[1]["0"].certified and measured[1].violations == 0
    assert {tier.name for tier in measured[1].tiers} == {tier.name for tier in measured[0].tiers}
