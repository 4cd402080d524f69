"""``mpcompile distill``: run a recipe, from the dense model to the distilled one; on many GPUs under torchrun."""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import logging
from typing import Any

import torch
from torch import nn

import mpcompile
from mpcompile.cli.destinations import declare
from mpcompile.cli.models import announce
from mpcompile.cli.options import (
    Commands,
    as_path,
    as_path_text,
    classes_option,
    command,
    json_option,
    model_arguments,
    show,
    source_options,
    threads_option,
)
from mpcompile.errors import ConfigError, InputError
from mpcompile.io.writing import make_folder, write_atomically
from mpcompile.sources.loading import load_model
from mpcompile.training.events import TRACKERS, check_trackers

log = logging.getLogger(__name__)


def add(commands: Commands) -> None:
    """Declare the command."""
    job = command(
        commands,
        "distill",
        help="mask a model, merge its tokens and distil it, as a recipe describes",
        description="Prune a model as a recipe says (one of --list, or a YAML file whose `model` is any MODEL "
        "of the other commands), reconstruct its blocks if the recipe has a section `reconstruct`, and distil the "
        "dense model into the pruned one. Under torchrun, the same command runs on many GPUs. The --out folder "
        "receives the student, checkpoints, a log and the result, distilled.mpc.",
        example="mpcompile distill vit_base_2of4_tome8 --data imagenet --out run --pretrained --resume auto\n"
        "torchrun --nproc-per-node 8 -m mpcompile distill resnet50_8of16 --data imagenet --out run --device cuda\n"
        "mpcompile distill mine.yaml --data photos --out run --set train.lr=3e-4 --set data.batch=16\n"
        "mpcompile distill vit_tiny_8of16_unlabelled --data photos --val-split none --out run --pretrained",
    )
    job.add_argument("recipe", type=as_path_text, nargs="?", help="name of a recipe (--list shows them) or a YAML file")
    job.add_argument("--list", action="store_true", help="list the built-in recipes")
    text = "images: one folder per split, with one subfolder per class; without labels and evaluation, any folder"
    job.add_argument("--data", type=as_path_text, metavar="FOLDER", help=text)
    job.add_argument(
        "--reader", default="", metavar="NAME", help="read hfds/NAME, hfids/NAME or wds/NAME instead of a folder"
    )
    job.add_argument("--train-split", default="train", metavar="SPLIT", help="split to train on (default train)")
    job.add_argument(
        "--val-split",
        default="validation",
        metavar="SPLIT",
        help="split to evaluate on; none: no evaluation (default validation)",
    )
    job.add_argument("--out", type=as_path, metavar="FOLDER", help="folder for all files of the run")
    declare(job, out=("student.mpc", "reconstructed.mpc", "log.jsonl", "result.json", "distilled.mpc"))
    job.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="change a value of the recipe, such as train.lr=3e-4",
    )
    job.add_argument("--resume", choices=("never", "auto"), default="never", help="auto: resume an interrupted run")
    source_options(job)
    classes_option(job)
    named = "the model's classes in their order, one folder name per line (default: folders sorted by name)"
    job.add_argument("--class-map", type=as_path, metavar="FILE", help=named)
    job.add_argument("--device", default="cpu", help="cpu or cuda (default cpu)")
    threads_option(job)
    job.add_argument("--tracker", action="append", default=[], choices=TRACKERS, help="also log to this tracker")
    json_option(job)
    job.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Return 0 once the run is complete."""
    from mpcompile.data import ranks
    from mpcompile.training.recipes.recipe import Recipe

    if args.list:
        recipes = [Recipe.load(name) for name in Recipe.names()]
        lines = [f"{r.name:26} {r.model}, {r.compile.pattern}, tome_r = {r.compile.tome_r}" for r in recipes]
        show(args, "\n".join(lines), json.dumps([r.to_dict() for r in recipes], indent=1))
        return 0
    missing = [name for name in ("recipe", "data", "out") if not getattr(args, name)]
    if missing:
        named = ["RECIPE" if name == "recipe" else f"--{name}" for name in missing]
        raise ConfigError("arguments are missing", expected="RECIPE --data FOLDER --out FOLDER", found=f"no {named}")
    recipe = Recipe.load(args.recipe, args.set)
    if args.threads:
        torch.set_num_threads(args.threads)
    try:
        device = ranks.start(args.device)
        return _distill(args, recipe, device)
    except RuntimeError as error:
        if not ranks.lost(error):
            raise
        raise InputError(
            "another process ended, so this one cannot continue", hint="its message gives the reason"
        ) from error
    finally:
        ranks.stop()


def _distill(args: argparse.Namespace, recipe: Any, device: torch.device) -> int:
    from mpcompile.data import ranks
    from mpcompile.io.lock import locked

    check_trackers(args.tracker)
    if ranks.rank() == 0:
        make_folder(args.out)
    with locked(args.out) if ranks.rank() == 0 else contextlib.nullcontext():
        return _distill_locked(args, recipe, device)


def _distill_locked(args: argparse.Namespace, recipe: Any, device: torch.device) -> int:
    """Distil, while no other process writes into the folder."""
    from mpcompile.cli.students import Student
    from mpcompile.data import datasets, ranks
    from mpcompile.data import loader as images
    from mpcompile.training import checkpoint

    if args.resume == "never" and (args.out / checkpoint.NAME).exists():
        raise checkpoint.earlier_run(args.out / checkpoint.NAME)
    torch.manual_seed(recipe.train.seed)
    size = None if recipe.data.size is None else (3, recipe.data.size, recipe.data.size)
    source = load_model(
        recipe.model,
        pretrained=args.pretrained,
        checkpoint=args.checkpoint,
        input_size=size,
        num_classes=args.num_classes,
        **model_arguments(args),
    )
    source.check_takes_images()
    if ranks.rank() == 0:
        announce(args, source)
    teacher = source.model.to(device)
    seed, named_by = recipe.train.seed, str(args.class_map or "")
    train = _training_images(args, recipe, source.num_classes, named_by)
    held_out = None
    if args.val_split != "none":
        names = datasets.class_names(train)
        held_out = datasets.dataset(args.data, args.val_split, False, args.reader, seed, names, named_by)
    # The loaders are made before the student, which takes minutes, so that errors in them show at once.
    notes = [note for source in (train, held_out) for note in getattr(source, "notes", ())]
    for note in notes if ranks.rank() == 0 else ():
        log.warning("note: %s", note)
    batches = images.loader(train, teacher, recipe.data, True, recipe.train.accumulate, seed)
    val = None if held_out is None else images.loader(held_out, teacher, recipe.data, training=False)
    data_digest = datasets.fingerprint(train)
    student = Student(args, recipe, source, train, data_digest).make().to(device)
    result = mpcompile.distill(
        student,
        teacher,
        batches,
        val,
        recipe.train,
        out=args.out,
        resume=args.resume,
        fingerprint=_fingerprint(args, recipe, teacher, data_digest),
        trackers=args.tracker,
        progress=not args.quiet,
    )
    if ranks.rank() == 0:
        student.plan.figures = {"distillation": result.to_dict()}
        mpcompile.save(student.eval(), args.out / "distilled.mpc")
        summary = {"recipe": recipe.to_dict(), "result": result.to_dict(), "macs": vars(student.plan.macs)}
        summary["notes"] = notes
        data = json.dumps(summary, indent=1)
        write_atomically(args.out / "result.json", data)
        accuracy = f", top-1 {result.accuracy[-1]:.2%}" if result.accuracy else ""
        text = f"{recipe.name}: loss {' -> '.join(f'{loss:.4f}' for loss in result.losses)}{accuracy}\n"
        text += f"{result.steps} steps, {result.images} images; written: {args.out / 'distilled.mpc'}"
        if source.random:
            text += "\nnote: the dense model has random weights, so accuracy means nothing"
        if args.quiet:  # else they were logged before training
            text += "".join(f"\nnote: {note}" for note in notes)
        show(args, text, data)
    return 0


def _training_images(args: argparse.Namespace, recipe: Any, classes: int, named_by: str) -> Any:
    """Return the training images; without labels if nothing reads these."""
    from mpcompile.data import datasets

    names = None if args.class_map is None else datasets.read_class_map(args.class_map)
    without_labels = recipe.train.alpha == 1
    if without_labels and args.val_split == "none" and not args.reader and names is None:
        return datasets.unlabelled(args.data, args.train_split)
    try:
        train = datasets.dataset(args.data, args.train_split, True, args.reader, recipe.train.seed, names, named_by)
        datasets.check_classes(train, classes, named_by)
    except InputError as error:
        if not without_labels or args.val_split == "none":
            raise
        hint = "images without classes train with --val-split none"
        raise InputError(error.message, expected=error.expected, found=error.found, hint=hint) from error
    if names is not None and not datasets.class_names(train):
        raise ConfigError(
            "--class-map needs data that names its classes", expected="a folder or hfds/NAME", found=args.reader
        )
    return train


def _fingerprint(args: argparse.Namespace, recipe: Any, teacher: nn.Module, data_digest: str) -> str:
    """Return a digest of everything that the training batches depend on, except folder and number of workers."""
    from mpcompile.data import loader as images

    how = {key: value for key, value in recipe.to_dict()["data"].items() if key != "workers"}
    read = [images.data_config_of(teacher, recipe.data), args.reader, args.train_split]
    text = json.dumps([how, read], sort_keys=True)
    return hashlib.sha256(f"{text} {data_digest}".encode()).hexdigest()
