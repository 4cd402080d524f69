"""``mpcompile audit``: a timm model, transformed and compiled, measured against its dense builds."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch

import mpcompile
from mpcompile.backend import mpsparse
from mpcompile.cli.options import Commands, at_least, class_names, command, model_options, prepare, show
from mpcompile.cli.streams import Moved, seen_before
from mpcompile.config import Config
from mpcompile.data.batches import forward
from mpcompile.data.images import Images, data_config, images_at
from mpcompile.errors import ConfigError
from mpcompile.ir.module import IRModule
from mpcompile.measure.report import Report

CALIBRATED = 256  # images that a new transform is calibrated on at most, as in `compile`


def add(commands: Commands) -> None:
    """Declare it."""
    job = command(
        commands,
        "audit",
        help="measure a timm model, dense against pruned and merged",
        description="Measure a timm model against what it becomes, or against the artifact that was made of it.",
        example="mpcompile audit vit_small_patch16_224 --pattern 2:4 --tome-r 8 --batch 8 --json audit.json\n"
        "mpcompile audit vit_small_patch16_224 --pretrained --artifact pruned.mpc --images val --record",
    )
    model_options(job)
    job.add_argument("--rounds", type=at_least(0), default=20, help="timings of each build, 0 for none (default 20)")
    job.add_argument("--artifact", type=Path, metavar="FILE", help="measure what was saved, instead of a new transform")
    job.add_argument("--images", type=Path, metavar="FOLDER", help="real images; labelled if it has a folder a class")
    job.add_argument("--samples", type=at_least(1), default=500, help="of --images, drawn by the seed (default 500)")
    job.add_argument("--record", action="store_true", help="write the figures into the --artifact, too")
    job.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Exit status 0 when the measurement went through, whatever it found."""
    if args.record and args.artifact is None:
        raise ConfigError("--record needs --artifact", hint="it says where the figures go")
    saved = None if args.artifact is None else mpcompile.load(args.artifact)
    made = {} if saved is None else saved.plan.provenance
    model, images, config = prepare(args, made)
    files = None
    if args.images is not None:
        classes = getattr(model, "num_classes", 0)
        drawn = {"samples": args.samples, "batch": args.batch, "seed": args.seed}
        files = images_at(args.images, data_config(model), classes=classes, names=class_names(made), **drawn)
    used = None
    if saved is not None:
        gm = saved.to(images.device, images.dtype).eval()
        with torch.no_grad():
            forward(gm, images[:1], f"artifact {args.artifact}")  # an artifact of another model says so
    else:
        used = _calibration(config, files, images)
        gm = mpcompile.transform(model, images, config, used, seed=args.seed)
    compiled = torch.compile(gm, backend=mpsparse, options={"engine": config.engine, "frozen": config.frozen})
    batches: Any = images if files is None else Moved(files, images)
    report = mpcompile.audit(model, compiled, batches, rounds=args.rounds, progress=not args.quiet)
    if files is not None:
        report.notes += filter(None, (*files.notes, seen_before(files, made)))
    if isinstance(used, Moved):
        report.notes.append(
            f"calibrated on {used.count} of the audited images, which flatters accuracy: for a figure to rely on, "
            "compile on other images and audit that --artifact"
        )
    _remark(report, random=not args.pretrained and args.checkpoint is None, noise=files is None)
    if report.plan is None:
        report.plan = gm.plan
    if args.record:
        _record(args.artifact, report)
    what = args.artifact or f"{config.pattern}, tome_r = {config.tome_r}"
    show(args, f"{args.model}, {what}\n\n{report}\n\n{gm.plan}", report.to_json(indent=1))
    return 0


def _calibration(config: Config, files: Images | None, noise: torch.Tensor) -> Any:
    """What a new transform is calibrated on where its score needs data: audited images, or noise if there are none."""
    if not config.needs_data:
        return None
    return [noise] if files is None else Moved(files, noise, CALIBRATED)


def _remark(report: Report, random: bool, noise: bool) -> None:
    """Say what the figures are worth."""
    if random or noise:
        source = "random weights: accuracy and agreement mean nothing" if random else "images are random noise"
        report.notes.insert(0, f"{source}; speed, MACs and bytes don't depend on it")
    for row in report.rows if random else ():
        row.agree = row.correct = row.interval = row.lost = row.won = None


def _record(path: Path, report: Report) -> None:
    """The figures go into the artifact's plan; weights stay as they are."""
    saved: IRModule = mpcompile.load(path)
    figures = report.to_dict()
    saved.plan.figures |= {key: figures[key] for key in ("rows", "environment", "notes", "fell_back")}
    mpcompile.save(saved, path)
