"""``mpcompile env``: print the environment, for a bug report."""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path
from typing import Any

from mpcompile.cli.options import Commands, command, json_option, show
from mpcompile.errors import printable

_PACKAGES = ("timm", "triton", "numpy", "onnxruntime", "openvino")


def add(commands: Commands) -> None:
    """Declare the command."""
    job = command(
        commands,
        "env",
        help="print versions, processor, compilers and caches, for a bug report",
        description="Print the details of this machine that a bug report needs: versions, processor, instruction set, "
        "compilers, GPUs and caches. Nothing is compiled, timed or written. No folder is named except the cache, and "
        "the home folder is shown as ~.",
        example="mpcompile env\nmpcompile env --json env.json",
    )
    json_option(job)
    job.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Return 0, whatever is missing."""
    from mpcompile.measure.environment import environment

    values = without_private_paths(environment())
    rows = [(key.replace("_bytes", "_size").replace("_", " "), _shown(key, value)) for key, value in values.items()]
    width = max(len(key) for key, _ in rows)
    show(args, "\n".join(f"{key:{width}}  {text}" for key, text in rows), json.dumps(values, indent=1))
    return 0


def without_private_paths(values: dict[str, Any]) -> dict[str, Any]:
    """Return an environment that names no folder except the cache, in whose path the home folder is ``~``.

    The compiler command is reduced to the names of its programs (``/opt/secret/bin/g++ -I/...`` becomes ``g++``), the
    path of the timings file to its name.
    """
    home = os.path.expanduser("~")
    cache = values["cache"]
    if cache == home or cache.startswith(home.rstrip(os.sep) + os.sep):
        cache = "~" + cache[len(home.rstrip(os.sep)) :]
    changed = {"cache": cache}
    if values["compiler"] is not None:
        changed["compiler"] = " ".join(Path(word).name for word in values["compiler"].split() if word[:1] != "-")
    if values["timings"] is not None:
        changed["timings"] = Path(values["timings"]).name
    return {**values, **changed}


def _shown(key: str, value: Any) -> str:
    """Return a value of the environment as text."""
    if value is None:
        return "not installed" if key in _PACKAGES else "none"
    if key == "kernel_libraries":
        return str(len(value))
    if key.endswith("_bytes"):
        return f"{value / 2**30:,.1f} GiB" if value >= 2**30 else f"{value / 2**20:,.1f} MiB"
    if isinstance(value, dict):
        return ", ".join(f"{name}={setting}" for name, setting in value.items()) or "none"
    if isinstance(value, list):
        return ", ".join(map(str, value)) or "none"
    return printable(value)
