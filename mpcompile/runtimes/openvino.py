"""OpenVINO on the CPU: fp32, bf16 where the processor multiplies it, and int8 where NNCF is installed."""

from __future__ import annotations

import contextlib
import ctypes
import importlib.util
import io
import logging
import os
import sys
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch

from mpcompile.errors import ConfigError
from mpcompile.kernels.machine import has_bf16
from mpcompile.runtimes.base import (
    Arguments,
    Build,
    Port,
    Runtime,
    calibration_arrays,
    missing_package,
)

SUBSET = 300  # samples that NNCF calibrates on, its own default


class _SignalStack(ctypes.Structure):
    """``stack_t`` of Linux."""

    _fields_ = (("address", ctypes.c_void_p), ("flags", ctypes.c_int), ("size", ctypes.c_size_t))


@contextlib.contextmanager
def signal_stack_kept() -> Iterator[None]:
    """Restore this thread's alternate signal stack at the end.

    Each CPU plugin of OpenVINO sets one and, when it goes, restores what it found. Two that do not go in reverse order
    leave a stack behind that is no longer mapped, and the next signal with a handler, such as that of a data loader's
    worker that ends, kills the process.
    """
    if not sys.platform.startswith("linux"):
        yield
        return
    libc, before = ctypes.CDLL(None), _SignalStack()
    libc.sigaltstack(None, ctypes.byref(before))
    try:
        yield
    finally:
        libc.sigaltstack(ctypes.byref(before), None)


class OpenVino(Runtime):
    """OpenVINO, tuned for the latency of one request; int8 by NNCF's post-training quantisation.

    Example:
        >>> OpenVino().precisions()[0]
        'fp32'
    """

    name = "openvino"
    title = "OpenVINO"
    package = "openvino"
    extra = "openvino"

    def precisions(self) -> tuple[str, ...]:
        return ("fp32", *(["bf16"] if has_bf16() else []), "int8")

    @signal_stack_kept()
    def load(
        self, path: Path, precision: str = "fp32", threads: int | None = None, calibration: Iterable[Arguments] = ()
    ) -> Build:
        self.check(precision)
        import openvino

        threads = threads or torch.get_num_threads()
        model = openvino.Core().read_model(path)
        build = self._compiled(model, "fp32" if precision == "int8" else precision, threads)
        if precision != "int8":
            return build
        calls = list(calibration_arrays(build, calibration, SUBSET))
        if not calls:
            raise ConfigError("int8 needs calibration data", hint="give a few hundred inputs as calibration")
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "int8.xml"
            openvino.save_model(quantised(model, calls), file, compress_to_fp16=False)
            size = file.with_suffix(".bin").stat().st_size
            build = self._compiled(openvino.Core().read_model(file), precision, threads)
        build.weight_bytes = size
        return build

    def _compiled(self, model: Any, precision: str, threads: int) -> Build:
        import openvino

        # What is not quantised in an int8 model runs in the fastest floating-point type.
        floats = "f32" if precision == "fp32" or not has_bf16() else "bf16"
        options = {
            "INFERENCE_NUM_THREADS": threads,
            "PERFORMANCE_HINT": "LATENCY",
            "INFERENCE_PRECISION_HINT": floats,
        }
        compiled = openvino.Core().compile_model(model, "CPU", options)
        inputs = [
            Port(port.any_name, tuple(None if size.is_dynamic else size.get_length() for size in port.partial_shape))
            for port in compiled.inputs
        ]
        outputs = tuple(port.any_name for port in compiled.outputs)
        request = compiled.create_infer_request()

        def run(feed: dict[str, Any]) -> list[Any]:
            found = request.infer(feed, share_inputs=True)
            return [found[index] for index in range(len(outputs))]

        return Build(self.title, self.version, precision, tuple(inputs), outputs, run)


def quantised(model: Any, calls: list[dict[str, Any]]) -> Any:
    """Return an OpenVINO model with 8-bit weights and activations, whose ranges are those of the given calls.

    Raises:
        ConfigError: NNCF is not installed.
    """
    if importlib.util.find_spec("nncf") is None:
        raise missing_package("int8", "nncf", "openvino")
    with _without_telemetry():
        import nncf
    level = logging.getLogger("nncf").level
    nncf.set_log_level(logging.ERROR)
    attention = any(node.get_type_name() in ("Softmax", "ScaledDotProductAttention") for node in model.get_ops())
    kind = nncf.ModelType.TRANSFORMER if attention else None  # keeps softmax and norms in floating point
    try:
        with contextlib.redirect_stdout(io.StringIO()):  # its progress bars
            return nncf.quantize(
                model,
                nncf.Dataset(calls),
                preset=nncf.QuantizationPreset.MIXED,
                model_type=kind,
                subset_size=len(calls),
            )
    finally:
        nncf.set_log_level(level or logging.INFO)


@contextlib.contextmanager
def _without_telemetry() -> Iterator[None]:
    """Import NNCF without the statistics of use that it sends otherwise; this is its own switch for that."""
    before = os.environ.get("NNCF_CI")
    os.environ["NNCF_CI"] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ["NNCF_CI"]
        else:
            os.environ["NNCF_CI"] = before
