"""ONNX Runtime on the CPU, in fp32. It has no bf16 there, and quantises files, not models."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import torch

from mpcompile.runtimes.base import Arguments, Build, Port, Runtime


class OnnxRuntime(Runtime):
    """ONNX Runtime with its own graph optimisations, all of which are on.

    Example:
        >>> OnnxRuntime().precisions()
        ('fp32',)
    """

    name = "onnxruntime"
    title = "ONNX Runtime"
    package = "onnxruntime"
    extra = "onnx"

    def precisions(self) -> tuple[str, ...]:
        return ("fp32",)

    def load(
        self, path: Path, precision: str = "fp32", threads: int | None = None, calibration: Iterable[Arguments] = ()
    ) -> Build:
        self.check(precision)
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads or torch.get_num_threads()
        options.inter_op_num_threads = 1
        options.log_severity_level = 3  # errors; its warnings are about its own choices
        # Threads that wait for work would otherwise spin beside what runs next, such as the next build of an audit.
        options.add_session_config_entry("session.force_spinning_stop", "1")
        session = onnxruntime.InferenceSession(path, options, ["CPUExecutionProvider"])
        # A free axis has a name, or none, in place of its size.
        inputs = [
            Port(node.name, tuple(size if isinstance(size, int) else None for size in node.shape))
            for node in session.get_inputs()
        ]
        outputs = tuple(node.name for node in session.get_outputs())
        run = lambda feed: session.run(None, feed)  # noqa: E731
        return Build(self.title, self.version, precision, tuple(inputs), outputs, run)
