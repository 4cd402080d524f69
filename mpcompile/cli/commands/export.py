"""``mpcompile export``: write an artifact in a format that other programs run."""

from __future__ import annotations

import argparse
import json
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

import mpcompile
from mpcompile import export as exporting
from mpcompile.cli.destinations import FILE, declare
from mpcompile.cli.options import (
    DTYPES,
    Commands,
    as_path,
    as_path_text,
    at_least,
    command,
    json_option,
    show,
    threads_option,
)
from mpcompile.config import ENGINES
from mpcompile.export.examples import example_of_artifact
from mpcompile.ir.module import IRModule

TOLERANCE = {
    torch.float32: 1e-4,
    torch.float16: 2e-2,
    torch.bfloat16: 5e-2,
}  # largest relative RMS difference of the outputs


def add(commands: Commands) -> None:
    """Declare the command."""
    job = command(
        commands,
        "export",
        help="write an artifact as a torch.export program, AOTInductor package, ONNX file or timm state dict",
        description="Write an artifact in a format that other programs run: pt2 (torch.export, packed weights), aoti "
        "(an AOTInductor package: native code), onnx (dense weights with zeros, for TensorRT), dense-masked (a state "
        "dict for timm). The result is run once and compared with the artifact.",
        example="mpcompile export pruned.mpc --format aoti --batch 8 --out pruned.pt2\n"
        "mpcompile export pruned.mpc --format onnx --dynamic-batch --out pruned.onnx",
    )
    job.add_argument("artifact", type=as_path, help="file or folder from mpcompile compile or mpcompile.save")
    job.add_argument("--format", choices=exporting.EXPORTS, required=True, help="described above")
    job.add_argument("--out", type=as_path_text, required=True, metavar="FILE", help="file to write")
    declare(job, out=FILE)
    job.add_argument("--batch", type=at_least(1), default=1, help="images per batch (default 1)")
    job.add_argument("--dtype", choices=DTYPES, default="fp32", help="dtype of weights and images (default fp32)")
    job.add_argument("--dynamic-batch", action="store_true", help="accept any batch size up to 4096")
    job.add_argument(
        "--input-size",
        type=at_least(1),
        nargs=3,
        metavar=("C", "H", "W"),
        help="size of one image (default: that in the artifact, which also records other inputs)",
    )
    engine = "for pt2 and aoti: kernels that run masked layers; dense loads without mpcompile (default auto)"
    job.add_argument("--engine", choices=ENGINES, default="auto", help=engine)
    threads_option(job)
    json_option(job)
    job.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Return 0 if the exported file computes the same as the artifact, else 1."""
    if args.threads:
        torch.set_num_threads(args.threads)
    gm = mpcompile.load(args.artifact).eval()
    if args.format == "dense-masked":
        exporting.save_dense(gm, args.out)
        result: dict[str, Any] = {"tensors": len(exporting.dense_state(gm))}
    else:
        result = _exported(gm, args)
    result = {"file": str(args.out), "format": args.format, "bytes": args.out.stat().st_size, **result}
    text = f"{args.out}: {args.format}, {result['bytes'] / 2**20:,.2f} MiB"
    if "difference" in result:
        difference = result["difference"]
        text += (
            ", not run: onnxruntime is not installed"
            if difference is None
            else f", differs by {difference:.1e} (relative)"
        )
    show(args, text, json.dumps(result, indent=1))
    return 0 if result.get("ok", True) else 1


def _exported(gm: IRModule, args: argparse.Namespace) -> dict[str, Any]:
    """Export, run the exported file, and compare its outputs with those of the artifact."""
    origin = gm.plan.provenance
    record, data = origin.get("inputs"), origin.get("data")
    size = args.input_size or (data.get("input_size") if isinstance(data, dict) else None)
    dtype = DTYPES[args.dtype]
    gm.to(dtype)
    example = example_of_artifact(gm, record, size, args.batch)
    example = pytree.tree_map_only(Tensor, lambda t: t.to(dtype) if t.is_floating_point() else t, example)
    options: dict[str, Any] = {"dynamic_batch": args.dynamic_batch}
    if args.format == "onnx":
        exporting.save_onnx(gm, example, args.out, **options)
    else:
        write = exporting.save_pt2 if args.format == "pt2" else exporting.save_aoti
        write(gm, example, args.out, engine=args.engine, **options)
    with torch.no_grad():
        expected = gm(**example) if isinstance(example, dict) else gm(*example)
    outputs = exporting.run_exported(args.out, args.format, example)
    if outputs is None:
        return {"difference": None}
    difference = _difference(outputs, expected)
    return {"difference": difference, "ok": difference <= TOLERANCE[dtype]}


def _difference(outputs: Any, expected: Any) -> float:
    """Return the largest relative RMS difference of an output; of integers, the share that differs."""
    found, leaves = pytree.tree_leaves(outputs), pytree.tree_leaves(expected)
    if len(found) != len(leaves):  # ONNX leaves out what is no tensor
        leaves = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
    differences = [0.0]
    for actual, wanted in zip(found, leaves, strict=True):
        if not isinstance(wanted, Tensor):
            continue
        if wanted.is_floating_point():
            norm = wanted.float().norm().clamp(min=1e-30)
            differences.append(float((actual.float() - wanted.float()).norm() / norm))
        else:
            differences.append(float((actual != wanted).float().mean()))
    return max(differences)
