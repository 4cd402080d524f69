"""docs/models.md, from the results of ``python -m bench.zoo``."""

from __future__ import annotations

import collections
from collections.abc import Mapping, Sequence
from typing import Any

LIBRARIES = {
    "timm": "timm",
    "torchvision": "torchvision",
    "transformers": "transformers",
    "open_clip": "open_clip",
    "segmentation_models_pytorch": "segmentation_models_pytorch",
    "monai": "MONAI",
    "ultralytics": "ultralytics",
    "wrapped": "Wrappers, inputs and outputs of your own",
}
COLUMNS = {  # step -> head of its column
    "trace": "graph",
    "mask": "masked",
    "merge": "tokens",
    "lower": "lower",
    "save": "save",
    "pt2": "pt2",
    "onnx": "onnx",
    "train": "train",
}
_CAPTURES = {
    "symbolic tracing": "traced",
    "torch.export, strict": "exported",
    "torch.export, non-strict": "exported, non-strict",
    "dynamo": "dynamo",
}
HEAD = """# Models, and what works

Every model below was built in a small configuration with random weights, and taken through `transform` at 2:4, merging,
lowering, saving, export and a step of training. `python -m bench.zoo --page` writes this page from
`bench/results/zoo.json` ({versions}).

- **graph**: `transform(model, example, Config(pattern="2:4"))`, and how it captured the graph. The outputs are those of
  the model itself with the masked weights, within 1e-5 of the largest value. "fixed": only for batches of one size.
- **masked**: masked layers, of all layers with weights. The others are the stem, the head, depthwise, or too narrow.
- **tokens**: `Config(tome_r=2)`; tokens before the first block and after the last. The outputs are those of an
  independent eager reference, within 1e-5; "not compared" where that reference does not find the model's blocks.
- **lower**: `lower(..., Config(engine="reference"))`, within 1e-5.
- **save**: the masked and the lowered module, saved and loaded, within 1e-5.
- **pt2**, **onnx**: exported with dense weights, and run by `torch.export` and onnxruntime, within 1e-4.
- **train**: a step of gradient descent. Removed weights stay, other weights move, BatchNorm statistics follow.

A number stands for a reason below the table. Which of timm's architectures merge tokens is listed
[one by one](token_merging_models.md).
"""


def line(record: Mapping[str, Any]) -> str:
    """A record in the terminal: a line, and one for each reason."""
    if "not_built" in record:
        return f"{record['name']}: not built: {record['not_built']}"
    words = [f"{step} {_figures(result)}" for step, result in record["steps"].items()]
    reasons = [f"\n    {step}: {result['why']}" for step, result in record["steps"].items() if not result["ok"]]
    return f"{record['name']} ({record.get('seconds', 0)} s): {', '.join(words)}{''.join(reasons)}"


def _figures(result: Mapping[str, Any]) -> str:
    if not result["ok"]:
        return "refused" if result["refused"] else "FAILED"
    parts = [result.get("text", ""), f"{result['error']:.0e}" if "error" in result else ""]
    return " ".join(filter(None, parts)) or "yes"


def render(results: Mapping[str, Any]) -> str:
    """The page."""
    records = [record for record in results["models"] if "not_built" not in record]
    groups: dict[str, list[Any]] = {library: [] for library in LIBRARIES}
    for record in records:
        groups[record["name"].partition(":")[0]].append(record)
    groups = {library: group for library, group in groups.items() if group}
    versions = ", ".join(f"{package} {version}" for package, version in sorted(results["versions"].items()))
    parts = [HEAD.format(versions=versions), _summary(groups)]
    parts += [_section(LIBRARIES[library], group) for library, group in groups.items()]
    return "\n".join(parts)


def _summary(groups: Mapping[str, Sequence[Any]]) -> str:
    rows = []
    for library, group in groups.items():
        passed = collections.Counter(step for r in group for step, result in r["steps"].items() if result["ok"])
        rows.append([LIBRARIES[library], len(group), *(passed[step] for step in COLUMNS)])
    rows.append(["all", *map(sum, zip(*[row[1:] for row in rows], strict=True))])
    return _table(["models", "number", *COLUMNS.values()], rows)


def _section(title: str, records: Sequence[Any]) -> str:
    """A table with a row for each model, and its reasons, numbered and grouped."""
    reasons: dict[str, int] = {}
    rows = []
    for record in records:
        name = record["name"].partition(":")[2]
        rows.append([name, *(_cell(step, record["steps"].get(step), reasons) for step in COLUMNS)])
    notes = [f"{number}. {_escaped(why)}" for why, number in reasons.items()]
    return "\n".join([f"## {title}\n", _table(["model", *COLUMNS.values()], rows), *notes, *([""] if notes else [])])


def _cell(step: str, result: Mapping[str, Any] | None, reasons: dict[str, int]) -> str:
    if result is None:
        return ""
    if not result["ok"]:
        return f"no ({reasons.setdefault(result['why'], len(reasons) + 1)})"
    if step == "trace":
        capture, _, batch = result["text"].rpartition(", batch ")
        capture = _CAPTURES[capture or batch]
        return f"{capture}, fixed" if batch == "fixed" else capture
    text = result.get("text") or "yes"
    return f"{text}, not compared" if result.get("unchecked") else text


def _table(head: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    lines = [head, ["---"] * len(head), *([_escaped(str(cell)) for cell in row] for row in rows)]
    return "".join(f"| {' | '.join(cells)} |\n" for cells in lines)


def _escaped(text: str) -> str:
    """Text that Markdown shows as it is."""
    for mark in "\\`*_<>|[]":
        text = text.replace(mark, f"\\{mark}")
    return text
