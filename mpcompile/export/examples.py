"""Example inputs of an artifact: a record of a graph's inputs, and inputs of noise made from the record."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from mpcompile.capture.signature import call_of, input_names, takes_trees
from mpcompile.errors import ConfigError
from mpcompile.ir.nodes import fake_value, hint

_DTYPES = {
    str(dtype).removeprefix("torch."): dtype
    for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.bool, torch.uint8)
    + (torch.int8, torch.int16, torch.int32, torch.int64)
}
_CONSTANTS = (bool, int, float, str, type(None))
_MOST = 2**28  # values of an example: a record may be forged
_IMAGE = 4  # axes of a batch of images


def describe_inputs(gm: fx.GraphModule) -> list[dict[str, Any]]:
    """Return the inputs of a transformed graph as JSON values: name, dtype and shape, or name and value of a constant.

    Example:
        >>> model = nn.Sequential(nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 4)).eval()
        >>> describe_inputs(mpcompile.transform(model, torch.randn(2, 16), mpcompile.Config(pattern="2:4")))
        [{'name': 'input', 'dtype': 'float32', 'shape': [2, 16]}]
    """
    nodes = [node for node in gm.graph.nodes if node.op == "placeholder"]
    values = [leaf for node in nodes for leaf in pytree.tree_leaves(fake_value(node))]
    inputs: list[dict[str, Any]] = []
    for name, value in zip(input_names(gm), values, strict=True):
        if isinstance(value, Tensor):
            shape = [int(hint(size)) for size in value.shape]
            inputs.append({"name": name, "dtype": str(value.dtype).removeprefix("torch."), "shape": shape})
        else:
            inputs.append({"name": name, "value": value if isinstance(value, _CONSTANTS) else str(value)})
    return inputs


def example_of_artifact(gm: fx.GraphModule, record: Any, size: Sequence[int] | None, batch: int) -> Any:
    """Return inputs of noise in the form that a graph was captured with: a dict of keywords, or a tuple.

    Integers and masks are ones: an index that every table has, and a mask that leaves nothing out.

    Args:
        gm: the graph of an artifact.
        record: from :func:`describe_inputs`, as the artifact has it; unchecked, it may be anything.
        size: (channels, height, width) of the image, the input with the most axes; None: as recorded.
        batch: size of axis 0 of every input in which it has the same length as in the image.

    Raises:
        ConfigError: the inputs are not known.
    """
    nodes = [node for node in gm.graph.nodes if node.op == "placeholder"]
    entries = record if _is_record(record) else []
    if not entries and len(nodes) == 1 and size is not None:
        entries = [{"name": input_names(gm)[0], "dtype": "float32", "shape": [batch, *size]}]
    if not entries:
        raise ConfigError(
            "the artifact does not record its inputs",
            hint="give --input-size, such as 3 224 224" if len(nodes) == 1 else "use mpcompile.export in Python",
        )
    image = max((entry["shape"] for entry in entries if entry.get("shape")), key=len, default=None)
    generator = torch.Generator().manual_seed(0)
    values = {}
    for entry in entries:
        shape = _shape(entry.get("shape"), image, size, batch)
        values[entry["name"]] = entry["value"] if shape is None else _noise(entry["dtype"], shape, generator)
    flat = list(values.values())
    if not takes_trees(gm):
        flat = [_tree(str(node.target), values) for node in nodes]
    args, kwargs = call_of(gm, flat)
    return call_of(gm, flat, keywords=True)[1] if kwargs else args


def _is_record(record: Any) -> bool:
    """Return True for a list as :func:`describe_inputs` makes it, of inputs that fit into memory."""
    if not isinstance(record, list) or not all(isinstance(entry, Mapping) for entry in record):
        return False
    for entry in record:
        shape = entry.get("shape", [])
        known = entry.get("dtype") in _DTYPES if "shape" in entry else "value" in entry
        sizes = isinstance(shape, list) and all(type(n) is int and n > 0 for n in shape) and math.prod(shape) <= _MOST
        if not (isinstance(entry.get("name"), str) and known and sizes):
            return False
    return True


def _shape(
    recorded: list[int] | None, image: list[int] | None, size: Sequence[int] | None, batch: int
) -> list[int] | None:
    """Return the shape of an input at another batch size and image size; None for a constant."""
    if not recorded or image is None:
        return recorded
    rest = list(size) if size is not None and recorded == image and len(recorded) == _IMAGE else recorded[1:]
    return [batch if recorded[0] == image[0] else recorded[0], *rest]


def _noise(name: str, shape: list[int], generator: torch.Generator) -> Tensor:
    dtype = _DTYPES[name]
    if not dtype.is_floating_point:
        return torch.ones(shape, dtype=dtype)
    return torch.randn(shape, generator=generator).to(dtype)


def _tree(name: str, values: Mapping[str, Any]) -> Any:
    """Return the value of a traced graph's input: a leaf, or the dict or tuple whose leaves have dotted names."""
    if name in values:
        return values[name]
    keys = [key.removeprefix(f"{name}.").partition(".")[0] for key in values if key.startswith(f"{name}.")]
    parts = {key: _tree(f"{name}.{key}", values) for key in keys}
    return tuple(parts.values()) if parts and all(key.isdigit() for key in parts) else parts
