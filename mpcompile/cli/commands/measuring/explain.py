"""``mpcompile explain``: time every engine on every masked layer of a model."""

from __future__ import annotations

import argparse

import mpcompile
from mpcompile.cli.models import prepare
from mpcompile.cli.options import Commands, command, model_options, show


def add(commands: Commands) -> None:
    """Declare the command."""
    job = command(
        commands,
        "explain",
        help="time every engine on every masked layer of a model, and show which one is chosen",
        description="Transform a model, time every engine on its masked layers, and show which one each gets.",
        example="mpcompile explain vit_small_patch16_224 --pattern auto --tome-r 8 --batch 8 --dtype bf16",
    )
    model_options(job)
    job.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Return 0 once the layers are timed, whichever engines are chosen."""
    loaded, inputs, config = prepare(args)
    explanation = mpcompile.explain(loaded.model, inputs, config, progress=False if args.quiet else None)
    head = f"{args.model}, {args.dtype}, batch {args.batch}, tome_r = {config.tome_r}"
    show(args, f"{head}\n\n{explanation}", explanation.to_json(indent=1))
    return 0
