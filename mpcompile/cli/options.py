"""What several commands share: declaring one, options of models and of the Config, and what is made from them."""

from __future__ import annotations

import argparse
import dataclasses
import os
import platform
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import nn

from mpcompile._version import __version__
from mpcompile.artifact.container import WEIGHTS
from mpcompile.cli.destinations import FILE, declare
from mpcompile.config import ENGINES, SCHEDULES, SCORES, Config
from mpcompile.data.images import data_config
from mpcompile.errors import ArtifactError, ConfigError, InputError, first_line, printable_lines
from mpcompile.io.checkpoints import load_checkpoint
from mpcompile.io.reading import read_text, sha256
from mpcompile.io.writing import write_atomically
from mpcompile.io.yaml_options import LARGEST, parse

Commands: TypeAlias = "argparse._SubParsersAction[argparse.ArgumentParser]"  # what add(commands) is given

EXITS = "0 done, 1 the command found something wrong, 2 something to mend in the call, 130 interrupted"
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
        epilog=f"example:{lines}\n\nexit status: {EXITS}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    loud = job.add_mutually_exclusive_group()
    loud.add_argument("--quiet", action="store_true", help="no progress bars, no warnings")
    loud.add_argument("--verbose", action="store_true", help="also say what is being done, and where errors come from")
    return job


def json_option(job: argparse.ArgumentParser) -> None:
    """``--json FILE``; a command that has it prints its result with :func:`show`."""
    text = "write the result here as JSON; - prints it, in place of the text"
    job.add_argument("--json", metavar="FILE", help=text)
    declare(job, json=FILE)


def show(args: argparse.Namespace, text: object, data: str) -> None:
    """Print a result, and write its JSON where ``--json`` says.

    Raises:
        ArtifactError: the file can't be written.
    """
    if args.json is not None and str(args.json) == "-":
        print(data)
        return
    if args.json is not None:
        write_atomically(args.json, data + "\n")
    print(printable_lines(text))


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
    source_options(job)
    classes_option(job)


def source_options(job: argparse.ArgumentParser) -> None:
    """``--pretrained`` or ``--checkpoint FILE``."""
    weights = job.add_mutually_exclusive_group()
    weights.add_argument("--pretrained", action="store_true", help="timm's pretrained weights (fetched by timm)")
    weights.add_argument("--checkpoint", type=Path, metavar="FILE", help="the model's: safetensors file or state dict")


def names_file(target: str) -> bool:
    """Whether what can be a timm model's name or a file of weights is a file."""
    path = Path(target)
    return path.suffix in (".mpc", ".safetensors", ".pt", ".pth", ".tar", ".ckpt", ".bin") or os.path.lexists(path)


def classes_option(job: argparse.ArgumentParser) -> None:
    """``--num-classes``."""
    job.add_argument(
        "--num-classes", type=at_least(1), metavar="N", help="of the model (default: timm's, or the file's)"
    )


def seed_option(job: argparse.ArgumentParser) -> None:
    """``--seed``."""
    job.add_argument("--seed", type=at_least(0), default=0, help="seeds whatever is random (default 0)")


def config_options(job: argparse.ArgumentParser, *names: str, **defaults: Any) -> None:
    """``--config FILE`` and an option for each field of the Config, or for those named.

    :func:`config_of` makes a Config of them: what is typed goes before what the file says, and that before
    ``defaults``, which stand in for the Config's own.
    """
    options = job.add_argument_group("what the model becomes", "fields of mpcompile.Config; --config reads them too")
    options.add_argument("--config", type=Path, metavar="FILE", help="YAML: option names and values, as in Config")
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
    "pattern": {"metavar": "N:M", "help": "keep N of every M inputs; or auto, or dense"},
    "mac_reduction": {
        "type": float,
        "metavar": "SHARE",
        "help": "MACs that masks are to save, 0 - 1: each layer gets a pattern of its own; --pattern isn't looked at",
    },
    "patterns": {
        "nargs": "+",
        "metavar": "N:M",
        "help": "with --mac-reduction: what a layer may become, dense among it (default: what the device runs well)",
    },
    "tome_r": {
        "type": tome_r,
        "metavar": "R",
        "help": "tokens merged a block: 8, or 16,12,8 (one a block), or auto",
    },
    "tome_schedule": {"choices": SCHEDULES, "help": "alike in all blocks, or falling to 0"},
    "tome_reduction": {
        "type": float,
        "metavar": "SHARE",
        "help": "with --tome-r auto: MACs to save by merging, 0 - 1",
    },
    "tome_proportional": {"action": "store_false", "help": "count a merged token once in attention, not by its size"},
    "score": {"choices": SCORES, "help": "which values a group keeps"},
    "permute": {"action": argparse.BooleanOptionalAction, "help": "reorder channels first (default: with calibration)"},
    "restore": {"action": "store_false", "help": "leave kept values as they are"},
    "engine": {"choices": ENGINES, "help": "what runs masked layers"},
    "exclude": {"nargs": "*", "metavar": "NAME", "help": "roles, names or globs that stay dense"},
    "include": {"nargs": "*", "metavar": "NAME", "help": "names or globs that are masked all the same"},
    "prefix_tokens": {"type": at_least(0), "metavar": "N", "help": "tokens in front that never merge"},
    "frozen": {
        "action": "store_true",
        "help": "weights won't change any more: fold and prepack, and beat dense builds that do the same",
    },
}


def config_of(args: argparse.Namespace) -> Config:
    """The Config that :func:`config_options` were given.

    Raises:
        ConfigError: a file that is missing or no YAML mapping, an unknown option, or a value that it can't take.
    """
    names = [field.name for field in dataclasses.fields(Config)]
    typed = {name: getattr(args, name) for name in names if hasattr(args, name)}
    return Config.from_options({**args.config_defaults, **read_config(args.config), **typed})


def read_config(path: Path | None) -> dict[str, Any]:
    """The options in a YAML file; none without a file.

    Raises:
        ConfigError: the file is missing or no YAML mapping.
    """
    if path is None:
        return {}
    try:
        found = parse(read_text(path, LARGEST), f"the config {path}")
    except OSError as error:
        reason = error.strerror or str(error)
        raise ConfigError(f"can't read the config {path}", expected="a YAML file", found=reason) from error
    if found is None:
        return {}
    if not isinstance(found, dict):
        what = f"a {type(found).__name__}"
        raise ConfigError(f"{path} is no config", expected="lines such as 'pattern: \"2:4\"'", found=what)
    return found


def model_options(job: argparse.ArgumentParser, **defaults: Any) -> None:
    """What every job that measures a timm model takes; ``defaults`` as for :func:`config_options`."""
    weights_options(job)
    job.add_argument("--batch", type=at_least(1), default=8, help="images a call (default 8)")
    job.add_argument("--dtype", choices=DTYPES, default="fp32", help="of weights and images (default fp32)")
    job.add_argument("--threads", type=at_least(1), help="threads of PyTorch")
    job.add_argument("--device", default="cpu", help="cpu or cuda (default cpu)")
    seed_option(job)
    json_option(job)
    config_options(job, **{"score": "magnitude", **defaults})


def create(name: str, pretrained: bool, **options: Any) -> nn.Module:
    import timm

    if not timm.is_model(name):
        near = timm.list_models(f"*{name.split('_', maxsplit=1)[0]}*")[:5]
        raise ConfigError(f"timm has no model {name!r}", expected=", ".join(near) or "a name from timm.list_models()")
    try:
        model: nn.Module = timm.create_model(name, pretrained=pretrained, **options)
        if getattr(model, "dynamic_img_size", False):  # commands have images of one size, whose graph can be traced
            model = timm.create_model(name, pretrained=pretrained, **options, dynamic_img_size=False)
        return model
    except Exception as error:
        raise InputError(
            f"timm can't make {name!r}: {first_line(error)}",
            hint="check the connection, or give --checkpoint FILE" if pretrained else None,
        ) from error


def create_sized(name: str, pretrained: bool, size: Sequence[int] | None, classes: int | None) -> nn.Module:
    """A timm model for images of a size and a number of classes of one's own; None leaves timm's.

    Its data configuration says the size, too.
    """
    options: dict[str, Any] = {} if classes is None else {"num_classes": classes}
    if size is None or tuple(size) == _usual_size(name):
        return create(name, pretrained, **options)
    try:
        model = create(name, pretrained, img_size=tuple(size[-2:]), **options)
    except InputError as error:
        if not isinstance(error.__cause__, TypeError):
            raise
        model = create(name, pretrained, **options)  # takes images of any size
    _say_size(model, size)
    return model


def _usual_size(name: str) -> tuple[int, ...] | None:
    import timm

    try:
        usual = timm.get_pretrained_cfg(name)
    except RuntimeError:  # an unknown tag: `create` says so
        return None
    return None if usual is None else tuple(usual.input_size)


def _say_size(model: nn.Module, size: Sequence[int]) -> None:
    model.pretrained_cfg = {**getattr(model, "pretrained_cfg", {}), "input_size": tuple(size)}  # type: ignore[assignment]


def create_with(
    name: str, pretrained: bool, checkpoint: Path | None, size: Sequence[int] | None, classes: int | None
) -> nn.Module:
    """:func:`create_sized` in eval mode, with the weights of a checkpoint file where one is given.

    Position embeddings for the model's usual size are resampled, if timm can do that.

    Raises:
        ConfigError: timm has no such model.
        ArtifactError: the checkpoint can't be read or doesn't fit.
    """
    model = create_sized(name, pretrained, size, classes).eval()
    if checkpoint is None:
        return model
    try:
        load_checkpoint(model, checkpoint)
    except ArtifactError:
        if size is None or tuple(size) == _usual_size(name) or not hasattr(model, "set_input_size"):
            raise
        usual: Any = create_sized(name, False, None, classes).eval()
        load_checkpoint(usual, checkpoint)
        usual.set_input_size(img_size=tuple(size[-2:]))
        _say_size(usual, size)
        return usual
    return model


def load_model(args: argparse.Namespace, like: Mapping[str, Any] | None = None) -> nn.Module:
    """The model of :func:`weights_options`, in eval mode.

    Args:
        args: what was typed.
        like: provenance of an artifact, whose image size and classes count where nothing else was typed.

    Raises:
        ConfigError: timm has no such model.
        ArtifactError: the checkpoint can't be read or doesn't fit.
    """
    data = (like or {}).get("data")
    size, classes = data.get("input_size") if isinstance(data, Mapping) else None, (like or {}).get("num_classes")
    if not (isinstance(size, list) and len(size) == 3 and all(isinstance(n, int) and n > 0 for n in size)):
        size = None  # anyone can have written it
    if not (isinstance(classes, int) and classes > 0):
        classes = None
    wanted = args.num_classes if args.num_classes is not None else classes
    return create_with(args.model, args.pretrained, args.checkpoint, size, wanted)


def class_names(found: Mapping[str, Any]) -> list[str]:
    """The classes of an artifact in the order of its outputs, where its provenance names them."""
    names = found.get("class_names")
    return names if isinstance(names, list) and all(isinstance(name, str) for name in names) else []


def provenance(
    args: argparse.Namespace, name: str, model: nn.Module, calibration_images: int, seed: int
) -> dict[str, Any]:
    """Where an artifact comes from: model, weights, classes, data configuration, calibration, versions."""
    import timm

    weights: Any = "timm's pretrained" if args.pretrained else f"random, seed {seed}"
    if args.checkpoint is not None:
        file = args.checkpoint / WEIGHTS if args.checkpoint.is_dir() else args.checkpoint
        weights = {"file": args.checkpoint.name, "sha256": sha256(file)}
    return {
        "model": name,
        "weights": weights,
        "num_classes": getattr(model, "num_classes", None),
        "data": data_config(model),
        "calibration_images": calibration_images,
        "versions": {
            "mpcompile": __version__,
            "torch": torch.__version__,
            "timm": timm.__version__,
            "python": platform.python_version(),
        },
    }


def prepare(args: argparse.Namespace, like: Mapping[str, Any] | None = None) -> tuple[nn.Module, torch.Tensor, Config]:
    """Model, random images and config, as :func:`model_options` were given; ``like`` as for :func:`load_model`."""
    config = config_of(args)
    if args.threads:
        torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    model = load_model(args, like)
    size = getattr(model, "pretrained_cfg", {}).get("input_size", (3, 224, 224))
    try:
        device = torch.device(args.device)
        images = torch.randn(args.batch, *size, dtype=DTYPES[args.dtype], device=device)
        model = model.to(device, DTYPES[args.dtype])
    except (RuntimeError, AssertionError) as error:
        raise ConfigError(f"device {args.device!r} can't be used: {first_line(error)}") from error
    return model, images, config
