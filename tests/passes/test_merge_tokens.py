"""Token merging in whole models: equal to an independent eager reference on every graph level, refused by name else."""

import pytest
import timm
import torch
from timm.layers import Attention, set_fused_attn
from timm.models.vision_transformer import ParallelScalingBlock, ResPostBlock
from torch import nn

import mpcompile
from mpcompile import Config, Pipeline, transform
from mpcompile.capture.importers import import_model
from mpcompile.errors import ConfigError, GraphError, MPCompileError, NotEligibleError
from mpcompile.kernels import ops
from mpcompile.passes.merge_tokens.insert import MergeTokens
from mpcompile.pipeline import run_pipeline
from tests.support import merging_reference
from tests.support.helpers import convolutional, images, relative, tiny_vit, transformer


def merged(model, x, r, **kwargs):
    config = Config(pattern="dense", tome_r=r, **kwargs)
    return transform(model, x, config, pipeline=Pipeline([MergeTokens()]))


def decision(gm):
    return gm.plan.passes[-1].decision


FAMILIES = {
    "vit": ("vit_tiny_patch16_224", 128, {}, 1),
    "distilled": ("deit_tiny_distilled_patch16_224", 128, {}, 2),
    "layer scale": ("deit3_small_patch16_224", 128, {}, 1),
    "registers": ("vit_small_patch14_reg4_dinov2", 112, {}, 5),
    "map pooling": ("vit_base_patch16_siglip_224", 128, {}, 0),
    "rotary and swiglu": ("eva02_tiny_patch14_224", 112, {}, 1),
    "rotary and registers": ("vit_small_patch16_dinov3", 128, {}, 5),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_equals_the_eager_reference(family):
    name, size, kwargs, prefix = FAMILIES[family]
    model, x = transformer(name, size, **kwargs), images(8, size, seed=2)
    with torch.no_grad():
        dense = model(x)
        for r in (1, 8, 13, 16, 25):
            gm = merged(model, x[:3], r)
            assert decision(gm)["prefix"] == prefix
            expected = merging_reference.forward(model, x, r, prefix)
            for batch in (1, 3, 8):
                assert relative(gm(x[:batch]), expected[:batch]) < 1e-5
            assert relative(expected, dense) > 1e-3  # merging does change this model


class Gated(Attention):
    def __init__(self, *args, **kwargs):
        super().__init__(*args, **{**kwargs, "gated": True})


BLOCKS = {
    "gated attention": {"attn_layer": Gated},
    "average pooling": {"global_pool": "avg"},
    "average and maximum": {"global_pool": "avgmax"},
    "no class token": {"global_pool": "avg", "class_token": False},
    "qk-norm and scaled norms": {"qk_norm": True, "scale_attn_norm": True, "scale_mlp_norm": True},
    "attention and mlp side by side": {"block_fn": ParallelScalingBlock},
    "post-norm": {"block_fn": ResPostBlock},
    "no position embedding in the class token": {"no_embed_class": True, "reg_tokens": 3},
    "norm before the blocks": {"pre_norm": True},
}


@pytest.mark.parametrize("kind", BLOCKS)
def test_kinds_of_blocks(kind):
    model, x = tiny_vit(**BLOCKS[kind]), images()
    gm = merged(model, x, 3)
    assert decision(gm)["prefix"] == model.num_prefix_tokens
    with torch.no_grad():
        assert relative(gm(x), merging_reference.forward(model, x, 3, model.num_prefix_tokens)) < 1e-5


@pytest.mark.parametrize(
    ("name", "kwargs"),
    [
        ("cait_xxs24_224", {}),  # talking heads, class attention
        ("vit_small_patch16_18x2_224", {}),  # two attentions a block
        ("vit_small_patch16_dinov3", {"qk_norm": True}),
        ("vit_dlittle_patch16_reg1_gap_256", {}),  # differential attention
    ],
)
def test_kinds_of_attention(name, kwargs):
    model, x = transformer(name, **kwargs), images(2, 128)
    gm = merged(model, x, 8)
    with torch.no_grad():
        assert relative(gm(x), merging_reference.forward(model, x, 8, decision(gm)["prefix"])) < 1e-5


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "eva02_tiny_patch14_224", "vit_base_patch16_siglip_224"])
def test_attention_that_is_written_out(name):
    set_fused_attn(False)
    try:
        model = transformer(name, 112)
    finally:
        set_fused_attn(True)
    x = images(2, 112)
    gm = merged(model, x, 8)
    assert not any(n.target is ops.token_attention for n in gm.graph.nodes)
    with torch.no_grad():
        assert relative(gm(x), merging_reference.forward(model, x, 8, decision(gm)["prefix"])) < 1e-5


def test_a_mask_over_keys_hides_tokens_that_merge():
    model, x = tiny_vit(), images(2)
    mask = torch.ones(2, 1, 1, 17, dtype=torch.bool)
    mask[0, ..., 9:] = False
    mask[1, ..., 4] = False
    added = torch.zeros(mask.shape).masked_fill(~mask, -torch.inf)
    gm = merged(model, {"x": x, "attn_mask": mask}, 4)
    with torch.no_grad():
        expected = merging_reference.forward(model, x, 4, 1, attn_mask=mask)
        assert relative(gm(x, mask), expected) < 1e-5
        assert relative(gm(x, added), expected) < 1e-5
        assert relative(gm(x, torch.ones_like(mask)), merged(model, x, 4)(x)) < 1e-6


def test_refuses_other_masks():
    model, x = tiny_vit(), images(2)
    with pytest.raises(GraphError, match="a mask for every query"):
        merged(model, {"x": x, "attn_mask": torch.zeros(2, 1, 17, 17)}, 4)
    with pytest.raises(GraphError, match="tome_proportional=True"):
        merged(model, {"x": x, "attn_mask": torch.zeros(2, 1, 1, 17)}, 4, tome_proportional=False)
    pooled = tiny_vit(global_pool="avg")
    with pytest.raises(GraphError, match="hidden ones included"):
        merged(pooled, {"x": x, "attn_mask": torch.zeros(2, 1, 1, 17)}, 4)


def test_without_proportional_attention():
    model, x = tiny_vit(global_pool="avg"), images()
    gm = merged(model, x, 3, tome_proportional=False)
    with torch.no_grad():
        expected = merging_reference.forward(model, x, 3, 1, proportional=False)
        assert relative(gm(x), expected) < 1e-5
        assert relative(merged(model, x, 3)(x), expected) > 1e-4


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "eva02_tiny_patch14_224"])
def test_gradients_equal_the_reference(name):
    model, x = transformer(name, 112), images(2, 112)
    gm = merged(model, x, 8)
    found = gm(x)
    direction = torch.randn_like(found)
    (found * direction).sum().backward()
    (merging_reference.forward(model, x, 8, 1) * direction).sum().backward()
    ours, theirs = dict(gm.named_parameters()), dict(model.named_parameters())
    assert ours.keys() == theirs.keys()
    for path, parameter in theirs.items():
        if parameter.grad is not None:
            assert bool(torch.isfinite(ours[path].grad).all())
            error = float((ours[path].grad - parameter.grad).norm())
            assert error < 1e-4 * max(float(parameter.grad.norm()), 1.0), path  # a bias of keys: rounding alone


@pytest.mark.parametrize("r", [0, [0, 0]])
def test_r_0_is_bit_identical(r):
    model, x = tiny_vit(), images()
    gm = merged(model, x, r)
    assert torch.equal(gm(x), model(x))
    assert not any(n.target in ops.MERGING for n in gm.graph.nodes)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype):
    model, x = tiny_vit().to(dtype), images().to(dtype)
    gm = merged(model, x, 3)
    found = gm(x)
    assert found.dtype is dtype
    sizes = [n for n in gm.graph.nodes if n.target is ops.token_size]
    assert all(n.meta["val"].dtype is torch.float32 for n in sizes)
    with torch.no_grad():
        expected = merging_reference.forward(model, x, 3, 1)
    assert relative(found, expected) < {torch.bfloat16: 2e-2, torch.float16: 4e-3}[dtype]


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "eva02_tiny_patch14_224", "vit_small_patch14_reg4_dinov2"])
def test_burnt_in_token_counts_are_rewritten_in_export_graphs(name):
    model, x = transformer(name, 112), images(2, 112)
    exported = torch.export.export(model, (x,)).module(check_guards=False)
    gm = merged(exported, None, 8)
    with torch.no_grad():
        assert relative(gm(x), merging_reference.forward(model, x, 8, decision(gm)["prefix"])) < 1e-5


def test_export_with_a_dynamic_batch():
    model, x = tiny_vit(), images(4)
    batch = {0: torch.export.Dim("batch", min=1, max=64)}
    exported = torch.export.export(model, (x,), dynamic_shapes=(batch,)).module(check_guards=False)
    gm = merged(exported, None, 3)
    with torch.no_grad():
        for size in (1, 4, 6):
            assert relative(gm(images(size)), merging_reference.forward(model, images(size), 3, 1)) < 1e-5


def test_export_with_a_dynamic_image_size():
    """The number of tokens is a symbol that no reshape may hold as it was for unmerged tokens."""
    model = transformer("eva02_tiny_patch14_224", 112, dynamic_img_size=True)
    side = torch.export.Dim("side", min=2, max=20)
    shapes = ({2: 14 * side, 3: 14 * side},)
    exported = torch.export.export(model, (images(2, 112),), dynamic_shapes=shapes).module(check_guards=False)
    gm = merged(exported, None, 8)
    with torch.no_grad():
        for size in (112, 140, 84):
            x = images(2, size)
            assert relative(gm(x), merging_reference.forward(model, x, 8, 1)) < 1e-5


@pytest.mark.parametrize("pool", ["token", "avg"])
def test_dynamo_graphs_with_and_without_dynamic_batch(pool):
    model = tiny_vit(global_pool=pool)
    seen = []

    def backend(gm, inputs):
        imported = import_model(gm, inputs, share=True)
        config = Config(pattern="dense", tome_r=3)
        ir = run_pipeline(imported, config, Pipeline([MergeTokens()]), owned=False)
        seen.append(decision(ir))
        return ir

    compiled = torch.compile(model, backend=backend)
    with torch.no_grad():
        for batch in (3, 1, 5, 4):
            x = images(batch)
            assert relative(compiled(x), merging_reference.forward(model, x, 3, 1)) < 1e-5
    assert 2 <= len(seen) <= 3  # static, dynamic, and perhaps batch 1
    assert all(found["prefix"] == 1 for found in seen)


def test_tokens_are_counted_and_clamping_is_reported():
    gm = merged(tiny_vit(), images(), 5)
    assert gm.plan.tokens == [17, 12, 7]
    gm = merged(tiny_vit(), images(), 25)
    assert gm.plan.tokens == [17, 9, 5]
    assert "clamped to half of the tokens in 2 blocks" in gm.plan.passes[-1].summary


PUBLISHED = [  # Bolya et al.; G multiply-accumulates, or what is saved
    ("deit_small_patch16_224", 8, 3.416),
    ("deit_small_patch16_224", 13, 2.703),
    ("deit_small_patch16_224", 16, 2.291),
    ("vit_large_patch16_224", 8, (1 - 0.4970) * 61.555),
]


@pytest.mark.parametrize(("name", "r", "executed"), PUBLISHED)
def test_published_macs(name, r, executed):
    with torch.device("meta"):
        macs = merged(timm.create_model(name).eval(), torch.empty(1, 3, 224, 224), r).plan.macs
    assert macs.executed / 1e9 == pytest.approx(executed, abs=5e-3 if "large" in name else 6e-4)
    assert macs.executed < macs.paper < macs.dense
    assert 0 < macs.matching < 0.01 * macs.executed


@pytest.mark.parametrize("r", [[5, 0], [0, 5], [4, 1]])
def test_a_number_for_each_block(r):
    model, x = tiny_vit(), images()
    gm = merged(model, x, r)
    assert decision(gm)["r"] == r
    with torch.no_grad():
        assert relative(gm(x), merging_reference.forward(model, x, r, 1)) < 1e-5


def test_a_linear_schedule():
    model, x = tiny_vit(), images()
    gm = merged(model, x, 3, tome_schedule="linear")
    assert decision(gm)["r"] == [6, 0]
    with torch.no_grad():
        assert relative(gm(x), merging_reference.forward(model, x, [6, 0], 1)) < 1e-5


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "vit_base_patch16_siglip_224"])
@pytest.mark.parametrize("schedule", ["constant", "linear"])
@pytest.mark.parametrize("reduction", [0.05, 0.2])
def test_auto_meets_the_reduction_and_no_more(name, schedule, reduction):
    model, x = transformer(name), images(1, 128)
    gm = merged(model, x, "auto", tome_reduction=reduction, tome_schedule=schedule)
    assert gm.plan.macs.reduction >= reduction
    fewer = list(decision(gm)["r"])
    fewer[fewer.index(max(fewer))] -= 1
    assert merged(model, x, fewer).plan.macs.reduction < reduction


def test_auto_says_how_much_can_be_saved():
    with pytest.raises(ConfigError, match=r"can't save 90.0%.*tome_reduction of at most 0\.\d+"):
        merged(tiny_vit(), images(), "auto", tome_reduction=0.9)


def test_refuses_a_schedule_of_the_wrong_length():
    with pytest.raises(ConfigError, match="2 numbers, one for each attention block, found 3"):
        merged(tiny_vit(), images(), [1, 2, 3])


@pytest.mark.parametrize(
    "options",
    [
        {"tome_r": -1},
        {"tome_r": [3, -1]},
        {"tome_r": "most"},
        {"tome_r": [1.5]},
        {"tome_r": "auto"},
        {"tome_r": "auto", "tome_reduction": 1.5},
        {"tome_r": 8, "tome_reduction": 0.5},
        {"tome_r": [8, 8], "tome_schedule": "linear"},
        {"tome_r": 8, "tome_schedule": "cosine"},
    ],
)
def test_refuses_options_that_make_no_sense(options):
    with pytest.raises(ConfigError, match="tome_"):
        Config(**options)


def test_prefix_can_be_overridden():
    gm = merged(tiny_vit(), images(), 3, prefix_tokens=3)
    assert decision(gm)["prefix"] == 3
    with pytest.raises(GraphError, match="more prefix tokens than tokens"):
        merged(tiny_vit(), images(), 3, prefix_tokens=18)


def test_saves_loads_and_merges_once(tmp_path):
    model, x = transformer("eva02_tiny_patch14_224", 112), images(2, 112)
    gm = merged(model, x, 8)
    mpcompile.save(gm, tmp_path / "merged.mpc")
    loaded = mpcompile.load(tmp_path / "merged.mpc")
    with torch.no_grad():
        assert torch.equal(loaded(x), gm(x))
    again = merged(loaded, x, 8)
    assert again.plan.tokens == gm.plan.tokens and again.plan.passes[-1].summary == "already merged"
    with pytest.raises(GraphError, match=r"tokens merge in it already.*found tome_r=4"):
        merged(loaded, x, 4)


def test_refuses_a_model_without_attention():
    with pytest.raises(NotEligibleError, match=r"no attention block.*found no attention"):
        merged(convolutional("resnet18"), images(), 4)


class Block(nn.Module):
    """Attention on 8 channels with a residual addition; subclasses put something behind it."""

    def __init__(self):
        super().__init__()
        self.qkv, self.head = nn.Linear(8, 24), nn.Linear(8, 2)

    def attend(self, x, **options):
        q, k, v = self.qkv(x).unflatten(-1, (3, 2, 4)).permute(2, 0, 3, 1, 4).unbind(0)
        return x + nn.functional.scaled_dot_product_attention(q, k, v, **options).transpose(1, 2).flatten(2)


class Windows(Block):
    """Attention inside windows of two tokens."""

    def forward(self, x):
        q, k, v = self.qkv(x).unflatten(1, (-1, 2)).unflatten(-1, (3, 2, 4)).permute(3, 0, 1, 4, 2, 5).unbind(0)
        out = nn.functional.scaled_dot_product_attention(q, k, v)  # (B, windows, heads, 2, 4)
        return x + out.transpose(2, 3).flatten(3).flatten(1, 2)


class Global(Block):
    def forward(self, x):
        return self.attend(x)


class WindowsThenGlobal(nn.Module):
    """The last stage of Twins: windows, a convolution on the grid, then attention of all tokens."""

    def __init__(self):
        super().__init__()
        self.windows, self.all = Windows(), Global()
        self.conv, self.head = nn.Conv2d(8, 8, 3, padding=1, groups=8), nn.Linear(8, 2)

    def forward(self, x):
        x = self.windows(x)
        grid = x.transpose(1, 2).unflatten(2, (4, 4))
        x = (grid + self.conv(grid)).flatten(2).transpose(1, 2)
        return self.head(nn.functional.gelu(self.all(x)).mean(1))


def test_merges_behind_windows_and_a_grid():
    torch.manual_seed(0)
    model, x = WindowsThenGlobal().eval(), torch.randn(2, 16, 8)
    gm = merged(model, x, 6)
    assert len(decision(gm)["sites"]) == 1 and decision(gm)["tokens"] == [16, 10]
    with torch.no_grad():
        expected = merging_reference.forward(model, x, 6, 0, [model.all])
        assert relative(gm(x), expected) < 1e-5
        assert relative(model(x), expected) > 1e-3


class RotaryBeforeHeads(Block):
    """Queries and keys are rotated as (B, tokens, heads, channels), by a table (B, tokens, 1, channels)."""

    def forward(self, x, table):
        q, k, v = self.qkv(x).unflatten(-1, (3, 2, 4)).unbind(2)
        q, k, v = (part.transpose(1, 2) for part in (q * table, k * table, v))
        return x + nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


class Rotary(nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList([RotaryBeforeHeads(), RotaryBeforeHeads()])
        self.table, self.head = nn.Parameter(torch.randn(1, 16, 1, 4)), nn.Linear(8, 2)

    def forward(self, x):
        table = self.table.expand(x.shape[0], -1, -1, -1)
        for block in self.blocks:
            x = block(x, table)
        return self.head(x.mean(1))


def test_tables_whose_tokens_stand_before_the_heads():
    torch.manual_seed(0)
    model, x = Rotary().eval(), torch.randn(2, 16, 8)
    gm = merged(model, x, 4)
    with torch.no_grad():
        expected = merging_reference.forward(model, x, 4, 0)
        assert relative(gm(x), expected) < 1e-5
        assert relative(model(x), expected) > 1e-3


class Aliased(Block):
    """``aten.alias``, as export leaves it behind an attention that doesn't drop anything."""

    def forward(self, x):
        return self.head(torch.ops.aten.alias.default(nn.functional.gelu(self.attend(x))).mean(1))


def test_follows_an_alias():
    torch.manual_seed(0)
    model, x = Aliased().eval(), torch.randn(2, 8, 8)
    gm = merged(model, x, 3)
    with torch.no_grad():
        assert relative(gm(x), merging_reference.forward(model, x, 3, 0, [model])) < 1e-5


class Opaque(nn.Module):
    def __init__(self):
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, x):
        return (x + self.attention(x, x, x, need_weights=False)[0]).mean(1)


def test_names_an_attention_that_cannot_be_seen():
    with pytest.raises(NotEligibleError, match=r"^attention: tome_r=2.*nn.MultiheadAttention, whose attention"):
        merged(Opaque().eval(), torch.randn(2, 6, 8), 2)


class Causal(Block):
    def forward(self, x):
        return self.head(self.attend(x, is_causal=True).mean(1))


class Appended(Block):
    """A class token behind the image's, as some models have it."""

    def __init__(self):
        super().__init__()
        self.token = nn.Parameter(torch.randn(1, 1, 8))

    def forward(self, x):
        x = torch.cat([x, self.token.expand(x.shape[0], -1, -1)], 1)
        return self.head(self.attend(x)[:, -1])


class Mixer(Block):
    def __init__(self):
        super().__init__()
        self.mix = nn.Linear(6, 6)

    def forward(self, x):
        x = self.attend(x)
        return self.head((x + self.mix(x.transpose(1, 2)).transpose(1, 2)).mean(1))


class Flipped(Block):
    def forward(self, x):
        return self.head(self.attend(x).flip(1).mean(1))


class Last(Block):
    def forward(self, x):
        return self.head(self.attend(x)[:, -1])


class Features(Block):
    def forward(self, x):
        return self.attend(x)


class Grid(Block):
    def forward(self, x):
        return self.head(self.attend(x).unflatten(1, (2, 3)).mean((1, 2)))


class Summed(Block):
    def forward(self, x):
        return self.head(self.attend(x).sum(1))


class Linear(Block):
    """Attention without a softmax behind the merge."""

    def forward(self, x):
        x = self.attend(x)
        return self.head((x @ (x.transpose(1, 2) @ x)).mean(1))


class Twice(Block):
    """Two images' tokens in one model."""

    def forward(self, x):
        return self.head(self.attend(x).mean(1) + self.attend(x[:, :4]).mean(1))


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        (Causal, "attention is causal"),
        (Appended, "stand behind the image's"),
        (Mixer, "'Linear': it mixes the tokens"),
        (Flipped, "'flip': an op that it doesn't know"),
        (Last, "'getitem': it picks tokens by their place"),
        (Features, "the model returns a value for each of the unmerged tokens"),
        (Grid, "'unflatten': it joins the token axis with another, or splits it"),
        (Summed, "'sum': it runs over the tokens"),
        (Linear, "'matmul': it sums over tokens"),
        (Twice, "more than one token axis"),
    ],
)
def test_refusals_name_the_op(kind, message):
    with pytest.raises(GraphError, match=message):
        merged(kind(), torch.randn(2, 6, 8), 2)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("beit_base_patch16_224", "relative position bias"),
        ("vit_relpos_small_patch16_224", "relative position bias"),
        ("swin_tiny_patch4_window7_224", r"its stream is \(1, 56, 56, 96\)"),
        ("xcit_nano_12_p16_224", "are not the tokens"),
    ],
)
def test_refuses_families_by_name(name, message):
    size = {"depths": (1, 1)} if name.startswith("swin") else {"depth": 2}
    model = timm.create_model(name, **size).eval()
    with pytest.raises(MPCompileError, match=message):
        merged(model, images(1, 224), 4)
