"""Options that several commands share: declaring a command, its results as text and JSON, and the Config.

Models and checkpoints are made from these options in :mod:`mpcompile.cli.models`.
"""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeAlias

import torch

from mpcompile.cli.destinations import FILE, declare
from mpcompile.config import ENGINES, METHODS, SCHEDULES, SCORES, Config
from mpcompile.errors import ConfigError, printable_lines
from mpcompile.io.reading import read_text
from mpcompile.io.writing import write_atomically
from mpcompile.io.yaml_options import LARGEST, parse

Commands: TypeAlias = "argparse._SubParsersAction[argparse.ArgumentParser]"  # the argument of add(commands)

EXITS = "0 done, 1 a check made by the command failed, 2 an error that you can fix, 130 interrupted"
MODEL = (
    "a timm name, such as vit_base_patch16_224; a folder written by save_pretrained or in timm's hub layout (with a / "
    "in its name, or a config.json in it); hf-hub:ORG/NAME; package.module:function or file.py:function, which runs "
    "that code; or a .pt2 file of torch.export.save, which torch unpickles"
)
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


# --- Declaring a command, and showing its result ---


def command(commands: Commands, name: str, *, help: str, description: str, example: str) -> argparse.ArgumentParser:
    """Declare a command with the options that every command has.

    Args:
        commands: the argument of ``add``.
        name: the command's name, as typed.
        help: its line in ``mpcompile --help``: lower case, no full stop.
        description: the head of its own help, in full sentences.
        example: one or more command lines, shown at the end of its own help.
    """
    lines = "".join(f"\n  {line}" for line in example.splitlines())
    job = commands.add_parser(
        name,
        help=help,
        description=description,
        epilog=f"example:{lines}\n\nexit status: {EXITS}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    verbosity = job.add_mutually_exclusive_group()
    verbosity.add_argument("--quiet", action="store_true", help="show no progress bars and no warnings")
    verbosity.add_argument("--verbose", action="store_true", help="log each step, and show tracebacks of errors")
    return job


def json_option(job: argparse.ArgumentParser) -> None:
    """Declare ``--json FILE``. A command that has it prints its result with :func:`show`."""
    text = "write the result to this file as JSON; - prints the JSON instead of the text"
    job.add_argument("--json", type=as_path_text, metavar="FILE", help=text)
    declare(job, json=FILE)


def show(args: argparse.Namespace, text: object, data: str) -> None:
    """Print a result, and write it as JSON if ``--json`` asks for it.

    Args:
        args: the parsed arguments.
        text: the result for people to read.
        data: the same result as JSON.

    Raises:
        ArtifactError: the file cannot be written.
    """
    if args.json is not None and str(args.json) == "-":
        print(data)
        return
    if args.json is not None:
        write_atomically(args.json, data + "\n")
    print(printable_lines(text))


# --- Types of arguments ---


def as_path_text(text: str) -> str:
    """Argument type of a path that stays a string, so that a trailing slash survives. An empty one is refused."""
    if not text:
        raise argparse.ArgumentTypeError("the path is empty")
    return text


def as_path(text: str) -> Path:
    """Argument type of a path. An empty one is refused: ``Path("")`` would be the current folder."""
    return Path(as_path_text(text))


def at_least(least: int) -> Callable[[str], int]:
    """Return the argument type of integers >= ``least``."""

    def number(text: str) -> int:
        value = int(text)
        if value < least:
            raise argparse.ArgumentTypeError(f"must be {least} or more")
        return value

    return number


def tome_r(text: str) -> int | str | tuple[int, ...]:
    """Argument type of ``--tome-r``: ``8``, ``16,12,8`` (one number per block) or ``auto``."""
    if text == "auto":
        return text
    numbers = [int(part) for part in text.split(",")]
    if min(numbers) < 0:
        raise argparse.ArgumentTypeError("must be 0 or more")
    return numbers[0] if len(numbers) == 1 else tuple(numbers)


# --- Options of models ---


def weights_options(job: argparse.ArgumentParser, optional: bool = False) -> None:
    """Declare a model and the source of its weights; with ``optional``, the model may be left out."""
    text = f"the dense model: {MODEL}"
    job.add_argument("model", type=as_path_text, nargs="?" if optional else None, metavar="MODEL", help=text)
    source_options(job)
    classes_option(job)
    size = "size of one image (default: what MODEL says)"
    job.add_argument("--input-size", type=at_least(1), nargs=3, metavar=("C", "H", "W"), help=size)


def source_options(job: argparse.ArgumentParser) -> None:
    """Declare ``--pretrained`` and ``--checkpoint FILE``, of which one may be given, and ``--model-args``."""
    weights = job.add_mutually_exclusive_group()
    weights.add_argument("--pretrained", action="store_true", help="timm's pretrained weights (timm downloads them)")
    text = "weights of the model: a safetensors file or a PyTorch state dict"
    weights.add_argument("--checkpoint", type=as_path, metavar="FILE", help=text)
    text = "arguments of MODEL's function, or options of timm.create_model, such as depth=2"
    job.add_argument("--model-args", action="extend", nargs="+", default=[], metavar="NAME=VALUE", help=text)


def model_arguments(args: argparse.Namespace) -> dict[str, Any]:
    """Return the values of ``--model-args`` by name, read as YAML.

    Raises:
        ConfigError: one is not NAME=VALUE, or is given twice.
    """
    values: dict[str, Any] = {}
    for text in getattr(args, "model_args", ()):
        name, equals, value = text.partition("=")
        if not (equals and name.isidentifier()):
            raise ConfigError("--model-args is malformed", expected="NAME=VALUE, such as depth=2", found=text)
        if name in values:
            raise ConfigError(f"--model-args gives {name} twice", found=f"{values[name]!r} and {value!r}")
        values[name] = parse(value, f"the value of --model-args {name}")
    return values


def classes_option(job: argparse.ArgumentParser) -> None:
    """Declare ``--num-classes``."""
    text = "number of classes of a timm model (default: timm's, or the artifact's)"
    job.add_argument("--num-classes", type=at_least(1), metavar="N", help=text)


def seed_option(job: argparse.ArgumentParser) -> None:
    """Declare ``--seed``."""
    job.add_argument("--seed", type=at_least(0), default=0, help="seed of everything random (default 0)")


def threads_option(job: argparse.ArgumentParser) -> None:
    """Declare ``--threads``."""
    job.add_argument("--threads", type=at_least(1), help="CPU threads of PyTorch (default: PyTorch's choice)")


def model_options(job: argparse.ArgumentParser, optional: bool = False, **defaults: Any) -> None:
    """Declare the options of a command that measures a model.

    Args:
        job: the command.
        optional: the model may be left out.
        defaults: as for :func:`config_options`.
    """
    weights_options(job, optional)
    job.add_argument("--batch", type=at_least(1), default=8, help="images per batch (default 8)")
    job.add_argument("--dtype", choices=DTYPES, default="fp32", help="dtype of weights and images (default fp32)")
    threads_option(job)
    job.add_argument("--device", default="cpu", help="cpu or cuda (default cpu)")
    seed_option(job)
    json_option(job)
    config_options(job, **{"score": "magnitude", **defaults})


# --- The Config ---


def config_options(job: argparse.ArgumentParser, *names: str, **defaults: Any) -> None:
    """Declare ``--config FILE`` and one option per field of the Config.

    :func:`config_of` makes a Config of them. An option on the command line takes precedence over the file, the file
    over ``defaults``, and ``defaults`` over the Config's own.

    Args:
        job: the command.
        names: the fields that get an option; all fields if none is named.
        defaults: values by field that replace the Config's own defaults.
    """
    options = job.add_argument_group("options of the transformation", "fields of mpcompile.Config, as in --config")
    text = "YAML file: names and values of Config fields"
    options.add_argument("--config", type=as_path, metavar="FILE", help=text)
    job.set_defaults(config_defaults=defaults)
    for field in dataclasses.fields(Config):
        if names and field.name not in names:
            continue
        flag, settings = "--" + field.name.replace("_", "-"), dict(_FIELDS[field.name])
        default = defaults.get(field.name, field.default)
        if isinstance(default, bool) and default:
            flag = "--no-" + flag.removeprefix("--").removeprefix("tome-")
        elif default not in (None, False, ()):
            settings["help"] += f" (default {' '.join(default) if isinstance(default, tuple) else default})"
        options.add_argument(flag, dest=field.name, default=argparse.SUPPRESS, **settings)


_FIELDS: dict[str, dict[str, Any]] = {
    "pattern": {
        "metavar": "N:M",
        "help": "keep N of every M inputs; auto: a pattern that the device runs well; dense: no masks",
    },
    "mac_reduction": {
        "type": float,
        "metavar": "SHARE",
        "help": "share of the MACs that masks save, 0 - 1: every layer gets its own pattern; --pattern is ignored",
    },
    "patterns": {
        "nargs": "+",
        "metavar": "N:M",
        "help": "with --mac-reduction: allowed patterns, such as 2:4 dense (default: dense, and those that run well)",
    },
    "layer_patterns": {
        "nargs": "+",
        "metavar": "LAYER=N:M",
        "help": "patterns of single layers, by name or glob, such as blocks.0.*=dense; --pattern is for the others",
    },
    "tome_r": {
        "type": tome_r,
        "metavar": "R",
        "help": "tokens merged per block: one number, such as 8; one per block, such as 16,12,8; or auto",
    },
    "tome_method": {
        "choices": METHODS,
        "help": "merge tokens by their keys alone (tome), or spare those that the class token attends to (saliency)",
    },
    "tome_schedule": {
        "choices": SCHEDULES,
        "help": "constant: the same number in every block; linear: falls to 0; parabolic: most in the middle; "
        "auto: constant for one number, and with --tome-r auto what images show to be best",
    },
    "tome_reduction": {
        "type": float,
        "metavar": "SHARE",
        "help": "with --tome-r auto: share of the MACs that merging saves, 0 - 1",
    },
    "tome_proportional": {"action": "store_false", "help": "do not weight a merged token by its size in attention"},
    "score": {"choices": SCORES, "help": "saliency by which each group keeps its weights"},
    "permute": {
        "action": argparse.BooleanOptionalAction,
        "help": "reorder channels before masking (default: if there is calibration data)",
    },
    "restore": {"action": "store_false", "help": "do not refit the kept weights"},
    "engine": {"choices": ENGINES, "help": "kernels that run masked layers"},
    "exclude": {"nargs": "*", "metavar": "NAME", "help": "roles, names or glob patterns of layers that stay dense"},
    "include": {
        "nargs": "*",
        "metavar": "NAME",
        "help": "names or glob patterns of excluded layers to mask nevertheless",
    },
    "prefix_tokens": {"type": at_least(0), "metavar": "N", "help": "leading tokens that never merge"},
    "outputs": {
        "nargs": "+",
        "metavar": "NAME",
        "help": "names or glob patterns of the outputs that are needed; the others become None (default: all)",
    },
    "skip_dead_tokens": {"action": "store_false", "help": "compute all tokens, also those that nothing reads"},
    "frozen": {
        "action": "store_true",
        "help": "weights will not change: fold constants, prepack, and compare with dense builds that do the same",
    },
}


def config_of(args: argparse.Namespace) -> Config:
    """Return the Config that the options of :func:`config_options` describe.

    Raises:
        ConfigError: the file is missing or not a YAML mapping, an option is unknown, or a value is invalid.
    """
    names = [field.name for field in dataclasses.fields(Config)]
    typed = {name: getattr(args, name) for name in names if hasattr(args, name)}
    return Config.from_options({**args.config_defaults, **read_config(args.config), **typed})


def read_config(path: Path | None) -> dict[str, Any]:
    """Return the options in a YAML file; {} for None.

    Raises:
        ConfigError: the file is missing or not a YAML mapping.
    """
    if path is None:
        return {}
    try:
        options = parse(read_text(path, LARGEST), f"the config {path}")
    except OSError as error:
        reason = error.strerror or str(error)
        raise ConfigError(f"cannot read the config {path}", expected="a YAML file", found=reason) from error
    if options is None:
        return {}
    if not isinstance(options, dict):
        kind = f"a {type(options).__name__}"
        raise ConfigError(f"{path} is not a config", expected="lines such as 'pattern: \"2:4\"'", found=kind)
    return options
