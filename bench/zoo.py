"""Which architectures work, from timm, torchvision, transformers and others, and why not, step by step.

    python -m bench.zoo                         # the architectures that are not in bench/results/zoo.json yet
    python -m bench.zoo --only 'transformers:*' # these again
    python -m bench.zoo --page                  # writes docs/models.md from the results

Small configurations with random weights; nothing is downloaded. Every model runs in a process of its own, for at most
``--seconds`` of processor time, at one thread, and is taken through these steps (``bench/architectures/steps.py``):

trace   ``transform`` at 2:4; the outputs equal those of the model with the masked weights
mask    the number of masked layers
merge   tokens merge; where its blocks are one list of modules, the outputs equal the eager reference of the tests
lower   lowered for the reference engine
save    the masked and the lowered module, saved and loaded
pt2     torch.export.save, with torch's operators
onnx    ONNX, run by onnxruntime
train   a step of gradient descent
"""

from __future__ import annotations

import argparse
import fnmatch
import importlib.metadata
import json
import multiprocessing
import os
import signal
import sys
import tempfile
import time
import warnings
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any

from bench.architectures import page
from bench.architectures.registry import builders

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "bench" / "results" / "zoo.json"
PAGE = ROOT / "docs" / "models.md"
_PACKAGES = {
    "timm": "timm",
    "torchvision": "torchvision",
    "transformers": "transformers",
    "open_clip": "open_clip_torch",
    "segmentation_models_pytorch": "segmentation_models_pytorch",
    "monai": "monai",
    "ultralytics": "ultralytics",
    "wrapped": "torch",
}

_SLOWEST = 20  # times the processor time, for a model whose process waits or shares its processor


def examine(name: str, path: Path, seconds: int) -> None:
    """Take one architecture through the steps; after each, write the record to ``path``."""
    import logging
    import resource

    import torch

    from bench.architectures.steps import Trial, call, one_line, seed, settle

    resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds + 5))
    logging.disable(logging.WARNING)
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    start = time.process_time()
    record: dict[str, Any] = {"name": name, "steps": {}}

    def write(**more: Any) -> None:
        record.update(more, seconds=round(time.process_time() - start, 1))
        path.write_text(json.dumps(record))

    seed()
    try:
        model, example = builders()[name]()
        settle(model, example)
        with torch.no_grad():
            call(model, example)
    except Exception as error:
        write(not_built=one_line(error))
        return
    write(parameters=sum(p.numel() for p in model.parameters()))
    with tempfile.TemporaryDirectory() as folder:
        for step, result in Trial(model, example, Path(folder)).results():
            record["steps"][step] = result
            write()
    write(done=True)


def supervised(name: str, seconds: int, context: Any) -> dict[str, Any]:
    """Run :func:`examine` in a process of its own; a step that the process did not survive is noted as its last."""
    from bench.architectures.steps import STEPS

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "record.json"
        process = context.Process(target=examine, args=(name, path, seconds))
        process.start()
        process.join(_SLOWEST * seconds)
        late = process.is_alive() or process.exitcode == -signal.SIGXCPU
        process.kill()
        process.join()
        record = json.loads(path.read_text()) if path.exists() else {"name": name, "steps": {}}
    if not record.pop("done", False) and "not_built" not in record:
        left = [step for step in STEPS if step not in record["steps"]]
        why = f"took more than {seconds} s" if late else f"the process ended with status {process.exitcode}"
        if left and (left[0] == "trace" or record["steps"]["trace"]["ok"]):
            record["steps"][left[0]] = {"ok": False, "refused": False, "why": why}
    return record


def load(path: Path) -> dict[str, Any]:
    """The results so far."""
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {"versions": {}, "models": []}


def save(path: Path, results: dict[str, Any], record: dict[str, Any]) -> None:
    """Enter a record into the results, in the order of the table, and write them."""
    from mpcompile.io.writing import write_atomically

    library = _PACKAGES[record["name"].partition(":")[0]]
    results["versions"] |= {package: importlib.metadata.version(package) for package in {"torch", library}}
    models = {known["name"]: known for known in results["models"]} | {record["name"]: record}
    order = {name: place for place, name in enumerate(builders())}
    results["models"] = sorted((models[name] for name in models if name in order), key=lambda r: order[r["name"]])
    write_atomically(path, json.dumps(results, indent=1) + "\n")


def run(names: Sequence[str], results: Path, jobs: int, seconds: int) -> None:
    """Examine architectures, ``jobs`` at a time, and enter each into the file of results as it ends."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["bench.architectures.preloaded"])
    found = load(results)
    with ThreadPoolExecutor(jobs) as pool:
        futures = [pool.submit(supervised, name, seconds, context) for name in names]
        for number, future in enumerate(as_completed(futures), 1):
            record = future.result()
            save(results, found, record)
            print(f"[{number}/{len(names)}] {page.line(record)}", flush=True)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", metavar="NAME", help="only these (LIBRARY:NAME, or globs), again")
    parser.add_argument("--jobs", type=int, default=2, choices=(1, 2), help="processes at a time (2)")
    parser.add_argument("--seconds", type=int, default=120, help="of processor time for one model (120)")
    parser.add_argument("--page", action="store_true", help="write docs/models.md, and run nothing")
    parser.add_argument("--out", type=Path, default=RESULTS, metavar="FILE", help="(bench/results/zoo.json)")
    args = parser.parse_args(argv)
    if args.page:
        PAGE.write_text(page.render(load(args.out)), encoding="utf-8")
        return 0
    known = {record["name"] for record in load(args.out)["models"]}
    if args.only:
        names = [name for name in builders() if any(fnmatch.fnmatchcase(name, glob) for glob in args.only)]
        if not names:
            parser.error(f"no architecture is called {' or '.join(args.only)}; such as {next(iter(builders()))}")
    else:
        names = [name for name in builders() if name not in known]
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    run(names, args.out, args.jobs, args.seconds)
    return 0


if __name__ == "__main__":
    sys.exit(main())
