"""``mpcompile compile``: mask the weights of a model, merge its tokens, and save the result."""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

import mpcompile
from mpcompile.cli.destinations import ARTIFACT, FILE, FOLDER, declare
from mpcompile.cli.models import load_source, on_device, provenance
from mpcompile.cli.options import (
    Commands,
    as_path,
    as_path_text,
    at_least,
    command,
    config_of,
    config_options,
    json_option,
    seed_option,
    show,
    threads_option,
    weights_options,
)
from mpcompile.cli.streams import digests
from mpcompile.config import CALIBRATIONS
from mpcompile.data.images import folder
from mpcompile.errors import ConfigError
from mpcompile.export import FORMATS, save_dense
from mpcompile.export.examples import describe_inputs
from mpcompile.reconstruction.options import Reconstruction
from mpcompile.sources.loaded import Batches


def add(commands: Commands) -> None:
    """Declare the command."""
    job = command(
        commands,
        "compile",
        help="mask the weights of a model, merge its tokens, and save the artifact",
        description="Mask the weights of a model, calibrated on a few hundred unlabelled images, merge its "
        "tokens, and save the result with its plan. It can then be distilled, measured, exported and served.",
        example="mpcompile compile vit_small_patch16_224 --pretrained --images train --pattern 8:16 --out pruned.mpc\n"
        "mpcompile compile vit_small_patch16_224 --pretrained --images train --reconstruct --minutes 9 --out near.mpc\n"
        "mpcompile compile resnet50 --checkpoint r50.safetensors --config recipe.yaml --images train --out r50/",
    )
    weights_options(job)
    job.add_argument("--images", type=as_path, metavar="FOLDER", help="images to calibrate on; labels are ignored")
    job.add_argument(
        "--samples", type=at_least(1), default=256, help="images drawn from --images by the seed (default 256)"
    )
    job.add_argument("--batch", type=at_least(1), default=32, help="images per batch (default 32)")
    threads_option(job)
    job.add_argument("--device", default="cpu", help="device of the computation: cpu or cuda (default cpu)")
    job.add_argument("--half", action="store_true", help="save the weights as fp16")
    out = "file to write, or folder (with a trailing slash)"
    job.add_argument("--out", type=as_path_text, required=True, metavar="FILE", help=out)
    graphs = "write the graph before and after every pass into FOLDER, as readable Python with a diff"
    job.add_argument("--dump", type=as_path_text, metavar="FOLDER", help=graphs)
    declare(job, out=lambda args: ARTIFACT if args.format == "mpc" else FILE, dump=FOLDER, statistics=FOLDER)
    kinds = "mpc: packed, with graph and plan (default); dense-masked: a state dict for timm, with zeros"
    job.add_argument("--format", choices=FORMATS, default="mpc", help=kinds)
    seed_option(job)
    how = "source of a layer's calibration statistics, as in mpcompile.transform (default pruned_to_dense)"
    job.add_argument("--calibrate", choices=CALIBRATIONS, default="pruned_to_dense", help=how)
    _reconstruction_options(job)
    json_option(job)
    config_options(job)
    job.set_defaults(run=run)


def _reconstruction_options(job: argparse.ArgumentParser) -> None:
    """Declare ``--reconstruct``, its time budget, and the folder from which an interrupted run resumes."""
    text = "then train the masked blocks on --images, without labels, towards the dense model's activations"
    job.add_argument("--reconstruct", action="store_true", help=text)
    budget = f"with --reconstruct: its time budget in minutes (default {Reconstruction().minutes:g})"
    job.add_argument("--minutes", type=float, metavar="M", help=budget)
    text = "keep statistics and reconstructed blocks in FOLDER: the same command resumes an interrupted run"
    job.add_argument("--statistics", type=as_path_text, metavar="FOLDER", help=text)


def _reconstruction_of(args: argparse.Namespace) -> Reconstruction | None:
    """Return the options of the reconstruction, or None if there is to be none.

    Raises:
        ConfigError: there are no images for it, or the budget is not one.
    """
    if not args.reconstruct:
        if args.minutes is not None:
            raise ConfigError("--minutes is the time budget of --reconstruct", expected="--reconstruct with it")
        return None
    if args.images is None:
        raise ConfigError("--reconstruct needs images", expected="--images FOLDER", found="none")
    budget = {} if args.minutes is None else {"minutes": args.minutes}
    return Reconstruction.from_options({**budget, "seed": args.seed})


def run(args: argparse.Namespace) -> int:
    """Return 0 once the artifact is written."""
    config, reconstruction = config_of(args), _reconstruction_of(args)
    if args.threads:
        torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    loaded = load_source(args)
    example = on_device(loaded, args.device, 2)
    calibration: Batches | None = None
    if args.images is not None:
        batch = loaded.fixed_batch or args.batch
        images = folder(args.images, loaded.data, samples=args.samples, batch=batch, seed=args.seed)
        calibration = loaded.batches(images)
    how = {"calibrate": args.calibrate, "seed": args.seed, "dump": args.dump, "statistics": args.statistics}
    how["reconstruction"] = reconstruction
    gm = mpcompile.transform(loaded.model, example, config, calibration, **how).eval().cpu()
    used = 0 if calibration is None else calibration.count
    gm.plan.provenance = {**provenance(loaded, used, args.seed), "inputs": describe_inputs(gm)}
    if calibration is not None:
        gm.plan.provenance["calibration_files"] = digests(calibration.source)
    if args.half:
        gm.half()
    if args.format == "mpc":
        mpcompile.save(gm, args.out)
    else:
        save_dense(gm, args.out)
    notes = "".join(f"\nnote: {note}" for note in (() if calibration is None else calibration.notes))
    show(args, f"{gm.plan}\n\n{_size(Path(args.out))}{notes}", gm.plan.to_json(indent=1))
    return 0


def _size(path: Path) -> str:
    files = [p for p in path.iterdir() if p.is_file()] if path.is_dir() else [path]
    return f"{path}: {sum(p.stat().st_size for p in files) / 2**20:,.2f} MiB"
