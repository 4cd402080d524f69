"""The command line: ``demo``; ``audit``, ``explain`` and ``visualize`` for a timm model; ``verify`` for files too."""

from __future__ import annotations

import argparse
import fnmatch
import logging
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

import mpcompile
from mpcompile import verify as verifier
from mpcompile.backend import mpsparse
from mpcompile.config import ENGINES, SCHEDULES, SCORES, Config
from mpcompile.errors import ArtifactError, ConfigError, InputError, MPCompileError

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def write_atomically(path: Path, text: str) -> None:
    """Write a text file through a temporary one beside it, so that nothing half-written is left.

    Raises:
        ArtifactError: the folder is missing or not writable, or the disk is full; an older file is untouched.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_text(text)
        temporary.replace(path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise ArtifactError(
            f"can't write {path}", expected="a writable folder with room", found=error.strerror or str(error)
        ) from error


def read_checkpoint(path: Path) -> dict[str, Any]:
    """The state dict in a safetensors file, or in a torch file that holds tensors only (weights_only).

    Raises:
        ArtifactError: the file is missing, truncated or not a checkpoint.
    """
    if not path.is_file():
        raise ArtifactError(f"there is no checkpoint {path}", expected="a .safetensors, .pt or .pth file", found="none")
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            state: Any = load_file(path)
        else:
            state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise ArtifactError(
            f"{path} can't be read as a checkpoint",
            expected="a whole safetensors file, or a torch file of tensors alone",
            found=str(error).splitlines()[0] if str(error) else type(error).__name__,
            hint="fetch the file again, or save the state dict with safetensors",
        ) from error
    for key in ("state_dict_ema", "state_dict", "model"):
        if isinstance(state, dict) and isinstance(state.get(key), dict):
            state = state[key]
    if not isinstance(state, dict):
        raise ArtifactError(f"{path} holds no state dict", expected="tensors by name", found=type(state).__name__)
    return {name: value for name, value in state.items() if isinstance(value, torch.Tensor)}


def load_checkpoint(model: nn.Module, path: Path) -> None:
    """Load a checkpoint file into a model.

    Raises:
        ArtifactError: as :func:`read_checkpoint`, or its tensors aren't the model's.
    """
    state = read_checkpoint(path)
    try:
        model.load_state_dict(state)
    except (RuntimeError, TypeError, AttributeError) as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        raise ArtifactError(
            f"{path} doesn't fit the model", expected="its own tensors", found=" ".join(lines[1:3]) or str(error)
        ) from error


def _at_least(least: int) -> Callable[[str], int]:
    """An argument type: whole numbers from ``least`` on."""

    def number(text: str) -> int:
        value = int(text)
        if value < least:
            raise argparse.ArgumentTypeError(f"must be {least} or more")
        return value

    return number


def _tome_r(text: str) -> int | str | tuple[int, ...]:
    """``8``, ``16,12,8`` (one number a block) or ``auto``."""
    if text == "auto":
        return text
    numbers = [int(part) for part in text.split(",")]
    if min(numbers) < 0:
        raise argparse.ArgumentTypeError("must be 0 or more")
    return numbers[0] if len(numbers) == 1 else tuple(numbers)


def _weights_options(job: argparse.ArgumentParser) -> None:
    """A timm model and where its weights come from."""
    job.add_argument("model", help="name of a timm model, such as vit_base_patch16_224")
    weights = job.add_mutually_exclusive_group()
    weights.add_argument("--pretrained", action="store_true", help="timm's pretrained weights (fetched by timm)")
    weights.add_argument("--checkpoint", type=Path, metavar="FILE", help="safetensors file or state dict")


def _merging_options(job: argparse.ArgumentParser, default: int) -> None:
    """How tokens merge."""
    job.add_argument(
        "--tome-r",
        type=_tome_r,
        default=default,
        metavar="R",
        help=f"tokens merged a block: a number, one for each block (16,12,8), or auto (default {default})",
    )
    job.add_argument(
        "--tome-schedule", choices=SCHEDULES, default="constant", help="alike in all blocks, or falling to 0"
    )
    job.add_argument(
        "--tome-reduction", type=float, metavar="SHARE", help="with --tome-r auto: MACs to save by merging, 0 to 1"
    )
    job.add_argument(
        "--no-proportional", action="store_true", help="count a merged token once in attention, not by its size"
    )


def _merging(args: argparse.Namespace) -> dict[str, Any]:
    """The options of :func:`_merging_options`, as the Config names them."""
    return {
        "tome_r": args.tome_r,
        "tome_schedule": args.tome_schedule,
        "tome_reduction": args.tome_reduction,
        "tome_proportional": not args.no_proportional,
    }


def _model_options(job: argparse.ArgumentParser) -> None:
    """What every job that measures a timm model takes."""
    _weights_options(job)
    job.add_argument("--batch", type=_at_least(1), default=8, help="images a call (default 8)")
    job.add_argument("--dtype", choices=DTYPES, default="fp32", help="of weights and images (default fp32)")
    job.add_argument("--pattern", default="2:4", help="N:M, auto or dense (default 2:4)")
    _merging_options(job, default=0)
    job.add_argument("--engine", choices=ENGINES, default="auto", help="what runs masked layers (default auto)")
    frozen = "weights won't change any more: fold and prepack, and beat dense builds that do the same"
    job.add_argument("--frozen", action="store_true", help=frozen)
    job.add_argument("--exclude", nargs="*", metavar="NAME", help="roles, names or globs that stay dense")
    job.add_argument("--threads", type=_at_least(1), help="threads of PyTorch")
    job.add_argument("--device", default="cpu", help="cpu or cuda (default cpu)")
    job.add_argument("--seed", type=_at_least(0), default=0, help="seeds weights and images (default 0)")
    job.add_argument("--json", type=Path, metavar="FILE", help="write the result here as JSON")


def parser() -> argparse.ArgumentParser:
    """The argument parser, one sub-command a job."""
    top = argparse.ArgumentParser(prog="mpcompile", description=mpcompile.__doc__)
    top.add_argument("--version", action="version", version=f"mpcompile {mpcompile.__version__}")
    jobs = top.add_subparsers(dest="job", required=True, metavar="{demo,audit,explain,visualize,verify}")
    formatter = argparse.RawDescriptionHelpFormatter

    demo = jobs.add_parser(
        "demo",
        help="train, prune, merge, distil and compile a small vision transformer on real digits",
        description="Train a small vision transformer on scanned digits, then transform, distil, compile and audit it.",
        epilog="example:\n  mpcompile demo --quick --out digits",
        formatter_class=formatter,
    )
    demo.add_argument("--quick", action="store_true", help="a smaller model and fewer epochs, for a first look")
    demo.add_argument("--seed", type=_at_least(0), default=0, help="seeds split, weights and batches (default 0)")
    demo.add_argument("--out", type=Path, default=Path("mpcompile-demo"), help="folder for the results as files")
    demo.add_argument("--threads", type=_at_least(1), help="threads of PyTorch (default: its own choice)")

    audit = jobs.add_parser(
        "audit",
        help="measure a timm model, dense against pruned and merged",
        description="Transform and compile a timm model and measure it against its dense builds.",
        epilog="example:\n  mpcompile audit vit_small_patch16_224 --pattern 2:4 --tome-r 8 --batch 8 --json audit.json",
        formatter_class=formatter,
    )
    _model_options(audit)
    audit.add_argument("--score", choices=SCORES, default="magnitude", help="mask score (default magnitude)")
    audit.add_argument("--rounds", type=_at_least(1), default=20, help="timings of each build (default 20)")

    explain = jobs.add_parser(
        "explain",
        help="time every engine on every masked layer of a timm model, and say which one is picked",
        description="Transform a timm model, time every engine on its masked layers, and say which one is picked.",
        epilog="example:\n  mpcompile explain vit_small_patch16_224 --pattern auto --tome-r 8 --batch 8 --dtype bf16",
        formatter_class=formatter,
    )
    _model_options(explain)

    visualize = jobs.add_parser(
        "visualize",
        help="draw which patches of an image a timm model merges into one token",
        description="Merge tokens in a timm model and draw an image with its merged tokens outlined, block by block.",
        epilog="example:\n  mpcompile visualize vit_small_patch16_224 --pretrained --image cat.jpg --out merged.png",
        formatter_class=formatter,
    )
    _weights_options(visualize)
    _merging_options(visualize, default=8)
    visualize.add_argument("--image", type=Path, required=True, metavar="FILE", help="any format that Pillow reads")
    visualize.add_argument("--out", type=Path, default=Path("merged.png"), metavar="FILE", help="(default merged.png)")
    visualize.add_argument("--seed", type=_at_least(0), default=0, help="seeds weights that aren't loaded (default 0)")

    verify = jobs.add_parser(
        "verify",
        help="check which weights of a file or a timm model are legally N:M",
        description="Check stored weights, of a file or a timm model: which are legally N:M, which break it where.",
        epilog="example:\n  mpcompile verify pruned.mpc\n  mpcompile verify checkpoint.safetensors --pattern 2:4",
        formatter_class=formatter,
    )
    verify.add_argument("target", help="a .mpc, .safetensors, .pt or .pth file, or the name of a timm model")
    verify.add_argument("--pattern", help="N:M that all weights are held to (default: masked layers to their own)")
    verify.add_argument("--only", nargs="*", default=["*"], metavar="GLOB", help="names of weights (default all)")
    verify.add_argument("--pretrained", action="store_true", help="timm's pretrained weights (fetched by timm)")
    verify.add_argument("--json", type=Path, metavar="FILE", help="write the result here as JSON")
    for job in (demo, audit, explain, visualize, verify):
        job.add_argument("--quiet", action="store_true", help="no progress bars")
    return top


def _create(name: str, pretrained: bool) -> nn.Module:
    import timm

    if not timm.is_model(name):
        near = timm.list_models(f"*{name.split('_', maxsplit=1)[0]}*")[:5]
        raise ConfigError(f"timm has no model {name!r}", expected=", ".join(near) or "a name from timm.list_models()")
    try:
        return timm.create_model(name, pretrained=pretrained)
    except Exception as error:
        raise InputError(
            f"timm can't make {name!r}: {str(error).splitlines()[0]}",
            hint="check the connection, or give --checkpoint FILE" if pretrained else None,
        ) from error


def _prepare(args: argparse.Namespace) -> tuple[nn.Module, torch.Tensor, Config]:
    """Model, random images and config, as :func:`_model_options` were given."""
    options: dict[str, Any] = {"exclude": tuple(args.exclude)} if args.exclude is not None else {}
    score = getattr(args, "score", "magnitude")
    for name in ("pattern", "engine", "frozen"):
        options[name] = getattr(args, name)
    config = Config(score=score, **_merging(args), **options)
    if args.threads:
        torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    model = _create(args.model, args.pretrained).eval()
    if args.checkpoint is not None:
        load_checkpoint(model, args.checkpoint)
    size = getattr(model, "pretrained_cfg", {}).get("input_size", (3, 224, 224))
    try:
        device = torch.device(args.device)
        images = torch.randn(args.batch, *size, dtype=DTYPES[args.dtype], device=device)
        model = model.to(device, DTYPES[args.dtype])
    except (RuntimeError, AssertionError) as error:
        raise ConfigError(f"device {args.device!r} can't be used: {str(error).splitlines()[0]}") from error
    return model, images, config


def run_explain(args: argparse.Namespace) -> int:
    """``mpcompile explain``."""
    model, images, config = _prepare(args)
    explanation = mpcompile.explain(model, images, config, progress=False if args.quiet else None)
    if args.json is not None:
        write_atomically(args.json, explanation.to_json(indent=1))
    print(f"{args.model}, {args.dtype}, batch {args.batch}, tome_r = {config.tome_r}\n\n{explanation}")
    return 0


def run_audit(args: argparse.Namespace) -> int:
    """``mpcompile audit``: exit status 0 when the measurement went through, whatever it found."""
    model, images, config = _prepare(args)
    calibration = [images] if config.score == "covariance" else None
    gm = mpcompile.transform(model, images, config, calibration, seed=args.seed)
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


def _open_image(path: Path) -> Any:
    from PIL import Image

    try:
        return Image.open(path).convert("RGB")
    except OSError as error:
        raise InputError(
            f"can't read {path}", expected="an image file", found=error.strerror or str(error).split(" '")[0]
        ) from error


def run_visualize(args: argparse.Namespace) -> int:
    """``mpcompile visualize``."""
    import numpy as np
    from timm.data import create_transform, resolve_model_data_config

    picture = _open_image(args.image)
    torch.manual_seed(args.seed)
    model = _create(args.model, args.pretrained).eval()
    if args.checkpoint is not None:
        load_checkpoint(model, args.checkpoint)
    data = resolve_model_data_config(model)
    image = create_transform(**data, is_training=False)(picture)
    mean, std = (torch.tensor(data[key]).view(-1, 1, 1) for key in ("mean", "std"))
    shown = (255 * (image * std + mean)).clamp(0, 255).round().permute(1, 2, 0).numpy().astype(np.uint8)
    config = Config(pattern="dense", **_merging(args))
    tokens = mpcompile.visualize_merging(model, image, args.out, config, display=shown)
    counts = " -> ".join(str(len(np.unique(block))) for block in [np.arange(tokens[0].size), *tokens])
    print(f"{args.model}: {counts} patches and merged patches\n{args.out}")
    if not args.pretrained and args.checkpoint is None:
        print("note: random weights, so what merges means nothing")
    return 0


def run_verify(args: argparse.Namespace) -> int:
    """``mpcompile verify``: exit status 0 when every weight meets the pattern that it is held to, else 1."""
    path = Path(args.target)
    source: Any
    if path.suffix or path.exists():
        source = verifier.read(path)
    else:
        source = _create(args.target, args.pretrained)
    found = verifier.verify(source, args.pattern)
    chosen = {k: v for k, v in found.verdicts.items() if any(fnmatch.fnmatch(k, glob) for glob in args.only)}
    if not chosen:
        raise ConfigError("--only names no weight", expected=", ".join(list(found.verdicts)[:8]), found=args.only)
    found = verifier.Verification(chosen)
    if args.json is not None:
        write_atomically(args.json, found.to_json(indent=1))
    print(found)
    return 0 if found.ok else 1


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of the console script. Exit status 0: done; 1: ``verify`` found a
    violation; 2: something the user can mend; 130: interrupted."""
    args = parser().parse_args(argv)
    logging.basicConfig(level=logging.ERROR if args.quiet else logging.WARNING, format="%(message)s")
    try:
        if args.job == "audit":
            return run_audit(args)
        if args.job == "explain":
            return run_explain(args)
        if args.job == "visualize":
            return run_visualize(args)
        if args.job == "verify":
            return run_verify(args)
        from mpcompile.demo import Demo, run

        report = run(Demo(args.quick, args.seed, args.out, args.threads, not args.quiet))
        print(report)
        return 0
    except MPCompileError as error:
        print(f"mpcompile: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("mpcompile: interrupted", file=sys.stderr)
        return 130
