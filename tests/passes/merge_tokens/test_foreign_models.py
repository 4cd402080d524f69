"""Token merging in models of transformers, torchvision and open_clip equals the eager reference, however captured."""

from collections import namedtuple

import open_clip.transformer
import pytest
import torch
import torchvision
import transformers
from torch import nn
from torch.utils._pytree import tree_leaves

import mpcompile
from mpcompile import Config, Pipeline
from mpcompile.capture.importers import import_model
from mpcompile.errors import GraphError
from mpcompile.kernels import ops
from mpcompile.passes.merge_tokens import MergeTokens
from mpcompile.pipeline import run_pipeline
from tests.support import merging_reference
from tests.support.helpers import relative
from tests.support.merging import merged

SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 32, "patch_size": 8}
PLAIN = {**SIZES, "intermediate_size": 64}
DINO = {**SIZES, "mlp_ratio": 2}
Model = namedtuple("Model", "make blocks prefix suffix")


def hugging_face(name, blocks, prefix, suffix=0, attention="sdpa", **config):
    kind = getattr(transformers, name)

    def make():
        return kind._from_config(kind.config_class(**config), attn_implementation=attention)

    return Model(make, blocks, prefix, suffix)


def torchvision_vit():
    return torchvision.models.VisionTransformer(
        image_size=32, patch_size=8, num_layers=2, num_heads=2, hidden_dim=32, mlp_dim=64, num_classes=8
    )


def open_clip_vit():
    return open_clip.transformer.VisionTransformer(
        image_size=32, patch_size=8, width=32, layers=2, heads=2, mlp_ratio=2.0, output_dim=16
    )


MODELS = {
    "ViT": hugging_face("ViTForImageClassification", "vit.layers", 1, **PLAIN),
    "ViT, eager": hugging_face("ViTForImageClassification", "vit.layers", 1, attention="eager", **PLAIN),
    "DeiT": hugging_face("DeiTForImageClassificationWithTeacher", "deit.layers", 2, **PLAIN),
    "BEiT": hugging_face("BeitForImageClassification", "beit.layers", 1, **PLAIN),
    "DINOv2": hugging_face("Dinov2ForImageClassification", "dinov2.encoder.layer", 1, **DINO),
    "registers": hugging_face(
        "Dinov2WithRegistersForImageClassification", "dinov2_with_registers.encoder.layer", 5, **DINO
    ),
    "DINOv3": hugging_face("DINOv3ViTModel", "model.layer", 5, num_register_tokens=4, **PLAIN),
    "CLIP": hugging_face("CLIPVisionModelWithProjection", "vision_model.encoder.layers", 1, projection_dim=16, **PLAIN),
    "SigLIP": hugging_face("SiglipVisionModel", "encoder.layers", 0, **PLAIN),
    "YOLOS": hugging_face(
        "YolosForObjectDetection",
        "vit.encoder.layer",
        1,
        3,
        num_detection_tokens=3,
        **{**PLAIN, "image_size": [32, 32]},
    ),
    "torchvision": Model(torchvision_vit, "encoder.layers", 1, 0),
    "open_clip": Model(open_clip_vit, "transformer.resblocks", 1, 0),
}
KINDS = [
    *[(name, "free batch") for name in MODELS],
    *[(name, "static") for name in ("ViT, eager", "DINOv3", "SigLIP", "torchvision")],
    *[(name, "dynamo") for name in ("ViT", "registers", "DINOv3", "SigLIP", "YOLOS", "torchvision")],
    *[(name, "symbolic") for name in ("torchvision", "open_clip")],
]


def made(name):
    """The model with weights of which none is negligible, and images."""
    torch.manual_seed(0)
    model = MODELS[name].make().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1 or parameter.std() < 0.05:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model, torch.randn(3, 3, 32, 32)


def captured(model, x, kind, r=2, **options):
    """A function of images that runs the model with merged tokens."""
    config = Config(pattern="dense", tome_r=r, tome_method="tome", **options)
    if kind == "dynamo":

        def backend(gm, inputs):
            return run_pipeline(import_model(gm, inputs, share=True), config, Pipeline([MergeTokens()]), owned=False)

        torch._dynamo.reset()
        return torch.compile(model, backend=backend)
    if kind != "symbolic":
        shapes = ({0: torch.export.Dim("batch", min=1, max=64)},) if kind == "free batch" else None
        exported = torch.export.export(model, (x,), dynamic_shapes=shapes, strict=False)
        model = exported.module(check_guards=False)
    return merged(model, x, r, **options)


@pytest.mark.parametrize(("name", "kind"), KINDS)
def test_equals_the_reference(name, kind):
    model, x = made(name)
    _, blocks, prefix, suffix = MODELS[name]
    run = captured(model, x, kind)
    with torch.no_grad():
        expected = merging_reference.forward(model, x, 2, prefix, model.get_submodule(blocks), suffix=suffix)
        pairs = list(zip(*map(tree_leaves, (run(x), expected, model(x))), strict=True))
        assert all(relative(found, wanted) < 1e-5 for found, wanted, _ in pairs)
        assert all(relative(dense, wanted) > 1e-3 for _, wanted, dense in pairs)
        if kind == "free batch":
            assert all(relative(a, b[:1]) < 1e-5 for a, (b, _, _) in zip(tree_leaves(run(x[:1])), pairs, strict=True))


@pytest.mark.parametrize("name", ["ViT", "registers", "SigLIP", "YOLOS"])
def test_gradients_in_training(name):
    model, x = made(name)
    _, blocks, prefix, suffix = MODELS[name]
    run = captured(model.train(), x, "dynamo")
    blocks, gradients = model.get_submodule(blocks), []
    for forward in (run, lambda x: merging_reference.forward(model, x, 2, prefix, blocks, suffix=suffix)):
        model.zero_grad()
        sum(leaf.square().mean() for leaf in tree_leaves(forward(x))).backward()
        gradients.append({path: p.grad.clone() for path, p in model.named_parameters() if p.grad is not None})
    ours, theirs = gradients
    assert ours.keys() == theirs.keys()
    for path, gradient in theirs.items():
        assert float((ours[path] - gradient).norm()) < 1e-4 * max(float(gradient.norm()), 1e-2), path


class Tensors(nn.Module):
    """A model whose outputs are a plain tuple."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, x):
        return tuple(self.model(x).values())


@pytest.mark.parametrize("name", ["CLIP", "SigLIP", "YOLOS"])
def test_saves_and_loads(name, tmp_path):
    model, x = made(name)
    exported = torch.export.export(Tensors(model), (x,)).module(check_guards=False)
    gm = mpcompile.transform(exported, x, Config(tome_r=2, score="magnitude"))
    assert gm.plan.masked and any(node.target is ops.token_spread for node in gm.graph.nodes)
    mpcompile.save(gm, tmp_path / "merged.mpc")
    loaded = mpcompile.load(tmp_path / "merged.mpc")
    with torch.no_grad():
        for ours, theirs in zip(loaded(x), gm(x), strict=True):
            assert torch.equal(ours, theirs)


def test_values_per_token_are_told():
    model, x = made("CLIP")
    notes = captured(model, x, "static").plan.notes
    assert any("for every input token" in note for note in notes)


def test_every_hidden_state_has_its_own_tokens():
    torch.manual_seed(0)
    model, x = transformers.Dinov2Model(transformers.Dinov2Config(**DINO)).eval(), torch.randn(2, 3, 32, 32)

    class Hidden(nn.Module):
        def __init__(self):
            super().__init__()
            self.model = model

        def forward(self, x):
            return self.model(x, output_hidden_states=True).hidden_states

    net = Hidden()
    run = captured(net, x, "static")
    with torch.no_grad():
        expected = merging_reference.forward(net, x, 2, 1, model.encoder.layer)
        assert (
            len(expected) == 3 and [relative(a, b) < 1e-5 for a, b in zip(run(x), expected, strict=True)] == [True] * 3
        )


class Batch(nn.Module):
    """Takes a dict as its one input."""

    def __init__(self):
        super().__init__()
        self.model = MODELS["torchvision"].make()

    def forward(self, batch):
        return {"logits": self.model(batch["image"]), "id": batch["id"]}


def test_the_class_token_behind_a_dict_does_not_merge():
    torch.manual_seed(0)
    net, x = Batch().eval(), torch.randn(2, 3, 32, 32)
    gm = merged(net, {"image": x, "id": torch.arange(2)}, 2)
    assert gm.plan.tokens == [17, 15, 13]
    with torch.no_grad():
        found = gm({"image": x, "id": torch.arange(2)})["logits"]
        assert torch.equal(found, merged(net.model, x, 2)(x))


def test_gathered_tokens_are_refused():
    options = {"decoder_hidden_size": 32, "decoder_num_hidden_layers": 1, "decoder_num_attention_heads": 2}
    config = transformers.ViTMAEConfig(**PLAIN, **options, decoder_intermediate_size=64)
    with pytest.raises(GraphError, match="cannot follow the tokens through 'cat': it puts merged tokens before others"):
        captured(transformers.ViTMAEForPreTraining(config).eval(), torch.randn(2, 3, 32, 32), "static")


def clip():
    torch.manual_seed(0)
    text = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    text |= {"vocab_size": 50, "max_position_embeddings": 8, "eos_token_id": 2, "bos_token_id": 1, "pad_token_id": 0}
    config = transformers.CLIPConfig(text_config=text, vision_config=PLAIN, projection_dim=16)
    ids = torch.randint(3, 49, (3, 8))
    ids[:, -1] = 2
    return transformers.CLIPModel(config).eval(), {"input_ids": ids, "pixel_values": torch.randn(3, 3, 32, 32)}


@pytest.mark.parametrize("r", [2, [1, 3], "auto"])
def test_a_causal_tower_does_not_stop_the_other(r):
    model, inputs = clip()
    exported = torch.export.export(model, (), inputs, strict=False).module(check_guards=False)
    gm = merged(exported, inputs, r, tome_reduction=0.1 if r == "auto" else None)
    first, last = gm.plan.tokens[0], gm.plan.tokens[-1]
    assert (first, last) == (17, 13) if r != "auto" else gm.plan.macs.reduction >= 0.1
    assert any(note.startswith("tokens do not merge in 2 blocks: ") for note in gm.plan.notes)
    if r == "auto":
        return
    with torch.no_grad():
        found, dense = gm(**inputs), model(**inputs)
        vision = model.vision_model
        expected = merging_reference.forward(vision, inputs["pixel_values"], r, 1, vision.encoder.layers)
        embeds = model.visual_projection(expected.pooler_output)
        assert relative(found.image_embeds, embeds / embeds.norm(dim=-1, keepdim=True)) < 1e-5
        assert relative(found.text_embeds, dense.text_embeds) < 1e-5


class Pair(nn.Module):
    """Two vision transformers in one module."""

    def __init__(self):
        super().__init__()
        self.left, self.right = MODELS["ViT"].make(), MODELS["registers"].make()

    def forward(self, x, y):
        return self.left(x).logits, self.right(y).logits


def test_two_streams_merge_on_their_own():
    torch.manual_seed(0)
    model, inputs = Pair().eval(), (torch.randn(2, 3, 32, 32), torch.randn(2, 3, 32, 32))
    exported = torch.export.export(model, inputs).module(check_guards=False)
    gm = merged(exported, inputs, [1, 2, 3, 0])
    assert gm.plan.tokens == [[17, 16, 14], [21, 18, 18]]
    streams = gm.plan.passes[-1].decision["streams"]
    assert [(stream["r"], stream["prefix"]) for stream in streams] == [([1, 2], 1), ([3, 0], 5)]
    assert mpcompile.Plan.from_json(gm.plan.to_json()) == gm.plan
    with torch.no_grad():
        for found, net, x, r, prefix, name in zip(
            gm(*inputs), (model.left, model.right), inputs, ([1, 2], [3, 0]), (1, 5), ("ViT", "registers"), strict=True
        ):
            expected = merging_reference.forward(net, x, r, prefix, net.get_submodule(MODELS[name].blocks)).logits
            assert relative(found, expected) < 1e-5
    assert merged(exported, inputs, "auto", tome_reduction=0.1).plan.macs.reduction >= 0.1
