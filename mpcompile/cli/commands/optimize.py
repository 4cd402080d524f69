"""``mpcompile optimize``: the fastest build of a model that keeps the accuracy you name."""

from __future__ import annotations

import argparse
import logging
from pathlib import Path
from typing import Any

import torch

from mpcompile.cli.destinations import FILE, FOLDER, check_ending, declare
from mpcompile.cli.models import load_source, provenance
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
from mpcompile.data import ranks
from mpcompile.data.images import Images, images_at
from mpcompile.errors import ConfigError
from mpcompile.export.examples import describe_inputs
from mpcompile.optimization.goal import LEVERS, TORCH
from mpcompile.optimization.numbers.space import OBJECTIVES
from mpcompile.optimization.runner import runner_file
from mpcompile.runtimes.catalogue import RUNTIMES

_LEFT = ("exclude", "include", "score", "prefix_tokens", "outputs", "tome_method", "tome_proportional")


def add(commands: Commands) -> None:
    """Declare the command."""
    job = command(
        commands,
        "optimize",
        help="find the fastest build of a model that loses at most as much accuracy as you allow",
        description="Search patterns, tokens, precision and runtime for the fastest build on this machine whose top-1 "
        "drops by at most --max-drop on images that no fit saw, and save it with its runner. Builds are timed against "
        "the best dense build of every runtime that is installed; if none beats it, that one is the result.",
        example="mpcompile optimize vit_small_patch16_224 --pretrained --images val --max-drop 1% --out fast.mpc\n"
        "mpcompile optimize resnet50 --pretrained --images val --max-drop 0.5% --speedup 1.5 --out fast.mpc "
        "--report report.html",
    )
    weights_options(job)
    text = "images, one folder per class, or an .npz file: a few hundred or more; without labels, top-1 classes that "
    text += "change count as lost"
    job.add_argument("--images", type=as_path, required=True, metavar="FOLDER", help=text)
    text = "images that judge builds (default: three quarters of --images, which no fit then sees)"
    job.add_argument("--validation", type=as_path, metavar="FOLDER", help=text)
    job.add_argument(
        "--samples", type=at_least(1), metavar="N", help="images drawn from each by the seed (default all)"
    )
    text = "largest drop of top-1: 1%%, or .01 (default 1%%)"
    job.add_argument("--max-drop", type=share, default=0.01, metavar="SHARE", help=text)
    text = "confidence with which the drop is at most --max-drop, 0.5 to 1 (default 0.8)"
    job.add_argument("--confidence", type=share, default=0.8, metavar="SHARE", help=text)
    target = job.add_mutually_exclusive_group()
    text = "stop at this time per batch, such as 40ms: the build that damages least among those that reach it"
    target.add_argument("--latency", type=milliseconds, metavar="MS", help=text)
    text = "stop at this multiple of the best dense build's speed"
    target.add_argument("--speedup", type=float, metavar="N", help=text)
    text = "minimise the time on another machine: what explain --pattern N:M --json wrote there, one file per pattern"
    job.add_argument("--timings", type=as_path, nargs="+", metavar="FILE", help=text)
    job.add_argument("--objective", choices=OBJECTIVES, default="latency", help="what is minimised (default latency)")
    job.add_argument(
        "--batch", type=at_least(1), default=1, help="images per call that builds are made for (default 1)"
    )
    job.add_argument("--minutes", type=float, default=20.0, help="time budget of the search (default 20)")
    job.add_argument("--allow", nargs="+", choices=LEVERS, default=list(LEVERS), help="levers (default all)")
    text = "where builds may run (default: torch, and the others that are installed)"
    job.add_argument("--runtimes", nargs="+", choices=(TORCH, *RUNTIMES), help=text)
    text = "keep measurements in FOLDER: the same command resumes an interrupted search"
    job.add_argument("--folder", type=as_path_text, metavar="FOLDER", help=text)
    text = "artifact to write, such as fast.mpc, with fast.runner.json, and fast.onnx for another runtime, beside it"
    job.add_argument("--out", type=as_path_text, required=True, metavar="FILE", help=text)
    text = "also write a page with the frontier"
    job.add_argument("--report", type=as_path_text, metavar="FILE", help=text)
    declare(job, out=FILE, report=FILE, folder=FOLDER)
    threads_option(job)
    seed_option(job)
    json_option(job)
    config_options(job, *_LEFT)
    job.set_defaults(run=run)


def share(text: str) -> float:
    """Argument type of a share: ``1%`` or ``.01``."""
    return float(text[:-1]) / 100 if text.endswith("%") else float(text)


def milliseconds(text: str) -> float:
    """Argument type of a time: ``40ms``, ``0.04s`` or ``40``."""
    if text.endswith("ms"):
        return float(text[:-2])
    return 1e3 * float(text[:-1]) if text.endswith("s") else float(text)


def run(args: argparse.Namespace) -> int:
    """Return 0 once the artifact is written, whatever was found."""
    import mpcompile

    if args.report is not None:
        check_ending(args.report, ".html", ".htm")
    if args.threads:
        torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    config = config_of(args)
    if not args.quiet:  # the steps of a search that takes minutes
        logging.getLogger("mpcompile.optimization").setLevel(logging.INFO)
    ranks.start("cpu")
    loaded = load_source(args)
    if loaded.random:
        raise ConfigError(
            "the weights are random: there is no accuracy to keep", expected="--pretrained or --checkpoint FILE"
        )

    if loaded.fixed_batch is not None:
        raise ConfigError(
            "the model takes batches of one size alone, and images do not come in such",
            expected="a model whose batch size is free",
            found=f"batches of {loaded.fixed_batch}",
            hint="export it with a dynamic batch axis",
        )

    def images(path: Path) -> Images:
        how: dict[str, Any] = {"samples": args.samples, "batch": 32, "seed": args.seed}
        names = list(loaded.class_names)
        return images_at(path, loaded.data, classes=loaded.num_classes, names=names, **how)

    data = {name: images(getattr(args, name)) for name in ("images", "validation") if getattr(args, name) is not None}
    result = mpcompile.optimize(
        loaded.model,
        loaded.batches(data["images"]),
        max_drop=args.max_drop,
        confidence=args.confidence,
        objective=args.objective,
        batch=args.batch,
        minutes=args.minutes,
        validation=loaded.batches(data["validation"]) if "validation" in data else None,
        allow=args.allow,
        runtimes=args.runtimes,
        latency=args.latency,
        speedup=args.speedup,
        timings=args.timings,
        config=config,
        out=args.out,
        folder=args.folder,
        seed=args.seed,
        progress=not args.quiet,
    )
    for part in data.values():
        result.frontier.notes += [note for note in part.notes if note]
    if not ranks.rank():
        module = result.module
        used = sum(part.count for part in data.values())
        module.plan.provenance |= {**provenance(loaded, used, args.seed), "inputs": describe_inputs(module)}
        module.plan.provenance["calibration_files"] = [d for part in data.values() for d in digests(part)]
        result.save(args.out)
        if args.report is not None:
            _write_page(Path(args.report), Path(args.out), result.frontier.to_dict())
        files = f"{args.out}, {runner_file(args.out)}: mpcompile.load_runner({str(args.out)!r}) runs it"
        show(args, f"{result}\n\n{files}", result.frontier.to_json(indent=1))
    ranks.stop()
    return 0


def _write_page(path: Path, artifact: Path, frontier: dict[str, Any]) -> None:
    from mpcompile import page
    from mpcompile.page.sources import Sources

    sources = Sources(optimize=frontier)
    page.add_artifact(sources, artifact)
    page.write(path, sources)
