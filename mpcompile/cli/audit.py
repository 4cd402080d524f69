"""``mpcompile audit``: a timm model, transformed and compiled, measured against its dense builds."""

from __future__ import annotations

import argparse

import torch

import mpcompile
from mpcompile.backend import mpsparse
from mpcompile.cli.common import Commands, at_least, command, model_options, prepare
from mpcompile.config import SCORES
from mpcompile.files import write_atomically


def add(commands: Commands) -> None:
    """Declare it."""
    job = command(
        commands,
        "audit",
        help="measure a timm model, dense against pruned and merged",
        description="Transform and compile a timm model and measure it against its dense builds.",
        example="mpcompile audit vit_small_patch16_224 --pattern 2:4 --tome-r 8 --batch 8 --json audit.json",
    )
    model_options(job)
    job.add_argument("--score", choices=SCORES, default="magnitude", help="mask score (default magnitude)")
    job.add_argument("--rounds", type=at_least(1), default=20, help="timings of each build (default 20)")
    job.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Exit status 0 when the measurement went through, whatever it found."""
    model, images, config = prepare(args)
    calibration = [images] if config.score == "covariance" else None
    gm = mpcompile.transform(model, images, config, calibration)
    compiled = torch.compile(gm, backend=mpsparse, options={"engine": args.engine, "frozen": args.frozen})
    report = mpcompile.audit(model, compiled, images, rounds=args.rounds, progress=not args.quiet)
    random = not args.pretrained and args.checkpoint is None
    source = "random weights: accuracy and agreement mean nothing" if random else "images are random noise"
    report.notes.insert(0, f"{source}; speed, MACs and bytes don't depend on it")
    if random:
        for row in report.rows:
            row.agree = None
    if args.json is not None:
        write_atomically(args.json, report.to_json(indent=1))
    print(f"{args.model}, {config.pattern}, tome_r = {config.tome_r}\n\n{report}\n\n{gm.plan}")
    return 0
