"""Memory of a process that serves a model: the dense checkpoint against the lowered artifact.

    python -m bench.cpu.memory --model vit_base_patch16_224 --pattern 8:16

A first process writes two files: the model's state dict (safetensors) and the artifact of ``mpcompile.lower``. Each is
then loaded by a separate process, which answers two requests of one image. The figures are the private resident memory
of that process (``Private_*`` in /proc/self/smaps_rollup), minus that of the same process before it loaded anything:
after loading (when the dense file is mapped but not yet read), and after the requests, which also allocate torch's own
buffers. The bytes of the weights themselves are given for comparison.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors.torch import load_file, save_file

import mpcompile
from bench import common

NAME = "cpu_memory"


def private_bytes() -> int:
    """Resident bytes that are not shared with any other process."""
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    return sum(int(line.split()[1]) * 1024 for line in lines if line.startswith("Private"))


@torch.inference_mode()
def serve(args: argparse.Namespace) -> dict[str, Any]:
    """Load a file and answer requests, in a separate process."""
    image = torch.randn(1, 3, 224, 224)
    torch.nn.functional.linear(torch.randn(64, 64), torch.randn(64, 64))  # torch allocates these in any case
    before = private_bytes()
    if args.serve == "dense":
        with torch.device("meta"):
            model = timm.create_model(args.model).eval()
        model.load_state_dict(load_file(args.file), assign=True)
    else:
        model = mpcompile.load(args.file)
    loaded = private_bytes()
    for _ in range(2):
        model(image)
    weights = sum({t.data_ptr(): t.nbytes for t in [*model.parameters(), *model.buffers()]}.values())
    return {"loaded": loaded - before, "serving": private_bytes() - before, "weights": weights}


def write(args: argparse.Namespace, folder: Path) -> None:
    """Write the two files."""
    torch.manual_seed(0)
    model, image = timm.create_model(args.model).eval(), torch.randn(1, 3, 224, 224)
    save_file({name: value.contiguous() for name, value in model.state_dict().items()}, folder / "dense.safetensors")
    config = mpcompile.Config(pattern=args.pattern, score="magnitude")
    mpcompile.save(mpcompile.lower(mpcompile.transform(model, image, config), image), folder / "lowered.mpc")


def own_process(*arguments: str) -> str:
    command = [sys.executable, "-m", "bench.cpu.memory", *arguments]
    done = subprocess.run(command, cwd=common.ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{' '.join(arguments)} failed:\n{done.stderr}")
    return done.stdout


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="vit_base_patch16_224", help="timm name (%(default)s)")
    parser.add_argument("--pattern", default="8:16", metavar="N:M", help="(%(default)s)")
    parser.add_argument("--serve", choices=["dense", "lowered"], help=argparse.SUPPRESS)
    parser.add_argument("--write", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--file", type=Path, help=argparse.SUPPRESS)
    common.common_arguments(parser)
    args = parser.parse_args(argv)
    common.fill(args, {}, {"model": "vit_tiny_patch16_224"})
    if args.serve:
        print(json.dumps(serve(args)))
        return 0
    if args.write:
        write(args, args.file)
        return 0
    shared = ["--model", args.model, "--pattern", args.pattern]
    found: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory() as folder:
        own_process("--write", "--file", folder, *shared)
        for kind, file in (("dense", "dense.safetensors"), ("lowered", "lowered.mpc")):
            path = Path(folder) / file
            answer = own_process("--serve", kind, "--file", str(path), *shared)
            found[kind] = {**json.loads(answer.splitlines()[-1]), "file": path.stat().st_size}
    keys = list(found["dense"])
    rows = [[kind, *(f"{figures[key] / 2**20:,.1f}" for key in keys)] for kind, figures in found.items()]
    rows.append(["lowered / dense", *(f"{found['lowered'][key] / found['dense'][key]:.1%}" for key in keys)])
    print(f"{args.model}, {args.pattern}, fp32: MiB\n\n{common.table(rows, ['', *keys])}")
    data = {"environment": common.environment(), "model": args.model, "pattern": args.pattern, "bytes": found}
    print(f"figures: {common.save(NAME, data, args.out)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
