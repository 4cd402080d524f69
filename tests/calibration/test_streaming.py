"""Measurements hold one batch of images at a time, however many images there are and wherever they come from."""

import gc
import json
import weakref

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import mpcompile
from mpcompile import Config, audit, certify, cli, transform
from mpcompile.data import images
from mpcompile.errors import InputError
from mpcompile.sources import timm_models
from tests.support.helpers import tiny_vit

BATCHES = 12
CLASSES = 500


class Tracked:
    """Batches made while they are read: the most alive at once, and bytes of all tensors at batches in ``weigh``."""

    def __init__(self, inner, weigh=()):
        self.inner, self.weigh, self.alive, self.bytes = inner, weigh, 0, []

    def __iter__(self):
        seen = []
        for number, batch in enumerate(self.inner):
            seen.append(weakref.ref(batch[0] if isinstance(batch, tuple) else batch))
            self.alive = max(self.alive, sum(ref() is not None for ref in seen))
            if number in self.weigh:
                gc.collect()
                self.bytes.append(sum(t.nbytes for t in gc.get_objects() if type(t) is Tensor))
            yield batch
            del batch


def made(labelled=True):
    generator = torch.Generator().manual_seed(0)
    for _ in range(BATCHES):
        x = torch.randn(8, 16, generator=generator)
        yield (x, torch.randint(0, CLASSES, (8,), generator=generator)) if labelled else x


@pytest.fixture(scope="module")
def pair():
    torch.manual_seed(0)
    dense = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, CLASSES)).eval()
    return dense, transform(dense, torch.randn(2, 16), Config(pattern="2:4", score="magnitude")).eval()


def audited(dense, sparse, batches):
    report = audit(dense, sparse, batches, rounds=2, dense_compiled=dense, dense_bf16=False, progress=False)
    rows = [(row.samples, row.correct, row.lost, row.won, row.agree, row.difference) for row in report.rows]
    return rows, report.rows[-1].samples


def certified(dense, sparse, batches):
    report = certify(dense, sparse, batches, tiers=(0, 1), splits=1, progress=False)
    return [tier.eta for tier in report.tiers], report.samples


@pytest.mark.parametrize("measure", [audited, certified])
def test_one_batch_is_held_at_a_time(measure, pair):
    batches = Tracked(made(), weigh=(2, BATCHES - 1))
    found, samples = measure(*pair, iter(batches))  # read once: a generator
    assert samples == 8 * BATCHES
    assert batches.alive <= 3  # the first one, on which latency is measured, the last one, and the next
    a_batch_of_logits = 8 * CLASSES * 4
    assert batches.bytes[1] - batches.bytes[0] < a_batch_of_logits
    assert measure(*pair, list(made()))[0] == found
    pixels, labels = (torch.cat(parts) for parts in zip(*made(), strict=True))
    assert measure(*pair, DataLoader(TensorDataset(pixels, labels), batch_size=8))[0] == found


def test_batches_of_any_size_count_their_samples_once(pair):
    pixels, labels = (torch.cat(parts) for parts in zip(*made(), strict=True))
    whole = audit(*pair, [(pixels, labels)], rounds=0, dense_compiled=pair[0], progress=False).rows[-1]
    for sizes in ([96], [7] * 13 + [5], [0, 90, 0, 6], [1] * 96):
        parts = zip(pixels.split(sizes), labels.split(sizes), strict=True)
        row = audit(*pair, parts, rounds=0, dense_compiled=pair[0], progress=False).rows[-1]
        assert (row.samples, row.correct, row.lost, row.won, row.agree) == (
            (whole.samples, whole.correct, whole.lost, whole.won, whole.agree)
        )
        assert row.difference == pytest.approx(whole.difference, rel=1e-4)
        assert row.interval == whole.interval


@pytest.mark.parametrize("inputs", [[], iter([]), torch.zeros(0, 16), [torch.zeros(0, 16)], torch.tensor(3.0)])
def test_nothing_to_measure_is_reported(inputs, pair):
    with pytest.raises(InputError, match=r"no inputs|no axis"):
        audit(*pair, inputs, rounds=0, dense_compiled=pair[0], progress=False)


def test_objects_that_are_not_streams_are_named(pair):
    with pytest.raises(InputError, match=r"the data to audit has the wrong type.*found int"):
        audit(*pair, 5, rounds=0, dense_compiled=pair[0], progress=False)
    with pytest.raises(InputError, match=r"the data to certify has the wrong type.*found int"):
        certify(*pair, 5, progress=False)


def test_a_failing_loader_is_reported_in_one_line(pair):
    def broken():
        yield from list(made())[:2]
        raise OSError("disk\ngone")

    for measure in (audited, certified):
        with pytest.raises(InputError, match=r"batch 2 of .* cannot be read: disk"):
            measure(*pair, broken())


def test_outputs_that_are_not_finite_are_reported_as_valid_json(pair):
    dense, _ = pair
    broken = nn.Sequential(dense, nn.Threshold(0.0, float("nan"))).eval()
    report = audit(dense, broken, torch.randn(4, 16), rounds=0, dense_compiled=dense, progress=False)
    assert "WARNING: outputs are not finite on some inputs: compiled sparse" in report.notes
    rows = json.loads(report.to_json(), parse_constant=pytest.fail)["rows"]
    assert rows[-1]["difference"] is None and rows[0]["difference"] == 0


# --- The command line ---


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A checkpoint, an artifact, twelve images in ten classes, and a count of batches that are alive."""

    def create(*_, **__):
        model = tiny_vit()
        model.pretrained_cfg = {"input_size": (3, 32, 32)}
        return model

    monkeypatch.setattr(timm_models, "create", create)
    monkeypatch.setattr(torch, "compile", lambda model, **_: model)
    model = create()
    save_file(model.state_dict(), tmp_path / "dense.safetensors")
    config = Config(pattern="15:16", score="magnitude", exclude=("*",), include=("blocks.1.mlp.fc2",))
    mpcompile.save(transform(model, torch.randn(2, 3, 32, 32), config), tmp_path / "pruned.mpc")
    for number in range(BATCHES):
        where = tmp_path / "images" / f"{number % 10}"
        where.mkdir(parents=True, exist_ok=True)
        Image.effect_noise((40, 36), 40 + 5 * number).convert("RGB").save(where / f"{number}.png")
    read, passes = images.Images.__iter__, []

    def tracked(self):
        passes.append(Tracked(read(self)))
        return iter(passes[-1])

    monkeypatch.setattr(images.Images, "__iter__", tracked)
    return tmp_path, passes


def run(folder, command, *arguments):
    given = ["--checkpoint", f"{folder}/dense.safetensors", "--images", f"{folder}/images", "--quiet"]
    assert cli.main([command, "vit", *given, *arguments]) == 0


def test_commands_hold_one_batch_at_a_time(folder):
    folder, passes = folder
    artifact = ["--artifact", f"{folder}/pruned.mpc", "--json", f"{folder}/out.json"]
    run(folder, "audit", *artifact, "--batch", "1", "--rounds", "1")
    row = json.loads((folder / "out.json").read_text())["rows"][0]
    assert row["samples"] == BATCHES and row["correct"] is not None
    assert len(passes) == 1 and passes[0].alive <= 3
    run(folder, "compile", "--batch", "1", "--calibrate", "dense", "--out", f"{folder}/new.mpc")
    assert len(passes) > 1 and all(one.alive <= 3 for one in passes)
    run(folder, "certify", *artifact, "--tiers", "0")
    assert json.loads((folder / "out.json").read_text())["samples"] == BATCHES


def test_images_that_an_artifact_was_calibrated_on_are_reported(folder, capsys):
    folder, _ = folder
    out, made = f"{folder}/out.json", f"{folder}/new.mpc"
    run(folder, "compile", "--samples", "5", "--calibrate", "dense", "--out", made)
    assert len(mpcompile.load(made).plan.provenance["calibration_files"]) == 5
    output = "5 of the 12 images calibrated this artifact"
    for command in (["audit", "--rounds", "0"], ["certify", "--tiers", "0"]):
        capsys.readouterr()
        run(folder, *command, "--artifact", made, "--json", out)
        assert output in capsys.readouterr().out
        run(folder, *command, "--artifact", f"{folder}/pruned.mpc", "--json", out)
        assert "calibrated this artifact" not in capsys.readouterr().out


@pytest.mark.parametrize("score", ["wanda", "covariance", "obs", "ser"])
def test_an_audit_calibrates_for_every_score_that_needs_data(score, folder, monkeypatch):
    folder, _ = folder
    taken = []

    def transformed(model, example, config, calibration, **_):
        taken.append(None if calibration is None else sum(len(b[0]) for b in calibration))
        return transform(model, example, Config(pattern="2:4", score="magnitude"))

    monkeypatch.setattr(mpcompile, "transform", transformed)
    out = ["--rounds", "0", "--json", f"{folder}/out.json", "--batch", "5"]
    run(folder, "audit", "--score", score, *out)
    run(folder, "audit", "--score", "magnitude", *out)
    assert taken == [BATCHES, None]
    assert not any("calibrated on" in note for note in json.loads((folder / "out.json").read_text())["notes"])
    monkeypatch.setattr("mpcompile.cli.commands.measuring.audit.CALIBRATED", 7)
    run(folder, "audit", "--score", score, *out)
    assert taken[-1] == 10  # two batches of five
    notes = json.loads((folder / "out.json").read_text())["notes"]
    assert any(note.startswith("calibrated on 10 of the audited images, which flatters accuracy") for note in notes)
