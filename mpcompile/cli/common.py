"""What several commands share: declaring one, options of models and of merging, and a timm model made from them."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import nn

from mpcompile.config import ENGINES, SCHEDULES, Config
from mpcompile.errors import ConfigError, InputError
from mpcompile.files import load_checkpoint

Commands: TypeAlias = "argparse._SubParsersAction[argparse.ArgumentParser]"  # what add(commands) is given

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def command(commands: Commands, name: str, *, help: str, description: str, example: str) -> argparse.ArgumentParser:
    """Declare a command with the options that every command has.

    Args:
        commands: what ``add`` was given.
        name: as typed.
        help: its line in ``mpcompile --help``: lower case, no full stop.
        description: the head of its own help: sentences.
        example: one or more command lines, shown at the end of its help.
    """
    lines = "".join(f"\n  {line}" for line in example.splitlines())
    job = commands.add_parser(
        name,
        help=help,
        description=description,
        epilog=f"example:{lines}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    job.add_argument("--quiet", action="store_true", help="no progress bars")
    return job


def json_option(job: argparse.ArgumentParser) -> None:
    """``--json FILE``."""
    job.add_argument("--json", type=Path, metavar="FILE", help="write the result here as JSON")


def at_least(least: int) -> Callable[[str], int]:
    """An argument type: whole numbers from ``least`` on."""

    def number(text: str) -> int:
        value = int(text)
        if value < least:
            raise argparse.ArgumentTypeError(f"must be {least} or more")
        return value

    return number


def tome_r(text: str) -> int | str | tuple[int, ...]:
    """``8``, ``16,12,8`` (one number a block) or ``auto``."""
    if text == "auto":
        return text
    numbers = [int(part) for part in text.split(",")]
    if min(numbers) < 0:
        raise argparse.ArgumentTypeError("must be 0 or more")
    return numbers[0] if len(numbers) == 1 else tuple(numbers)


def weights_options(job: argparse.ArgumentParser) -> None:
    """A timm model and where its weights come from."""
    job.add_argument("model", help="name of a timm model, such as vit_base_patch16_224")
    weights = job.add_mutually_exclusive_group()
    weights.add_argument("--pretrained", action="store_true", help="timm's pretrained weights (fetched by timm)")
    weights.add_argument("--checkpoint", type=Path, metavar="FILE", help="safetensors file or state dict")


def merging_options(job: argparse.ArgumentParser, default: int) -> None:
    """How tokens merge."""
    job.add_argument(
        "--tome-r",
        type=tome_r,
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


def merging(args: argparse.Namespace) -> dict[str, Any]:
    """The options of :func:`merging_options`, as the Config names them."""
    return {
        "tome_r": args.tome_r,
        "tome_schedule": args.tome_schedule,
        "tome_reduction": args.tome_reduction,
        "tome_proportional": not args.no_proportional,
    }


def model_options(job: argparse.ArgumentParser) -> None:
    """What every job that measures a timm model takes."""
    weights_options(job)
    job.add_argument("--batch", type=at_least(1), default=8, help="images a call (default 8)")
    job.add_argument("--dtype", choices=DTYPES, default="fp32", help="of weights and images (default fp32)")
    job.add_argument("--pattern", default="2:4", help="N:M, auto or dense (default 2:4)")
    merging_options(job, default=0)
    job.add_argument("--engine", choices=ENGINES, default="auto", help="what runs masked layers (default auto)")
    frozen = "weights won't change any more: fold and prepack, and beat dense builds that do the same"
    job.add_argument("--frozen", action="store_true", help=frozen)
    job.add_argument("--exclude", nargs="*", metavar="NAME", help="roles, names or globs that stay dense")
    job.add_argument("--threads", type=at_least(1), help="threads of PyTorch")
    job.add_argument("--device", default="cpu", help="cpu or cuda (default cpu)")
    job.add_argument("--seed", type=at_least(0), default=0, help="seeds weights and images (default 0)")
    json_option(job)


def create(name: str, pretrained: bool, **options: Any) -> nn.Module:
    import timm

    if not timm.is_model(name):
        near = timm.list_models(f"*{name.split('_', maxsplit=1)[0]}*")[:5]
        raise ConfigError(f"timm has no model {name!r}", expected=", ".join(near) or "a name from timm.list_models()")
    try:
        return timm.create_model(name, pretrained=pretrained, **options)
    except Exception as error:
        raise InputError(
            f"timm can't make {name!r}: {str(error).splitlines()[0]}",
            hint="check the connection, or give --checkpoint FILE" if pretrained else None,
        ) from error


def prepare(args: argparse.Namespace) -> tuple[nn.Module, torch.Tensor, Config]:
    """Model, random images and config, as :func:`model_options` were given."""
    options: dict[str, Any] = {"exclude": tuple(args.exclude)} if args.exclude is not None else {}
    score = getattr(args, "score", "magnitude")
    for name in ("pattern", "engine", "frozen", "seed"):
        options[name] = getattr(args, name)
    config = Config(score=score, **merging(args), **options)
    if args.threads:
        torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    model = create(args.model, args.pretrained).eval()
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
