"""What the server process imports once, so that the processes that it forks for models start at once."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

import onnxruntime  # noqa: F401
import onnxscript  # noqa: F401
import timm  # noqa: F401
import torch
import transformers.modeling_utils  # noqa: F401

import bench.architectures.steps  # noqa: F401

torch.set_num_threads(1)
