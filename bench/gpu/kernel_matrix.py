"""Compile the sparse tensor-core kernels for GPUs that need not be present, and report the resources of each build.

    python -m bench.gpu.kernel_matrix --arch 80 90 --json matrix.json     # all tiles, dtypes and epilogues
    python -m bench.gpu.kernel_matrix --seconds 500                       # some of them; run it again to continue
    python -m bench.gpu.kernel_matrix --roofline                          # times predicted by a model of the chips

Needs Triton 3.9 (``gl.inline_asm``). If torch came with an older one, ``--triton FOLDER`` (or the variable
``MPCOMPILE_TRITON``) names another: ``pip install --no-deps --target FOLDER 'triton>=3.9'``.

The JSON is a list of records with kernel, tile, dtype, epilogue, arch, registers (per thread), spill_bytes (per
thread), smem_bytes (per program), sparse_instructions (in the SASS), threads, instructions (others, by name), seconds,
source (a digest of the kernel's code) and triton; a failed build has ``error`` instead. Good records in the file are
kept if their source is unchanged (``--again`` compiles all). The exit status is 1 if any build fails, spills more than
16 bytes, has no sparse instruction, needs more shared memory than its architecture has, or is missing.

The roofline is arithmetic, not measurement: bytes and clocks from data sheets (kernels/nm_linear/gpu/model.py). Beside
the time of the best tile it gives the bound of a *perfect* dense product; the ratio to a real one will differ.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from tqdm import tqdm

from bench import common
from mpcompile.errors import MPCompileError
from mpcompile.kernels.nm_linear.gpu.build import EPILOGUES, Build, compile_all, digest
from mpcompile.kernels.nm_linear.gpu.model import CHIPS, choose_tile, dense_us, predict_us, step_clocks
from mpcompile.kernels.nm_linear.gpu.tiles import SHARED_BYTES, tiles_of

SPILL = 16
# Fields of a record that are needed only for a launch.
LAUNCH = ("ptx", "cubin", "function", "parameters", "scratch_bytes")
PART = 24  # builds between two checks of the clock
KERNELS = ("gluon_mma_conv", "gluon_mma_sp", "gluon_wgmma_sp")
WIDTHS = {"ViT-S": 384, "ViT-B": 768, "ViT-L": 1024}
TOKENS = (197, 1576, 12608, 25216, 50432)


def matrix(archs: list[int], kernels: list[str], epilogues: list[str]) -> list[Build]:
    """Every tile on every architecture that supports it, in both dtypes, with the given epilogues."""
    tiles = [(name, tile, arch) for name in kernels for tile in tiles_of(name) for arch in tile.arch if arch in archs]
    return [
        Build(name, tile.name, dtype, epilogue, arch)
        for (name, tile, arch), dtype, epilogue in itertools.product(tiles, ("fp16", "bf16"), epilogues)
    ]


def known(where: Path) -> dict[Build, dict[str, Any]]:
    """The good records of a file whose kernels are unchanged."""
    records = common.load(where.stem, where.parent) or []
    fields = [field.name for field in dataclasses.fields(Build)]
    return {
        Build(**{key: record[key] for key in fields}): record
        for record in records
        if "error" not in record and record.get("source") == digest(record["kernel"])
    }


def compiled(
    wanted: list[Build], found: dict[Build, dict[str, Any]], where: Path, args: argparse.Namespace
) -> list[dict[str, Any]]:
    """Compile the wanted builds that have no record yet, within the time limit, and add them to the file.

    Raises:
        InputError: no suitable Triton is installed.
    """
    left, deadline = [build for build in wanted if build not in found], time.monotonic() + args.seconds
    order = {build: number for number, build in enumerate(wanted)}
    stamp = time.strftime("%Y%m%d-%H%M%S")  # the folder of an earlier run is not changed
    with tempfile.TemporaryDirectory() as scratch, tqdm(total=len(left), desc="compile", unit="build") as bar:
        for number, start in enumerate(range(0, len(left), PART)):
            if time.monotonic() > deadline:
                break
            folder = (args.keep or Path(scratch)) / f"{stamp}-{number}"
            for build, record in compile_all(left[start : start + PART], folder, args.triton, args.jobs):
                found[build] = {k: v for k, v in record.items() if k not in LAUNCH}
                bar.update()
            records = sorted(found, key=lambda build: order.get(build, len(order)))
            common.save(where.stem, [found[build] for build in records], where.parent)
    return [found[build] for build in wanted if build in found]


def complaint(record: dict[str, Any]) -> str | None:
    """The fault of a build, or None."""
    if "error" in record:
        return str(record["error"])
    if record["spill_bytes"] > SPILL:
        return f"spills {record['spill_bytes']} bytes"
    if record["sparse_instructions"] == 0:
        return "no sparse instruction"
    limit = SHARED_BYTES[record["arch"]]
    return f"{record['smem_bytes']} bytes of shared memory, of {limit}" if record["smem_bytes"] > limit else None


def summary(records: list[dict[str, Any]]) -> str:
    """One line per tile and architecture: the extremes over dtypes and epilogues."""
    groups: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for record in records:
        groups.setdefault((record["kernel"], record["tile"], record["arch"]), []).append(record)
    lines = []
    for key, group in sorted(groups.items()):
        good = [r for r in group if "error" not in r]
        columns = [[r[name] for r in good] or [0] for name in ("registers", "spill_bytes", "smem_bytes")]
        cells = [f"{min(c)}..{max(c)}" if min(c) != max(c) else str(max(c)) for c in columns]
        counts = sorted({r["sparse_instructions"] for r in good})
        lines.append([*key, len(group), *cells, " ".join(map(str, counts)), len(group) - len(good)])
    head = ["kernel", "tile", "arch", "builds", "registers", "spill B", "shared B", "sparse instr.", "failed"]
    return common.table(lines, head, left=2)


def roofline() -> list[dict[str, Any]]:
    """Expected microseconds of the products of ViTs on each chip, and the dense product's bound."""
    rows = []
    for chip, (model, width), tokens in itertools.product(CHIPS, WIDTHS.items(), TOKENS):
        for layer, n, k in (("qkv", 3 * width, width), ("fc1", 4 * width, width), ("fc2", width, 4 * width)):
            tiles = [choose_tile(name, tokens, n, k, chip.arch) for name in ("gluon_mma_sp", "gluon_wgmma_sp")]
            tile = min((t for t in tiles if t), key=lambda t: predict_us(t, tokens, n, k, chip))
            us, dense = predict_us(tile, tokens, n, k, chip), dense_us(tokens, n, k, chip)
            parts = dict(zip(("products", "shared", "cache"), step_clocks(tile, chip), strict=True))
            rows.append(
                {
                    **{"chip": chip.name, "model": model, "layer": layer, "tokens": tokens, "shape": [n, k]},
                    **{"kernel": tile.kernel, "tile": tile.name, "us": round(us, 2), "dense_us": round(dense, 2)},
                    **{"ratio": round(dense / us, 3), "step_clocks": {key: round(v) for key, v in parts.items()}},
                    "bound": max(parts, key=lambda part: parts[part]),
                }
            )
    return rows


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", type=int, nargs="+", choices=list(SHARED_BYTES), default=list(SHARED_BYTES))
    parser.add_argument("--kernels", nargs="+", choices=KERNELS, default=list(KERNELS), help="(all)")
    parser.add_argument("--epilogues", nargs="+", choices=EPILOGUES, default=list(EPILOGUES), help="(all)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="file of the records (bench/results/)")
    parser.add_argument("--keep", type=Path, metavar="FOLDER", help="folder to keep cubins in, for MPCOMPILE_CUBINS")
    parser.add_argument(
        "--triton", type=Path, metavar="FOLDER", help="folder of a newer Triton, if the installed one is too old"
    )
    parser.add_argument("--jobs", type=int, default=2, metavar="N", help="processes (%(default)s)")
    parser.add_argument(
        "--seconds",
        type=float,
        default=float("inf"),
        help="stop after this many seconds; another run continues (never)",
    )
    parser.add_argument("--again", action="store_true", help="also compile builds that have a record")
    parser.add_argument("--roofline", action="store_true", help="compile nothing; print the predictions of the model")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    if args.roofline:
        rows = roofline()
        cells = [[r[k] for k in ("chip", "model", "layer", "tokens", "kernel", "tile", "bound")] for r in rows]
        figures = [[f"{r['us']:,.1f}", f"{r['dense_us']:,.1f}", f"{r['ratio']:.2f}"] for r in rows]
        head = ["chip", "model", "layer", "tokens", "kernel", "tile", "bound by", "us", "dense bound us", "ratio"]
        print(common.table([c + f for c, f in zip(cells, figures, strict=True)], head, left=7))
        print("expected by arithmetic, not measured")
        where = args.json or common.RESULTS / "gpu_roofline.json"
        print(f"figures: {common.save(where.stem, rows, where.parent)}")
        return 0
    where = args.json or common.RESULTS / "kernel_matrix.json"
    wanted = matrix(args.arch, args.kernels, args.epilogues)
    try:
        records = compiled(wanted, {} if args.again else known(where), where, args)
    except MPCompileError as error:
        print(error, file=sys.stderr)
        return 2
    print(summary(records))
    print(f"figures: {where}" + (f"; {len(wanted) - len(records)} builds left" if len(records) < len(wanted) else ""))
    wrong = [(record, why) for record in records if (why := complaint(record)) is not None]
    for record, why in wrong:
        name = " ".join(str(record[key]) for key in ("kernel", "tile", "dtype", "epilogue", "arch"))
        print(f"{name}: {why}", file=sys.stderr)
    return 1 if wrong or len(records) < len(wanted) else 0


if __name__ == "__main__":
    sys.exit(main())
