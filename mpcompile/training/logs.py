"""What a run tells while it goes on: a JSON Lines file always, TensorBoard and Weights & Biases if asked for."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mpcompile.errors import ArtifactError, ConfigError

NAME = "log.jsonl"
TRACKERS = ("tensorboard", "wandb")


class Log:
    """Records of a run, one JSON object a line in ``folder/log.jsonl``; numbers also go to the trackers.

    Args:
        folder: where the file lies, or None to write none.
        trackers: of :data:`TRACKERS`.

    Raises:
        ConfigError: an unknown tracker, or one whose package isn't installed.
        ArtifactError: the file can't be written.
    """

    def __init__(self, folder: Path | None, trackers: Sequence[str] = ()) -> None:
        self.path = None if folder is None else folder / NAME
        self.start = time.perf_counter()
        self.board: Any = None
        self.run: Any = None
        for name in trackers:
            if name not in TRACKERS:
                raise ConfigError("there is no such tracker", expected=f"one of {', '.join(TRACKERS)}", found=name)
            try:
                if name == "tensorboard":
                    from torch.utils.tensorboard import SummaryWriter

                    self.board = SummaryWriter(str(folder or "."))
                else:
                    import wandb

                    self.run = wandb.init(dir=str(folder or "."), resume="allow")
            except ImportError as error:
                raise ConfigError(f"{name} isn't installed", hint="pip install 'mpcompile[trackers]'") from error

    def add(self, event: str, step: int, **values: Any) -> None:
        """Add a record: ``{"event", "step", "seconds", ...}``."""
        record = {"event": event, "step": step, "seconds": round(time.perf_counter() - self.start, 3), **values}
        if self.path is not None:
            try:
                with open(self.path, "a", encoding="utf-8") as file:
                    file.write(json.dumps(record) + "\n")
            except OSError as error:
                raise ArtifactError(
                    f"can't write {self.path}",
                    expected="a writable folder with room",
                    found=error.strerror or str(error),
                ) from error
        numbers = {k: v for k, v in values.items() if isinstance(v, (int, float)) and not isinstance(v, bool)}
        if self.board is not None:
            for key, value in numbers.items():
                self.board.add_scalar(f"{event}/{key}", value, step)
        if self.run is not None:
            self.run.log({f"{event}/{k}": v for k, v in numbers.items()}, step=step)

    def close(self) -> None:
        """Close the trackers."""
        if self.board is not None:
            self.board.close()
        if self.run is not None:
            self.run.finish()
