"""What skipping dead tokens is worth on the CPU: the same build with and without it, interleaved.

    python -m bench.tokens.dead_tokens --model vit_base_patch16_224 --batch 1 8 --threads 1 2

The model is a timm model with random weights, compiled with freezing after
``mpcompile.transform(model, x, Config(pattern="dense", tome_r=r, skip_dead_tokens=...))``. The dense model, compiled
alike, runs beside them. The ratio is the median time without skipping over that with it; beside it is the ratio of
executed multiply-accumulates, which it would equal if time were proportional to arithmetic. Outputs of both builds are
compared: in fp32 their relative RMS difference must stay below 1e-5; otherwise the row says WRONG and the exit status
is 1.

With ``--threads 1`` the clock is the processor time of that thread, which is valid on a shared machine, too.

Results go into dead_tokens.json, one record per (model, depth, batch, dtype, threads).
"""

from __future__ import annotations

import argparse
import functools
import gc
import itertools
import sys
import time
from typing import Any

import torch

import mpcompile
from bench import common
from bench.cpu.e2e import create, keep, title
from mpcompile.passes.dead_tokens import SkipDeadTokens
from mpcompile.passes.merge_tokens import MergeTokens

NAME = "dead_tokens"


def measured(args: argparse.Namespace, batch: int, threads: int) -> dict[str, Any]:
    """Build and time everything for one batch size and number of threads."""
    torch.set_num_threads(threads)
    model, x = create(args, batch, args.dtype)
    calls, outputs, macs = {}, {}, {}
    run, _ = common.compiled_dense(model, x, freezing=True)
    calls["dense"] = functools.partial(run, x)
    for r, skip in itertools.product(args.tome_r, (False, True)):
        config = mpcompile.Config(pattern="dense", tome_r=r, skip_dead_tokens=skip)
        gm = mpcompile.transform(model, x, config, pipeline=mpcompile.Pipeline([MergeTokens(), SkipDeadTokens()]))
        run, _ = common.compiled_dense(gm, x, freezing=True)
        calls[f"{r} {skip}"], outputs[r, skip] = functools.partial(run, x), run(x)
        macs[r, skip] = gm.plan.macs.executed
    clock = time.thread_time if threads == 1 else time.perf_counter
    env = common.environment(threads)
    seconds = common.interleave(calls, args.rounds, args.warmup, f"batch {batch}, {threads} threads", clock)
    env["load average at the end"] = common.environment()["load average"]
    ms = {name: common.quartiles(times, 1e3) for name, times in seconds.items()}
    rows = {}
    for r in args.tome_r:
        without, with_ = ms[f"{r} False"], ms[f"{r} True"]
        error = common.relative_rms(outputs[r, True], outputs[r, False])
        rows[str(r)] = {
            "without_ms": without,
            "with_ms": with_,
            "ratio": without["median"] / with_["median"],
            "macs_ratio": macs[r, False] / macs[r, True],
            "against_dense": ms["dense"]["median"] / with_["median"],
            "relative_rms": error,
            "correct": error < common.TOLERANCE[args.dtype],
        }
    key = {"model": args.model, "depth": args.depth, "batch": batch, "dtype": args.dtype, "threads": threads}
    return {**key, "rounds": args.rounds, "environment": env, "dense_ms": ms["dense"], "r": rows}


def show(record: dict[str, Any]) -> None:
    """Print one record: per number of merged tokens, both times and their ratio."""

    def text(ms: dict[str, float]) -> str:
        return f"{ms['median']:,.1f} [{ms['q1']:,.1f}, {ms['q3']:,.1f}]"

    rows = []
    for r, row in record["r"].items():
        wrong = "" if row["correct"] else " WRONG"
        ratios = [common.ratio_text(row["ratio"]), f"{row['macs_ratio']:.3f}x", common.ratio_text(row["against_dense"])]
        rows.append([r, text(row["without_ms"]), text(row["with_ms"]) + wrong, *ratios])
    head = ["r", "all tokens, ms", "skipping, ms", "ratio", "MACs", "vs compiled dense"]
    print(f"\n{title(record)}; dense {text(record['dense_ms'])}\n" + common.table(rows, head), flush=True)


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="vit_base_patch16_224", help="timm name (%(default)s)")
    parser.add_argument("--depth", type=int, metavar="N", help="blocks; the model's own by default")
    parser.add_argument("--batch", type=int, nargs="+", metavar="B", help="images per call (1 8)")
    parser.add_argument("--dtype", choices=list(common.DTYPES), default="fp32", help="(%(default)s)")
    parser.add_argument("--threads", type=int, nargs="+", metavar="N", help="(1 2)")
    parser.add_argument("--tome-r", type=int, nargs="+", metavar="R", help="tokens merged per block (0 8)")
    parser.add_argument("--rounds", type=int, metavar="N", help="timed calls of each build (15)")
    parser.add_argument("--warmup", type=int, default=2, metavar="N", help="untimed calls before those (%(default)s)")
    common.common_arguments(parser)
    args = parser.parse_args(argv)
    if args.quick and args.depth is None:
        args.depth = 2
    full = {"batch": [1, 8], "threads": [1, 2], "tome_r": [0, 8], "rounds": 15}
    common.fill(args, full, {"batch": [1], "threads": [1], "tome_r": [0], "rounds": 3})
    return args


@torch.no_grad()
def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    print(common.describe(common.environment()))
    wrong = 0
    for threads, batch in itertools.product(args.threads, args.batch):
        record = measured(args, batch, threads)
        torch._dynamo.reset()
        gc.collect()
        _, path = keep(NAME, record, args.out)
        show(record)
        wrong += sum(not row["correct"] for row in record["r"].values())
    print(f"figures: {path}")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
