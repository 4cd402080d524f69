"""The graph before and after every pass, as readable Python in a folder: ``MPCOMPILE_DUMP`` and ``compile --dump``."""

from __future__ import annotations

import difflib
import json
import os
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor, fx

from mpcompile.errors import ArtifactError
from mpcompile.io.writing import check_folder_writable, make_folder, write_atomically
from mpcompile.ir.module import IRModule
from mpcompile.ir.nodes import fake_value

if TYPE_CHECKING:
    from mpcompile.passes.base import Pass
    from mpcompile.passes.context import Observer
    from mpcompile.passes.decision import Decision

VARIABLE = "MPCOMPILE_DUMP"
FILES = ("before.py", "after.py", "change.diff", "decision.json")
_ASSIGNED = re.compile(r"^ +(\w+)(?: : .+?)? = ")
_NUMBERED = re.compile(r"^(\d+)-")


def readable(gm: IRModule) -> str:
    """Return the code of a graph as Python, with the dtype and shape of every value in a comment.

    Example:
        >>> import torch, mpcompile
        >>> model = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.ReLU())
        >>> gm = mpcompile.transform(model, torch.randn(2, 8), mpcompile.Config(pattern="dense"))
        >>> readable(gm).splitlines()[0]
        '# input_1: float32 (2, 8)'
    """
    shapes = {node.name: _described(node) for node in gm.graph.nodes}
    inputs = [node.name for node in gm.graph.nodes if node.op == "placeholder"]
    lines = [f"# {name}: {shapes[name]}" for name in inputs if shapes[name]]
    for line in gm.code.strip("\n").split("\n"):
        assigned = _ASSIGNED.match(line)
        shape = shapes.get(assigned[1]) if assigned else None
        lines.append(f"{line.rstrip()}  # {shape}" if shape else line.rstrip())
    return "\n".join(lines) + "\n"


def _described(node: fx.Node) -> str | None:
    """Return dtype and shape of a node's value, or None if they are not known."""
    return _describe(fake_value(node))


def _describe(value: Any) -> str | None:
    if isinstance(value, Tensor):
        return f"{str(value.dtype).removeprefix('torch.')} {tuple(value.shape)}"
    if isinstance(value, (tuple, list)) and value:
        parts = [_describe(entry) for entry in value]
        return None if None in parts else ", ".join(map(str, parts))
    return None


class Dump:
    """Writes a folder ``NN-name`` after every pass, with the files of :data:`FILES`.

    ``before.py`` and ``after.py`` are the graph as Python, ``change.diff`` is their unified diff, and ``decision.json``
    holds what the Plan records of the decision, without tensors. Numbering continues after the folders already there,
    so nothing is overwritten.

    Args:
        folder: created if missing.

    Raises:
        ArtifactError: the folder cannot be created, or cannot be written into.

    Example:
        >>> import mpcompile
        >>> mpcompile.Pipeline(after_each=Dump("graphs"))
        Pipeline([analyze, allocate, permute, merge_tokens, mask, restore, skip_dead_tokens])
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self.folder = Path(folder)
        check_folder_writable(self.folder)
        make_folder(self.folder)

    def __call__(self, step: Pass, before: str, gm: IRModule, decision: Decision | dict[str, Any]) -> None:
        after = readable(gm)
        record = decision if isinstance(decision, dict) else decision.record()
        diff = difflib.unified_diff(before.splitlines(True), after.splitlines(True), "before.py", "after.py")
        folder = self._fresh(step.name)
        texts = (before, after, "".join(diff), json.dumps(record, indent=1, default=str) + "\n")
        for name, text in zip(FILES, texts, strict=True):
            write_atomically(folder / name, text)

    def _fresh(self, name: str) -> Path:
        """Create a folder for a pass, numbered after all that exist; other processes may write there, too."""
        safe = re.sub(r"[^\w.-]", "_", name)
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            number = 1 + max((int(m[1]) for p in self.folder.iterdir() if (m := _NUMBERED.match(p.name))), default=0)
            while True:
                path = self.folder / f"{number:02}-{safe}"
                try:
                    path.mkdir()
                    return path
                except FileExistsError:
                    number += 1
        except OSError as error:
            raise ArtifactError(
                f"cannot write graphs into {self.folder}",
                expected="a writable folder with room",
                found=error.strerror or str(error),
            ) from error


def observers(folder: str | os.PathLike[str] | None = None) -> list[Observer]:
    """Return a :class:`Dump` for ``folder``, and one for the folder in the environment variable ``MPCOMPILE_DUMP``.

    Raises:
        ArtifactError: one of the folders cannot be written into.
    """
    folders = [folder, os.environ.get(VARIABLE)]
    return [Dump(path) for path in dict.fromkeys(os.fspath(f) for f in folders if f)]
