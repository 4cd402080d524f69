"""Artifact headers changed at random, with valid checksums: does loading ever do anything but load or refuse?

Each round starts from one of two small files (a masked transformer with merging; one with packed engines). It replaces,
removes, swaps or inserts 1 to 4 values anywhere in its texts or header, sometimes flips bytes of its tensors, adds a
valid checksum, and loads the file. Any result other than a module or an ArtifactError, or a load beyond ``--limit``
seconds, counts as a failure, and the file is kept.

With ``--graphs`` the graph is changed: other operators, arguments, integers and bytes of tensors, in files that also
hold native kernels (tests/support/forged_graphs.py). Files that load are also run on an input, all in child processes.
A child that dies counts as a failure; excessive time or memory of a graph does not.

    python -m bench.robustness.fuzz_artifacts --rounds 10000 --json bench/results/fuzz_artifacts.json
    python -m bench.robustness.fuzz_artifacts --graphs --rounds 10000 --json bench/results/fuzz_graphs.json
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import functools
import json
import operator
import random
import signal
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from timm.models.vision_transformer import VisionTransformer
from tqdm import tqdm

from mpcompile import Config, load, lower, save, transform
from mpcompile.errors import ArtifactError
from mpcompile.io.writing import write_atomically
from mpcompile.ir.module import IRModule

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from tests.support.forged_graphs import ENDED, Forger, outcomes
from tests.support.forging import forge, parts

TEXTS = ("graph", "modules", "tensors", "plan")
JUNK: list[Any] = [
    *(None, True, False, 0, 1, -1, 3, 2**31, 2**63, 10**30, 0.5, 1e300, "", "x", "a.b", "self", "lambda", "9" * 400),
    *("__class__", "os.system", "torch.load", "\x00", [], [1], [[[[1]]]], {}, {"node": "x"}, {"tuple": [1]}),
    *({"dict": {"a": 1}}, {"float": "nan"}, {"same": ""}, {"slice": [1, 2, 3]}),
]


def samples(folder: Path) -> list[Path]:
    """The two files to change."""
    torch.manual_seed(0)
    shape = {"img_size": 16, "patch_size": 8, "embed_dim": 16, "depth": 1, "num_heads": 2, "num_classes": 4}
    x = torch.randn(2, 3, 16, 16)
    gm = transform(VisionTransformer(**shape).eval(), x, Config(pattern="2:4", tome_r=1))
    save(gm, folder / "masked.mpc")
    save(lower(gm, x, Config(engine="reference")), folder / "lowered.mpc")
    return [folder / "masked.mpc", folder / "lowered.mpc"]


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """All paths into nested lists and dicts."""
    keys = value if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ()
    return [path, *(place for key in keys for place in places(value[key], (*path, key)))]


def change(whole: dict[str, Any], everywhere: list[tuple[Any, ...]], draw: random.Random) -> None:
    """Make one random change."""
    path, other = draw.choice(everywhere), draw.choice(everywhere)
    try:
        owner = functools.reduce(operator.getitem, path[:-1], whole)
        kind = draw.choice(["junk", "junk", "remove", "swap", "number", "insert"])
        if kind == "remove":
            del owner[path[-1]]
        elif kind == "swap":
            owner[path[-1]] = copy.deepcopy(functools.reduce(operator.getitem, other, whole))
        elif kind == "number" and isinstance(owner[path[-1]], int):
            owner[path[-1]] += draw.choice([-1, 1, 7, 2**16])
        elif kind == "insert" and isinstance(owner, list):
            owner.insert(int(path[-1]), copy.deepcopy(draw.choice(JUNK)))
        elif kind == "insert":
            owner[draw.choice(["forward", "new", "__class__", "x.y", "values"])] = copy.deepcopy(draw.choice(JUNK))
        else:
            owner[path[-1]] = copy.deepcopy(draw.choice(JUNK))
    except (KeyError, IndexError, TypeError):
        pass  # an earlier change removed this place


def changed(path: Path, draw: random.Random) -> tuple[dict[str, Any], bytes]:
    """Header and data of a file after random changes."""
    header, data = parts(path)
    texts = {key: json.loads(header["__metadata__"][key]) for key in TEXTS}
    whole = {**texts, "header": {k: v for k, v in header.items() if k != "__metadata__"}}
    everywhere = [place for place in places(whole) if len(place) > 1]
    for _ in range(draw.randint(1, 4)):
        change(whole, everywhere, draw)
    if draw.random() < 0.2:
        flipped = bytearray(data)
        for _ in range(draw.randint(1, 20)):
            flipped[draw.randrange(len(flipped))] = draw.randrange(256)
        data = bytes(flipped)
    metadata = header["__metadata__"] | {key: json.dumps(whole[key]) for key in TEXTS}
    return {"__metadata__": metadata, **whole["header"]}, data


def graphs(rounds: int, seed: int, limit: float) -> dict[str, Any]:
    """Counts of the outcomes of forged graphs, and the numbers of those that crashed."""
    torch.set_num_threads(1)  # threads do not survive a fork
    counts, crashed = Counter[str](), []
    with tempfile.TemporaryDirectory() as folder, contextlib.suppress(KeyboardInterrupt):
        found = outcomes(Forger(Path(folder), seed), rounds, seconds=limit)
        for number, outcome in tqdm(found, total=rounds, unit="graph", mininterval=5):
            counts[outcome] += 1
            if outcome not in ENDED:
                crashed.append(f"round {number}: {outcome}")
    return {"rounds": counts.total(), "seed": seed, "outcomes": dict(counts.most_common()), "crashed": crashed}


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--rounds", type=int, default=10_000)
    options.add_argument("--seed", type=int, default=0)
    options.add_argument("--limit", type=float, default=20.0, help="maximum seconds per load")
    options.add_argument("--graphs", action="store_true", help="change graphs, and run those that load")
    options.add_argument("--json", type=Path)
    args = options.parse_args()
    if args.graphs:
        result = graphs(args.rounds, args.seed, args.limit)
        print(json.dumps(result, indent=1))
        if args.json is not None:
            write_atomically(args.json, json.dumps(result, indent=1) + "\n")
        raise SystemExit(1 if result["crashed"] else 0)
    draw, endings, slowest = random.Random(args.seed), Counter[str](), 0.0
    kept: list[str] = []

    def stop(*_: Any) -> None:
        raise TimeoutError("the load took too long")

    signal.signal(signal.SIGALRM, stop)
    with (
        tempfile.TemporaryDirectory() as folder,
        contextlib.suppress(KeyboardInterrupt),
    ):  # then report the rounds so far
        files, path = samples(Path(folder)), Path(folder) / "changed.mpc"
        for number in tqdm(range(args.rounds), unit="header", mininterval=5):
            forge(path, *changed(draw.choice(files), draw))
            start = time.thread_time()
            signal.setitimer(signal.ITIMER_REAL, 10 * args.limit)  # wall time, on a machine that may be busy
            try:
                outcome = "loaded" if isinstance(load(path), IRModule) else "something else"
            except ArtifactError:
                outcome = "refused"
            except (Exception, SystemExit) as error:
                outcome = type(error).__name__
                kept.append(f"round {number}: {type(error).__name__}: {error}"[:300])
            finally:
                signal.setitimer(signal.ITIMER_REAL, 0)
            slowest = max(slowest, time.thread_time() - start)
            endings[outcome] += 1
    failures = {name: count for name, count in endings.items() if name not in ("loaded", "refused")}
    found = {"rounds": endings.total(), "seed": args.seed, "outcomes": dict(endings), "slowest_s": round(slowest, 3)}
    print(json.dumps({**found, "failures": kept[:20]}, indent=1))
    if args.json is not None:
        write_atomically(args.json, json.dumps({**found, "failures": kept[:20]}, indent=1) + "\n")
    raise SystemExit(1 if failures or slowest > args.limit else 0)


if __name__ == "__main__":
    main()
