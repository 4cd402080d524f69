"""The command line: ``mpcompile demo``, ``audit MODEL``, ``explain MODEL`` and ``verify FILE|MODEL``."""

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
from mpcompile.config import ENGINES, SCORES, Config
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


def _model_options(job: argparse.ArgumentParser) -> None:
    """What every job on a timm model takes."""
    job.add_argument("model", help="name of a timm model, such as vit_base_patch16_224")
    weights = job.add_mutually_exclusive_group()
    weights.add_argument("--pretrained", action="store_true", help="timm's pretrained weights (fetched by timm)")
    weights.add_argument("--checkpoint", type=Path, metavar="FILE", help="safetensors file or state dict")
    job.add_argument("--batch", type=_at_least(1), default=8, help="images a call (default 8)")
    job.add_argument("--dtype", choices=DTYPES, default="fp32", help="of weights and images (default fp32)")
    job.add_argument("--pattern", default="2:4", help="N:M, auto or dense (default 2:4)")
    job.add_argument("--tome-r", type=_at_least(0), default=0, help="tokens merged a block (default 0)")
    job.add_argument("--engine", choices=ENGINES, default="auto", help="what runs masked layers (default auto)")
    job.add_argument("--exclude", nargs="*", metavar="NAME", help="roles, names or globs that stay dense")
    job.add_argument("--threads", type=_at_least(1), help="threads of PyTorch")
    job.add_argument("--device", default="cpu", help="cpu or cuda (default cpu)")
    job.add_argument("--seed", type=_at_least(0), default=0, help="seeds weights and images (default 0)")
    job.add_argument("--json", type=Path, metavar="FILE", help="write the result here as JSON")


def parser() -> argparse.ArgumentParser:
    """The argument parser, one sub-command a job."""
    top = argparse.ArgumentParser(prog="mpcompile", description=mpcompile.__doc__)
    top.add_argument("--version", action="version", version=f"mpcompile {mpcompile.__version__}")
    jobs = top.add_subparsers(dest="job", required=True, metavar="{demo,audit,explain,verify}")
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
    for job in (demo, audit, explain, verify):
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
    config = Config(
        pattern=args.pattern, tome_r=args.tome_r, score=score, engine=args.engine, seed=args.seed, **options
    )
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
    gm = mpcompile.transform(model, images, config, calibration)
    compiled = torch.compile(gm, backend=mpsparse, options={"engine": args.engine})
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
