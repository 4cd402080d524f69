"""mpcompile: a torch.fx / torch.compile compiler that makes trained vision models sparse and verifies the result."""

from pathlib import Path as _Path

_root = _Path(__file__).resolve().parent.parent
if not (_Path(__file__).parent / "passes").is_dir() and (_root / "pyproject.toml").exists():
    # A checkout without symbolic links (some archives and file systems drop them) has passes/ and kernels/ in its root.
    __path__.append(str(_root))

from mpcompile import _moved
from mpcompile._version import __version__ as __version__
from mpcompile.artifact import load, save
from mpcompile.backend import refresh
from mpcompile.certificates.api import Certificates, certify
from mpcompile.config import Config
from mpcompile.errors import MPCompileError
from mpcompile.measure.audit import Report, audit
from mpcompile.measure.explain import Explanation, explain
from mpcompile.optimization.api import optimize
from mpcompile.optimization.frontier import Frontier
from mpcompile.optimization.result import Optimized
from mpcompile.optimization.runner import Runner, load_runner
from mpcompile.page.merged import visualize_merging
from mpcompile.passes.reconstruct.api import reconstruct
from mpcompile.pipeline import Pipeline, lower, transform
from mpcompile.plan import Plan
from mpcompile.reconstruction.options import Reconstruction
from mpcompile.rmt.analysis import Analysis, analyze
from mpcompile.sources.loaded import LoadedModel
from mpcompile.sources.loading import load_model
from mpcompile.training.distill import Training, distill

_moved.install(__name__)
__getattr__ = _moved.attribute

__all__ = [
    "Analysis",
    "Certificates",
    "Config",
    "Explanation",
    "Frontier",
    "LoadedModel",
    "MPCompileError",
    "Optimized",
    "Pipeline",
    "Plan",
    "Reconstruction",
    "Report",
    "Runner",
    "Training",
    "analyze",
    "audit",
    "certify",
    "distill",
    "explain",
    "load",
    "load_model",
    "load_runner",
    "lower",
    "optimize",
    "reconstruct",
    "refresh",
    "save",
    "transform",
    "visualize_merging",
]
