"""Records: the values of finished regions in a folder, from which an interrupted run resumes."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from mpcompile._version import __version__
from mpcompile.io.writing import make_folder, write_atomically
from mpcompile.reconstruction.fit import Fit
from mpcompile.reconstruction.options import Reconstruction

_REGION, _LENGTHS = "reconstruct-{:04d}", "reconstruct-lengths"


class Records:
    """One safetensors file for each finished region, and one for the lengths that the time budget gave.

    Args:
        folder: the folder, created if missing; None keeps nothing.
        stamp: digest of everything that the values depend on; files with another stamp are ignored and replaced.
        write: False on ranks that only read.

    Raises:
        ArtifactError: the folder cannot be created.
    """

    def __init__(self, folder: Path | None, stamp: str, write: bool = True) -> None:
        self.folder, self.stamp, self.write = folder, stamp, write
        if folder is not None and write:
            make_folder(folder)

    def get(self, place: int, parameters: Mapping[str, Tensor]) -> Fit | None:
        """Read the values of a region into its parameters, and return its errors; None if there are none."""
        found = self._read(_REGION.format(place))
        if found is None:
            return None
        tensors, record = found
        if any(name not in parameters or parameters[name].shape != value.shape for name, value in tensors.items()):
            return None
        with torch.no_grad():
            for name, value in tensors.items():
                parameters[name].copy_(value)
        return Fit(**record)

    def put(self, place: int, parameters: Mapping[str, Tensor], outcome: Fit) -> None:
        """Write the values of a region; none if it kept its own.

        Raises:
            ArtifactError: the folder is not writable, or the disk is full.
        """
        values = {} if outcome.reason else {n: p.detach().cpu().contiguous() for n, p in parameters.items()}
        self._write(_REGION.format(place), values, dataclasses.asdict(outcome))

    def lengths(self) -> tuple[int, int] | None:
        """Return the numbers of views and epochs of the run that wrote the folder, or None."""
        found = self._read(_LENGTHS)
        return None if found is None else (int(found[1]["views"]), int(found[1]["epochs"]))

    def put_lengths(self, views: int, epochs: int) -> None:
        """Write the numbers of views and epochs, so that a resumed run has the same, however fast it is."""
        self._write(_LENGTHS, {}, {"views": views, "epochs": epochs})

    def _read(self, name: str) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
        path = None if self.folder is None else self.folder / f"{name}.safetensors"
        if path is None or not path.is_file():
            return None
        try:
            with safe_open(path, "pt") as file:
                metadata = file.metadata() or {}
                if metadata.get("stamp") != self.stamp:
                    return None
                return {key: file.get_tensor(key) for key in file.keys()}, json.loads(metadata["record"])  # noqa: SIM118
        except Exception:  # a torn or foreign file: its region is trained again
            return None

    def _write(self, name: str, tensors: dict[str, Tensor], record: Mapping[str, Any]) -> None:
        if self.folder is None or not self.write:
            return
        metadata = {"mpcompile": __version__, "stamp": self.stamp, "record": json.dumps(record)}
        path = self.folder / f"{name}.safetensors"
        write_atomically(path, lambda temporary: save_file(tensors, temporary, metadata))


def stamp(models: Iterable[nn.Module], values: Iterable[Any], options: Reconstruction, world: int = 1) -> str:
    """Return a digest of the weights, the images and the options: everything that a run depends on.

    Args:
        world: number of ranks.
    """
    digest = hashlib.sha256(json.dumps([options.to_dict(), world], sort_keys=True).encode())
    tensors = [tensor for model in models for tensor in model.state_dict().values()]
    for tensor in [*tensors, *(value for value in values if isinstance(value, Tensor))]:
        digest.update(str((tuple(tensor.shape), tensor.dtype)).encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
