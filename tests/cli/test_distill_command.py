"""The command that makes a student from a recipe and distils it."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import mpcompile
from mpcompile.cli import main
from mpcompile.sources import timm_models
from tests.support.helpers import labelled_images

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return labelled_images(tmp_path_factory.mktemp("data"))


@pytest.fixture
def recipe(tmp_path):
    """A small recipe, as YAML."""
    path = tmp_path / "small.yaml"
    path.write_text(
        "model: test_resnet\n"
        'compile: {pattern: "2:4", score: wanda, permute: false, restore: false}\n'
        "calibration: {images: 6, batch: 3, calibrate: dense}\n"
        "train: {epochs: 2, lr: 1e-4, warmup: 0, bn_batches: 2}\n"
        "data: {batch: 6, size: 32, workers: 0, auto_augment: rand-m9-mstd0.5-inc1, reprob: 0.25}\n"
    )
    return path


@pytest.fixture
def command(folder, recipe):
    """Arguments without --out."""
    return ["distill", str(recipe), "--data", str(folder), "--num-classes", "3", "--quiet"]


def test_the_command_runs_a_recipe_and_resumes(folder, recipe, tmp_path, capsys):
    out = tmp_path / "run"
    command = ["distill", str(recipe), "--data", str(folder), "--out", str(out), "--num-classes", "3", "--quiet"]
    assert main([*command, "--set", "train.checkpoint_steps=1"]) == 0
    output = capsys.readouterr().out
    assert "8 steps, 48 images" in output and "random weights" in output
    assert {p.name for p in out.iterdir()} >= {
        "student.mpc",
        "distilled.mpc",
        "result.json",
        "log.jsonl",
        "checkpoint.pt",
    }
    result = json.loads((out / "result.json").read_text())
    assert len(result["result"]["accuracy"]) == 3 and result["recipe"]["model"] == "test_resnet"
    weights = mpcompile.load(out / "distilled.mpc").state_dict()
    assert main([*command, "--set", "train.checkpoint_steps=1"]) == 2
    assert "earlier run" in capsys.readouterr().err
    assert main([*command, "--set", "train.checkpoint_steps=1", "--resume", "auto"]) == 0
    again = mpcompile.load(out / "distilled.mpc").state_dict()
    assert all(torch.equal(weights[k], again[k]) for k in weights)


@pytest.mark.parametrize("place", ["", "train", "train/album"], ids=["flat", "split", "deep"])
def test_images_without_labels(folder, recipe, tmp_path, capsys, place):
    """Nothing reads labels with alpha=1 and no evaluation: any folder of images will do."""
    data = tmp_path / "photos"
    (data / place).mkdir(parents=True)
    for number, image in enumerate(sorted(folder.glob("train/*/*.png"))[:12]):
        shutil.copy(image, data / place / f"{number}.png")
    command = ["distill", str(recipe), "--data", str(data), "--out", str(tmp_path / "run"), "--quiet"]
    command += ["--set", "train.alpha=1", "--set", "data.mix=0.5", "--set", "train.epochs=1"]
    assert main(command) == 2
    assert "Images without classes train with --val-split none" in capsys.readouterr().err
    assert main([*command, "--val-split", "none"]) == 0
    assert "2 steps, 12 images" in capsys.readouterr().out
    assert main([*command, "--val-split", "none", "--resume", "auto", "--set", "train.alpha=0.5"]) == 2
    assert "train.alpha=1 with data.mix" in capsys.readouterr().err


def test_splits_are_found_without_labels(folder, recipe, tmp_path, capsys):
    """In any spelling, as with labels: evaluation images are not trained on."""
    data = tmp_path / "data"
    for name, split in (("train", "Training"), ("validation", "Testing")):
        shutil.copytree(folder / name, data / split)
    command = ["distill", str(recipe), "--data", str(data), "--out", str(tmp_path / "run"), "--quiet"]
    options = ["--set", "train.alpha=1", "--set", "train.epochs=1", "--val-split", "none"]
    assert main([*command, *options]) == 0
    assert "4 steps, 24 images" in capsys.readouterr().out


def test_no_images_without_labels(recipe, tmp_path, capsys):
    (tmp_path / "photos").mkdir()
    command = ["distill", str(recipe), "--out", str(tmp_path / "run"), "--quiet", "--val-split", "none"]
    for data, found in ((tmp_path / "photos", "no images"), (tmp_path / "nowhere", "no such folder")):
        assert main([*command, "--data", str(data), "--set", "train.alpha=1"]) == 2
        error = capsys.readouterr().err
        assert f"there are no images in {data}" in error and found in error
    assert not (tmp_path / "run" / "student.mpc").exists()


def test_a_corrupt_image_is_named(folder, recipe, tmp_path, capsys):
    data = tmp_path / "data"
    shutil.copytree(folder, data)
    whole = data / "train" / "bee" / "3.png"
    out = tmp_path / "run"
    command = ["distill", str(recipe), "--data", str(data), "--out", str(out), "--num-classes", "3", "--quiet"]
    whole.write_bytes(whole.read_bytes()[:200])
    assert main([*command, "--set", "calibration.images=1", "--val-split", "none"]) == 2
    output = capsys.readouterr().err
    assert "bee/3.png cannot be read" in output and "checkpoint" in output


def test_missing_arguments_are_named(capsys):
    assert main(["distill", "resnet50_2of4"]) == 2
    assert "no ['--data', '--out']" in capsys.readouterr().err
    assert main(["distill", "--list"]) == 0
    assert "vit_large_8of16" in capsys.readouterr().out


def test_a_corrupt_image_in_a_worker_is_one_line(command, folder, tmp_path, capsys):
    data = tmp_path / "data"
    shutil.copytree(folder, data)
    (data / "train" / "bee" / "3.png").write_bytes(b"no image")
    command[command.index(str(folder))] = str(data)
    command += ["--out", str(tmp_path / "run"), "--set", "calibration.images=1", "--set", "data.workers=1"]
    assert main([*command, "--val-split", "none"]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert line.startswith(f"mpcompile: image {data}/train/bee/3.png cannot be read; expected a whole image file")


def test_a_corrupt_evaluation_image_costs_no_epoch(command, folder, tmp_path, capsys):
    data, out = tmp_path / "data", tmp_path / "run"
    shutil.copytree(folder, data)
    image = data / "validation" / "bee" / "1.png"
    whole = image.read_bytes()
    image.write_bytes(whole[:100])
    command[command.index(str(folder))] = str(data)
    assert main([*command, "--out", str(out)]) == 2
    output = capsys.readouterr().err
    assert (
        f"evaluation failed: image {image} cannot be read" in output and f"checkpoint is {out}/checkpoint.pt" in output
    )
    image.write_bytes(whole)
    moved = tmp_path / "moved"  # the location of the images does not matter
    data.rename(moved)
    command[command.index(str(data))] = str(moved)
    assert main([*command, "--out", str(out), "--resume", "auto", "--json", "-"]) == 0
    assert json.loads(capsys.readouterr().out)["result"]["resumed"] == 4


def test_files_of_another_run_are_left_alone(command, folder, tmp_path, capsys):
    out, data = tmp_path / "run", tmp_path / "data"
    command += ["--out", str(out), "--val-split", "none"]
    assert main([*command, "--set", "train.epochs=1"]) == 0
    before = (out / "student.mpc").read_bytes()
    shutil.copytree(folder, data)
    (data / "train" / "ant" / "0.png").unlink()
    other = [str(data) if part == str(folder) else part for part in command]
    resumed = ["--set", "train.epochs=1", "--resume", "auto"]
    for arguments, match in (
        ([*command, "--set", "compile.pattern=1:4"], "holds the checkpoint of an earlier run"),
        ([*command, *resumed, "--set", "compile.pattern=1:4"], "holds a run with a different student"),
        ([*other, *resumed], "holds a run with a different student"),
        ([*command, *resumed, "--set", "data.hflip=0.1"], "belongs to another run; expected images"),
    ):
        assert main(arguments) == 2
        assert match in capsys.readouterr().err
        assert (out / "student.mpc").read_bytes() == before


def test_a_student_is_reconstructed_once(command, tmp_path, capsys):
    out = tmp_path / "run"
    command += ["--out", str(out), "--val-split", "none", "--set", "train.epochs=1", "--set", "reconstruct.views=2"]
    assert main([*command, "--set", "reconstruct.epochs=1"]) == 0
    files = [out / name for name in ("student.mpc", "reconstructed.mpc", "distilled.mpc")]
    plans = [[record.name for record in mpcompile.load(file).plan.passes] for file in files]
    assert ["reconstruct" in names for names in plans] == [False, True, True]
    assert mpcompile.load(files[1]).plan.provenance["recipe"] == "small"
    assert list((out / "reconstruction").glob("reconstruct-0*"))
    before = [file.stat().st_mtime_ns for file in files[:2]]
    assert main([*command, "--set", "reconstruct.epochs=1", "--resume", "auto"]) == 0
    assert [file.stat().st_mtime_ns for file in files[:2]] == before
    for changes in (["--set", "reconstruct.epochs=2"], ["--set", "reconstruct=null"]):
        capsys.readouterr()
        assert main([*command, *changes, "--resume", "auto"]) == 2
        assert "holds a run with a different student" in capsys.readouterr().err
    assert [file.stat().st_mtime_ns for file in files[:2]] == before


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        (["--out", "{recipe}"], "cannot make the folder"),
        (["--out", "{recipe}/x"], "cannot make the folder"),
        (["--out", "run", "--device", "foo"], "device 'foo' cannot be used"),
        (["--out", "run", "--val-split", "test"], "no images of split 'test'"),
        (["--out", "run", "--num-classes", "5"], "different classes"),
        (["--out", "run", "--set", "model=test_resnet.foo"], "timm cannot create 'test_resnet.foo'"),
        (["--out", "run", "--class-map", "none.txt"], "cannot read the class map none.txt"),
        (["--out", "run", "--set", "data.batch=64"], "fewer training images than make a batch; expected at least 64"),
    ],
)
def test_invalid_calls(arguments, match, command, recipe, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main([*command, *[part.format(recipe=recipe) for part in arguments]]) == 2
    assert match in capsys.readouterr().err


def test_the_artifact_knows_its_size_and_classes(folder, tmp_path, monkeypatch, capsys):
    """A model distilled at a custom image size is audited, drawn and exported at that size."""
    made = timm_models.create
    monkeypatch.setattr(timm_models, "create", lambda *names, **options: made(*names, depth=2, **options))
    out, recipe, weights = tmp_path / "run", tmp_path / "small.yaml", tmp_path / "dense.safetensors"
    recipe.write_text(
        "model: vit_tiny_patch16_224\n"
        "compile: {pattern: 2:4, score: magnitude, tome_r: 1, permute: false, restore: false}\n"
        "calibration: {images: 3}\n"
        "train: {epochs: 1}\n"
        "data: {batch: 6, size: 64, workers: 0}\n"
    )
    torch.manual_seed(0)
    dense = timm_models.create_sized("vit_tiny_patch16_224", False, (3, 64, 64), 3)
    save_file(dense.state_dict(), weights)
    known = ["--checkpoint", str(weights), "--quiet"]
    command = ["distill", str(recipe), "--data", str(folder), "--num-classes", "3", "--out", str(out), *known]
    assert main(command) == 0
    plan = mpcompile.load(out / "distilled.mpc").plan
    found = plan.provenance
    assert found["data"]["input_size"] == [3, 64, 64] and found["num_classes"] == 3 and found["recipe"] == "small"
    assert found["calibration_images"] == 3 and found["weights"]["file"] == "dense.safetensors"
    assert len(plan.figures["distillation"]["losses"]) == 1
    artifact, validation = str(out / "distilled.mpc"), str(folder / "validation")
    audit = [
        "audit",
        "vit_tiny_patch16_224",
        "--artifact",
        artifact,
        "--images",
        validation,
        "--rounds",
        "0",
        "--record",
        *known,
    ]
    assert main(audit) == 0
    assert "9" in capsys.readouterr().out and set(mpcompile.load(artifact).plan.figures) >= {"rows", "distillation"}
    picture = str(folder / "validation" / "ant" / "0.png")
    assert main(["report", artifact, "--image", picture, "--out", str(tmp_path / "page.html")]) == 0
    page = (tmp_path / "page.html").read_text()
    assert "distillation: losses" in page and "after merge 1" in page
    assert main(["export", artifact, "--format", "pt2", "--engine", "dense", "--out", str(tmp_path / "m.pt2")]) == 0


@pytest.mark.parametrize("broken", [False, True])
def test_two_processes_do_what_one_does(broken, folder, tmp_path, capfd):
    """Under torchrun, a step has the same batches and so the same losses; an error of one rank is one line."""
    data, recipe = tmp_path / "data", tmp_path / "small.yaml"
    shutil.copytree(folder, data)
    recipe.write_text(
        "model: vit_tiny_patch16_224\n"
        "compile: {pattern: 2:4, score: magnitude, permute: false, restore: false}\n"
        "calibration: {images: 3}\n"
        "reconstruct: {views: 1, epochs: 1, lr: 0}\n"  # AdamW would make whole steps of rounding errors
        "train: {epochs: 2, optimizer: sgd, lr: 1e-3, accumulate: 2}\n"
        "data: {batch: 8, size: 32, workers: 0, augment: false}\n"
    )
    command = ["distill", str(recipe), "--data", str(data), "--num-classes", "3", "--quiet"]
    if broken:
        (data / "train" / "bee" / "3.png").write_bytes(b"no image")
        command += ["--set", "calibration.images=1"]
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"}
    environment |= {"OMP_NUM_THREADS": "1"}
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [*torchrun, "-m", "mpcompile", *command, "--out", str(tmp_path / "two")],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    output = [line for line in done.stderr.splitlines() if line.startswith("mpcompile: ")]
    if broken:
        assert done.returncode != 0 and any(f"image {data}/train/bee/3.png cannot be read" in line for line in output)
        assert not any(line.startswith("RuntimeError") for line in done.stderr.splitlines())
        return
    assert done.returncode == 0, done.stderr
    assert main([*command, "--out", str(tmp_path / "one")]) == 0
    one, two = (json.loads((tmp_path / name / "result.json").read_text())["result"] for name in ("one", "two"))
    assert one["steps"] == two["steps"] == 6 and one["images"] == two["images"] == 48
    assert one["losses"] == pytest.approx(two["losses"], abs=1e-4) and one["accuracy"] == two["accuracy"]
    left = {path.name for path in (tmp_path / "two").iterdir()}
    students = {f"{name}.{end}" for name in ("student", "reconstructed") for end in ("mpc", "stamp")}
    files = {"distilled.mpc", "result.json", "log.jsonl", "checkpoint.pt"}
    assert left == students | files | {"reconstruction"}


@pytest.mark.parametrize("quiet", [False, True])
def test_unread_data_is_reported_once(quiet, command, folder, tmp_path, capsys):
    data, out = tmp_path / "data", tmp_path / "run"
    shutil.copytree(folder, data)
    (data / "train" / ".ipynb_checkpoints").mkdir()
    (data / "train" / "bee" / "9.tga").touch()
    command[command.index(str(folder))] = str(data)
    command = [*command, "--out", str(out), "--val-split", "none", "--set", "train.epochs=1"]
    assert main(command if quiet else [part for part in command if part != "--quiet"]) == 0
    output = capsys.readouterr()
    note = f"not read in {data}/train: 1 hidden entry (.ipynb_checkpoints), 1 file of another format (.tga)"
    assert output.out.count(note) == quiet and json.loads((out / "result.json").read_text())["notes"] == [note]
