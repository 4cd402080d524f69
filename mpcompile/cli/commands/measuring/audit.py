"""``mpcompile audit``: measure a transformed and compiled model against its dense builds."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from torch.utils import _pytree as pytree

import mpcompile
from mpcompile.backend import mpsparse
from mpcompile.cli.models import class_names, prepare
from mpcompile.cli.options import DTYPES, Commands, as_path, at_least, command, model_options, show
from mpcompile.cli.streams import DeviceBatches, seen_before
from mpcompile.data.batches import forward
from mpcompile.data.images import Images, images_at
from mpcompile.errors import ConfigError
from mpcompile.ir.module import IRModule
from mpcompile.measure.report import Report
from mpcompile.runtimes.catalogue import RUNTIMES, named
from mpcompile.runtimes.openvino import SUBSET
from mpcompile.sources.loaded import LoadedModel

CALIBRATED = 256  # maximum number of images that calibrate a new transform, as in `compile`


def add(commands: Commands) -> None:
    """Declare the command."""
    job = command(
        commands,
        "audit",
        help="measure a pruned and merged model against the dense one: accuracy, MACs, bytes, latency",
        description="Compare a model with its transformed build, or with an artifact made from it. With --artifact, "
        "MODEL may be left out: the artifact names the one that it was made from.",
        example="mpcompile audit vit_small_patch16_224 --pattern 2:4 --tome-r 8 --batch 8 --json audit.json\n"
        "mpcompile audit vit_small_patch16_224 --pretrained --artifact pruned.mpc --images val --record\n"
        "mpcompile audit --artifact pruned.mpc --images val --against onnxruntime openvino",
    )
    model_options(job, optional=True)
    job.add_argument(
        "--rounds", type=at_least(0), default=20, help="timings per build; 0 measures no latency (default 20)"
    )
    job.add_argument(
        "--artifact", type=as_path, metavar="FILE", help="measure this artifact instead of a new transform"
    )
    job.add_argument(
        "--images", type=as_path, metavar="FOLDER", help="real images, with labels if there is one folder per class"
    )
    job.add_argument(
        "--samples", type=at_least(1), default=500, help="images drawn from --images by the seed (default 500)"
    )
    job.add_argument(
        "--against",
        nargs="+",
        choices=RUNTIMES,
        default=[],
        help="also run the dense model, and this build, in other runtimes, in every precision that they have here; "
        "int8 is calibrated on the audited images",
    )
    job.add_argument("--record", action="store_true", help="also store the figures in the --artifact")
    job.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Return 0 once everything is measured, whatever the figures say."""
    if args.record and args.artifact is None:
        raise ConfigError("--record needs --artifact", hint="the figures are stored in that artifact")
    if args.model is None and args.artifact is None:
        raise ConfigError("there is nothing to audit", expected="MODEL, or --artifact FILE", found="neither")
    named(args.against)  # a missing package is reported before the work
    saved = None if args.artifact is None else mpcompile.load(args.artifact)
    origin = {} if saved is None else saved.plan.provenance
    loaded, noise, config = prepare(args, origin)
    model, like = loaded.model, torch.empty(0, dtype=DTYPES[args.dtype], device=args.device)
    files: Images | None = None
    if args.images is not None:
        drawn = {"samples": args.samples, "batch": loaded.fixed_batch or args.batch, "seed": args.seed}
        names = class_names(origin, loaded)
        files = images_at(args.images, loaded.data, classes=loaded.num_classes, names=names, **drawn)
        files = loaded.whole_batches(files)
    calibration: Any = None
    if saved is not None:
        gm = saved.to(like.device, like.dtype).eval()
        _check_artifact(gm, loaded, noise, args.artifact)
    else:
        if config.needs_data:  # audited images, or noise without them
            calibration = [noise] if files is None else DeviceBatches(files, like, CALIBRATED, loaded.input_name)
        gm = mpcompile.transform(model, noise, config, calibration, seed=args.seed)
    compiled = torch.compile(gm, backend=mpsparse, options={"engine": config.engine, "frozen": config.frozen})
    batches: Any = noise if files is None else DeviceBatches(files, like, input_name=loaded.input_name)
    ranges: Any = [noise] if files is None else DeviceBatches(files, like, SUBSET, loaded.input_name)
    report = mpcompile.audit(
        model,
        compiled,
        batches,
        against=args.against,
        calibration=ranges if args.against else None,
        rounds=args.rounds,
        progress=not args.quiet,
    )
    if files is not None:
        report.notes += filter(None, (*files.notes, seen_before(files, origin)))
    if isinstance(calibration, DeviceBatches):
        report.notes.append(
            f"calibrated on {calibration.count} of the audited images, which flatters accuracy; for a reliable figure, "
            "compile on other images and audit that --artifact"
        )
    if files is not None and any(row.precision == "int8" for row in report.rows):
        report.notes.append(f"int8 is calibrated on {ranges.count} of the audited images")
    _remark(report, random=loaded.random, noise=files is None)
    if report.plan is None:
        report.plan = gm.plan
    if args.record:
        _record(args.artifact, report)
    what = args.artifact or f"{config.pattern}, tome_r = {config.tome_r}"
    show(args, f"{loaded.name}, {what}\n\n{report}\n\n{gm.plan}", report.to_json(indent=1))
    return 0


def _check_artifact(gm: IRModule, loaded: LoadedModel, noise: Any, path: Path) -> None:
    """Run an artifact once.

    Raises:
        InputError: it fails: it is the artifact of another model.
    """
    if loaded.takes_images and loaded.fixed_batch is None:
        noise = pytree.tree_map(lambda tensor: tensor[:1], noise)
    with torch.no_grad():
        forward(gm, noise, f"artifact {path}")


def _remark(report: Report, random: bool, noise: bool) -> None:
    """Add a note on the figures that mean nothing, and drop accuracy if the weights are random."""
    if random or noise:
        source = "random weights: accuracy and agreement mean nothing" if random else "images are random noise"
        report.notes.insert(0, f"{source}; speed, MACs and bytes do not depend on it")
    for row in report.rows if random else ():
        row.agree = row.correct = row.interval = row.lost = row.won = None


def _record(path: Path, report: Report) -> None:
    """Store the figures in the plan of the artifact; its weights stay unchanged."""
    saved: IRModule = mpcompile.load(path)
    figures = report.to_dict()
    saved.plan.figures |= {key: figures[key] for key in ("rows", "environment", "notes", "fell_back")}
    mpcompile.save(saved, path)
