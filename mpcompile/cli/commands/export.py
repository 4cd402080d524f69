"""``mpcompile export``: an artifact in a form that other programs run."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch

import mpcompile
from mpcompile import export as exporting
from mpcompile.cli.destinations import FILE, declare
from mpcompile.cli.options import DTYPES, Commands, at_least, command, json_option, show
from mpcompile.config import ENGINES
from mpcompile.errors import ConfigError
from mpcompile.ir.module import IRModule

TOLERANCE = {torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 5e-2}  # of outputs, relative RMS


def add(commands: Commands) -> None:
    """Declare it."""
    job = command(
        commands,
        "export",
        help="write an artifact as a torch.export program, AOTInductor package, ONNX file or timm state dict",
        description="Write an artifact in a form that other programs run: pt2 (torch.export, packed weights), aoti "
        "(an AOTInductor package: native code), onnx (dense weights with zeros, for TensorRT), dense-masked (a state "
        "dict for timm). The result is run once and compared with the artifact.",
        example="mpcompile export pruned.mpc --format aoti --batch 8 --out pruned.pt2\n"
        "mpcompile export pruned.mpc --format onnx --dynamic-batch --out pruned.onnx",
    )
    job.add_argument("artifact", type=Path, help="what mpcompile compile or mpcompile.save wrote")
    job.add_argument("--format", choices=exporting.EXPORTS, required=True, help="see above")
    job.add_argument("--out", required=True, metavar="FILE", help="file to write")
    declare(job, out=FILE)
    job.add_argument("--batch", type=at_least(1), default=1, help="images a call (default 1)")
    job.add_argument("--dtype", choices=DTYPES, default="fp32", help="of weights and images (default fp32)")
    job.add_argument("--dynamic-batch", action="store_true", help="leave the batch size free")
    job.add_argument(
        "--input-size", type=at_least(1), nargs=3, metavar=("C", "H", "W"), help="(default: the artifact's)"
    )
    engine = "pt2, aoti: what runs masked layers; dense needs no mpcompile where it is loaded (default auto)"
    job.add_argument("--engine", choices=ENGINES, default="auto", help=engine)
    job.add_argument("--threads", type=at_least(1), help="threads of PyTorch")
    json_option(job)
    job.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Exit status 0 when the file computes what the artifact does, 1 when it doesn't."""
    if args.threads:
        torch.set_num_threads(args.threads)
    gm = mpcompile.load(args.artifact).eval()
    if args.format == "dense-masked":
        exporting.save_dense(gm, args.out)
        found: dict[str, Any] = {"tensors": len(exporting.dense_state(gm))}
    else:
        found = _exported(gm, args)
    found = {"file": str(args.out), "format": args.format, "bytes": args.out.stat().st_size, **found}
    text = f"{args.out}: {args.format}, {found['bytes'] / 2**20:,.2f} MiB"
    if "difference" in found:
        checked = found["difference"]
        text += (
            ", not run: onnxruntime isn't installed" if checked is None else f", differs by {checked:.1e} (relative)"
        )
    show(args, text, json.dumps(found, indent=1))
    return 0 if found.get("ok", True) else 1


def _exported(gm: IRModule, args: argparse.Namespace) -> dict[str, Any]:
    """Export, run what was written, and compare."""
    size = args.input_size or gm.plan.provenance.get("data", {}).get("input_size")
    if size is None:
        raise ConfigError(f"{args.artifact} doesn't say what it takes", hint="give --input-size, such as 3 224 224")
    dtype = DTYPES[args.dtype]
    gm.to(dtype)
    example = torch.randn(args.batch, *size, generator=torch.Generator().manual_seed(0)).to(dtype)
    options: dict[str, Any] = {"dynamic_batch": args.dynamic_batch}
    if args.format == "onnx":
        exporting.save_onnx(gm, example, args.out, **options)
    else:
        write = exporting.save_pt2 if args.format == "pt2" else exporting.save_aoti
        write(gm, example, args.out, engine=args.engine, **options)
    with torch.no_grad():
        expected = gm(example)
    outputs = exporting.run_exported(args.out, args.format, example)
    if outputs is None:
        return {"difference": None}
    difference = float((outputs.float() - expected.float()).norm() / expected.float().norm().clamp(min=1e-30))
    return {"difference": difference, "ok": difference <= TOLERANCE[dtype]}
