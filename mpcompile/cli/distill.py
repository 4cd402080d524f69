"""``mpcompile distill``: a recipe, from the dense model to a distilled one; on many GPUs under torchrun."""

from __future__ import annotations

import argparse
import hashlib
import json
from pathlib import Path
from typing import Any

import torch
from torch import nn

import mpcompile
from mpcompile.cli.common import Commands, at_least, command, create, json_option, show
from mpcompile.errors import ArtifactError, ConfigError, InputError
from mpcompile.events import TRACKERS
from mpcompile.files import load_checkpoint, write_atomically
from mpcompile.images import data_config


def add(commands: Commands) -> None:
    """Declare it."""
    job = command(
        commands,
        "distill",
        help="mask, merge and distil a timm model by a recipe",
        description="Make a student of a timm model by a recipe (the paper's, or a YAML file), and distil it from the "
        "dense model. Under torchrun the same command runs on many GPUs. FOLDER gets the student, checkpoints, a log "
        "and the result, distilled.mpc.",
        example="mpcompile distill vit_base_2of4_tome8 --data imagenet --out run --pretrained --resume auto\n"
        "torchrun --nproc-per-node 8 -m mpcompile distill resnet50_8of16 --data imagenet --out run --device cuda\n"
        "mpcompile distill mine.yaml --data photos --out run --set train.lr=3e-4 --set data.batch=16",
    )
    job.add_argument("recipe", nargs="?", help="name of a recipe (--list shows them) or a YAML file")
    job.add_argument("--list", action="store_true", help="list the recipes that come with mpcompile")
    job.add_argument("--data", metavar="FOLDER", help="images: one sub-folder a class, in a folder for each split")
    job.add_argument(
        "--reader", default="", metavar="NAME", help="hfds/NAME, hfids/NAME or wds/NAME instead of a folder"
    )
    job.add_argument("--train-split", default="train", metavar="SPLIT", help="(default train)")
    job.add_argument(
        "--val-split", default="validation", metavar="SPLIT", help="none: don't evaluate (default validation)"
    )
    job.add_argument("--out", type=Path, metavar="FOLDER", help="for everything the run writes")
    job.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="change the recipe: train.lr=3e-4")
    job.add_argument("--resume", choices=("never", "auto"), default="never", help="auto: go on where a run broke off")
    weights = job.add_mutually_exclusive_group()
    weights.add_argument("--pretrained", action="store_true", help="timm's pretrained weights (fetched by timm)")
    weights.add_argument("--checkpoint", type=Path, metavar="FILE", help="safetensors file or state dict of the model")
    job.add_argument("--num-classes", type=at_least(1), metavar="N", help="of the model (default: its own)")
    job.add_argument("--device", default="cpu", help="cpu or cuda (default cpu)")
    job.add_argument("--threads", type=at_least(1), help="threads of PyTorch")
    job.add_argument("--tracker", action="append", default=[], choices=TRACKERS, help="log there too")
    json_option(job)
    job.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Exit status 0 when the run came to its end."""
    from mpcompile.training import ranks
    from mpcompile.training.recipe import Recipe

    if args.list:
        for name in Recipe.names():
            found = Recipe.load(name)
            print(f"{name:24} {found.model}, {found.compile.pattern}, tome_r = {found.compile.tome_r}")
        return 0
    missing = [name for name in ("recipe", "data", "out") if not getattr(args, name)]
    if missing:
        named = ["RECIPE" if name == "recipe" else f"--{name}" for name in missing]
        raise ConfigError("something is missing", expected="RECIPE --data FOLDER --out FOLDER", found=f"no {named}")
    recipe = Recipe.load(args.recipe, args.set)
    if args.threads:
        torch.set_num_threads(args.threads)
    try:
        device = ranks.start(args.device)
        return _distill(args, recipe, device)
    finally:
        ranks.stop()


def _distill(args: argparse.Namespace, recipe: Any, device: torch.device) -> int:
    from mpcompile.training import images, ranks

    teacher = _teacher(args, recipe).to(device)
    seed = recipe.train.seed
    train = images.dataset(args.data, args.train_split, True, args.reader, seed)
    classes = getattr(teacher, "num_classes", 0)
    images.check_classes(train, classes)
    student = _student(args, recipe, teacher, train).to(device)
    val = None
    if args.val_split != "none":
        source = images.dataset(args.data, args.val_split, False, args.reader, seed)
        images.check_classes(source, classes)
        val = images.loader(source, teacher, recipe.data, training=False)
    batches = images.loader(train, teacher, recipe.data, True, recipe.train.accumulate)
    result = mpcompile.distill(
        student,
        teacher,
        batches,
        val,
        recipe.train,
        out=args.out,
        resume=args.resume,
        trackers=args.tracker,
        progress=not args.quiet,
    )
    if ranks.rank() == 0:
        mpcompile.save(student.eval(), args.out / "distilled.mpc")
        summary = {"recipe": recipe.to_dict(), "result": result.to_dict(), "macs": vars(student.plan.macs)}
        text = json.dumps(summary, indent=1)
        write_atomically(args.out / "result.json", text)
        accuracy = f", top-1 {result.accuracy[-1]:.2%}" if result.accuracy else ""
        told = f"{recipe.name}: loss {' -> '.join(f'{loss:.4f}' for loss in result.losses)}{accuracy}\n"
        told += f"{result.steps} steps, {result.images} images; written: {args.out / 'distilled.mpc'}"
        if not args.pretrained and args.checkpoint is None:
            told += "\nnote: the dense model has random weights, so accuracy means nothing"
        show(args, told, text)
    return 0


def _teacher(args: argparse.Namespace, recipe: Any) -> nn.Module:
    torch.manual_seed(recipe.train.seed)
    options = {} if args.num_classes is None else {"num_classes": args.num_classes}
    if recipe.data.size is not None and "vit" in recipe.model:
        options["img_size"] = recipe.data.size
    model = create(recipe.model, args.pretrained, **options).eval()
    if args.checkpoint is not None:
        load_checkpoint(model, args.checkpoint)
    return model


def _student(args: argparse.Namespace, recipe: Any, teacher: nn.Module, train: Any) -> Any:
    """Made on the first rank, or read from an earlier run with the same recipe; the others are sent it."""
    from mpcompile.training import images, ranks

    path = args.out / "student.mpc"
    failed: Exception | None = None
    if ranks.rank() == 0:
        try:
            args.out.mkdir(parents=True, exist_ok=True)
            stamp = _stamp(args, recipe, teacher)
            if args.resume == "auto" and path.exists() and _read(path.with_suffix(".stamp")) == stamp:
                mpcompile.load(path)  # whole, or it raises
            else:
                calibration = recipe.calibration
                drawn = images.calibration(train, teacher, recipe.data, calibration.images, calibration.batch)
                device = next(teacher.parameters()).device
                student = recipe.student(teacher, [part.to(device) for part in drawn])
                student.plan.provenance = {"model": recipe.model, "recipe": recipe.name, "data": data_config(teacher)}
                mpcompile.save(student.eval(), path)
                write_atomically(path.with_suffix(".stamp"), stamp)
        except Exception as error:  # the other ranks are waiting
            failed = error
    told = ranks.broadcast(None if failed is None else str(failed))
    if failed is not None:
        raise failed
    if told is not None:
        raise InputError(f"the first rank failed: {told}")
    content = ranks.broadcast(path.read_bytes() if ranks.rank() == 0 and ranks.active() else None)
    if ranks.rank() == 0:
        return mpcompile.load(path)
    copy = args.out / f".student.{ranks.rank()}.mpc"
    try:
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_bytes(content)
        return mpcompile.load(copy)
    except OSError as error:
        raise ArtifactError(f"can't write {copy}", found=error.strerror or str(error)) from error
    finally:
        copy.unlink(missing_ok=True)


def _read(path: Path) -> str:
    return path.read_text() if path.exists() else ""


def _stamp(args: argparse.Namespace, recipe: Any, teacher: nn.Module) -> str:
    """What the student depends on."""
    sha = hashlib.sha256()
    parts = {
        k: v for k, v in recipe.to_dict().items() if k in ("model", "compile", "calibration", "prior_weight", "data")
    }
    sha.update(json.dumps([parts, args.data, args.reader, args.train_split], sort_keys=True).encode())
    for name, tensor in sorted(teacher.state_dict().items()):
        sha.update(name.encode())
        sha.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return sha.hexdigest()
