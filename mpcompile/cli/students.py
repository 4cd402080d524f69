"""The student of ``mpcompile distill``: masked, perhaps reconstructed, and the same on all ranks.

Each step leaves its result in the folder of the run, with a stamp of everything that it depends on, so that a resumed
run starts from the same student.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
import tempfile
from pathlib import Path
from typing import Any

from torch import Tensor

import mpcompile
from mpcompile.cli.models import provenance
from mpcompile.data import datasets, ranks
from mpcompile.data import loader as images
from mpcompile.errors import ArtifactError, InputError
from mpcompile.export.examples import describe_inputs
from mpcompile.io.reading import read_text
from mpcompile.io.writing import make_folder, write_atomically
from mpcompile.ir.module import IRModule
from mpcompile.ir.parts import device_of
from mpcompile.sources.loaded import LoadedModel
from mpcompile.training import checkpoint
from mpcompile.training.recipes.recipe import Recipe

MASKED, RECONSTRUCTED = "student.mpc", "reconstructed.mpc"
_BLOCKS = "reconstruction"  # folder of the blocks that are finished


class Student:
    """Makes the student of a recipe, or reads it from an earlier run.

    Args:
        args: the arguments of ``mpcompile distill``.
        recipe: the recipe.
        source: the dense model; on a device, if the work is to be done there.
        train: the training images, from which those for calibration are drawn.
        data_digest: digest of the training images.
    """

    def __init__(
        self, args: argparse.Namespace, recipe: Recipe, source: LoadedModel, train: Any, data_digest: str
    ) -> None:
        self.args, self.recipe, self.source, self.train = args, recipe, source, train
        self.weights_and_data = f"{data_digest} {checkpoint.weights_digest(source.model)}"

    def make(self) -> IRModule:
        """Return the student, the same on all ranks.

        The first rank masks the model and sends it to the others; then all of them reconstruct it together, if the
        recipe says so.

        Raises:
            ArtifactError: the folder holds a run with a different student, or a damaged file.
            InputError: the first rank failed.
        """
        self._on_first_rank(self._prepare)
        if not self._on_first_rank(lambda: self._left(MASKED)):
            self._on_first_rank(self._mask)
        if self.recipe.reconstruct is None:
            return self._shared(MASKED)
        if not self._on_first_rank(lambda: self._left(RECONSTRUCTED)):
            student = self._shared(MASKED).to(device_of(self.source.model))
            student = self.recipe.reconstructed(
                student, self.source.model, self._calibration(), folder=self.args.out / _BLOCKS
            )
            self._on_first_rank(lambda: self._write(student, RECONSTRUCTED))
        return self._shared(RECONSTRUCTED)

    def _prepare(self) -> None:
        """Tidy the folder up after an interrupted run.

        Raises:
            ArtifactError: the training began from a reconstructed student, and this recipe reconstructs nothing.
        """
        checkpoint.remove_temporary_files(self.args.out)
        mark = (self.args.out / RECONSTRUCTED).with_suffix(".stamp")
        if self.recipe.reconstruct is None and os.path.lexists(mark):
            if self._trained():
                raise self._different()
            mark.unlink()

    def _trained(self) -> bool:
        return (self.args.out / checkpoint.NAME).exists()

    def _different(self) -> ArtifactError:
        return ArtifactError(
            f"{self.args.out} holds a run with a different student",
            expected="the same recipe, dense weights and training images",
            found="different ones",
            hint="resume that run with its own options, or choose a new folder",
        )

    def _on_first_rank(self, work: Any) -> Any:
        """Return the result of a function that the first rank alone calls; an error there is raised on all ranks."""
        failed: Exception | None = None
        result = None
        if ranks.rank() == 0:
            try:
                result = work()
            except Exception as error:  # the other ranks are waiting
                failed = error
        problem, result = ranks.broadcast((None if failed is None else str(failed), result))
        if failed is not None:
            raise failed
        if problem is not None:
            raise InputError(f"the first rank failed: {problem}")
        return result

    def _shared(self, name: str) -> IRModule:
        """Return the artifact that the first rank has in its folder."""
        path = self.args.out / name
        content = ranks.broadcast(path.read_bytes() if ranks.rank() == 0 and ranks.active() else None)
        if ranks.rank() == 0:
            return mpcompile.load(path)
        with tempfile.TemporaryDirectory(prefix="mpcompile-") as folder:
            copy = Path(folder, name)
            write_atomically(copy, content)
            return mpcompile.load(copy)

    def _left(self, name: str) -> bool:
        """Return True if an earlier run left this student of the same recipe, weights and images.

        Raises:
            ArtifactError: the folder holds a run with a different student, or a damaged file.
        """
        path = self.args.out / name
        mark = path.with_suffix(".stamp")
        if self.args.resume == "auto":
            if path.exists() and os.path.lexists(mark) and _read_stamp(mark) == self._stamp(name):
                mpcompile.load(path)  # raises if the file is damaged
                return True
            # A masked student can be made again; one that was reconstructed in limited time would be another.
            if (path.exists() or name == RECONSTRUCTED) and self._trained():
                raise self._different()
        mark.unlink(missing_ok=True)  # so that if this run is killed, no stamp vouches for a different student
        return False

    def _mask(self) -> None:
        """Write the masked student and its stamp."""
        recipe, source = self.recipe, self.source
        make_folder(self.args.out)
        student = recipe.student(source.model, self._calibration())
        numbers = datasets.class_names(self.train)
        student.plan.provenance = {
            **provenance(source, recipe.calibration.images, recipe.train.seed),
            "recipe": recipe.name,
            "class_names": sorted(numbers, key=lambda n: numbers[n]),
            "inputs": describe_inputs(student),
        }
        self._write(student, MASKED)

    def _calibration(self) -> list[Tensor]:
        """Return the calibration images in batches, the same on every rank, on the device of the dense model."""
        teacher, how = self.source.model, self.recipe.calibration
        seed = self.recipe.train.seed
        drawn = images.calibration(self.train, teacher, self.recipe.data, how.images, how.batch, seed)
        return [part.to(device_of(teacher)) for part in drawn]

    def _write(self, student: IRModule, name: str) -> None:
        path = self.args.out / name
        mpcompile.save(student.eval(), path)
        write_atomically(path.with_suffix(".stamp"), self._stamp(name))

    def _stamp(self, name: str) -> str:
        """Return a digest of everything that the student depends on."""
        args, recipe = self.args, self.recipe
        parts = ["model", "compile", "calibration", "prior_weight"]
        parts += ["reconstruct"] if name == RECONSTRUCTED else []
        made = {key: value for key, value in recipe.to_dict().items() if key in parts}
        text = json.dumps([made, recipe.data.size, recipe.train.seed, args.reader, args.train_split], sort_keys=True)
        return hashlib.sha256(f"{text} {self.weights_and_data}".encode()).hexdigest()


def _read_stamp(mark: Path) -> str:
    """Return the stamp of the student of an earlier run.

    Raises:
        ArtifactError: the file is damaged.
    """
    problem = None
    try:
        stamp = read_text(mark, 1000)
    except OSError as error:
        problem = error.strerror or str(error)
    else:
        if re.fullmatch("[0-9a-f]{64}", stamp):
            return stamp
    hint = f"remove it and {mark.with_suffix('.mpc').name} to make the student again"
    raise ArtifactError(f"{mark} is damaged", expected="a SHA-256 digest", found=problem or "other text", hint=hint)
