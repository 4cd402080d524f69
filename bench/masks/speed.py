"""Time, memory and legality of the mask steps on full-size models with random weights.

    python -m bench.masks.speed --model vit_base_patch16_224 --pattern 2:4 --threads 2
    python -m bench.masks.speed --pattern 8:16 --score obs --no-permute --images 64 --reconstruct 8 --epochs 2

Each model is pruned by :func:`mpcompile.transform`; time is split into the permutation search, the masks, the refit
(with least squares listed separately), the reconstruction with ``--reconstruct VIEWS``, and the rest (forward passes
and statistics). Accuracy is meaningless here.
"""

from __future__ import annotations

import argparse
import contextlib
import resource
import time
from collections import defaultdict
from collections.abc import Iterator
from typing import Any

import timm
import torch
from torch import nn

from bench.common import environment, save
from mpcompile import Config, Reconstruction, transform
from mpcompile.artifact.verify import verify
from mpcompile.passes import permute
from mpcompile.passes.reconstruct import decide
from mpcompile.pruning import project, refit


@contextlib.contextmanager
def clocks() -> Iterator[dict[str, float]]:
    """Seconds spent in each step."""
    spent: dict[str, float] = defaultdict(float)

    def timed(name: str, function: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            start = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                spent[name] += time.perf_counter() - start

        return call

    places: list[tuple[Any, str, str]] = [
        (permute, "search", "permutation"),
        (project, "choose", "masks"),
        (project, "restore", "restore"),
        (refit, "least_squares", "restore, least squares"),
        (decide, "run", "reconstruction"),
    ]
    kept = [getattr(module, name) for module, name, _ in places]
    for (module, name, label), function in zip(places, kept, strict=True):
        setattr(module, name, timed(label, function))
    try:
        yield spent
    finally:
        for (module, name, _), function in zip(places, kept, strict=True):
            setattr(module, name, function)


def shaken(name: str) -> nn.Module:
    """A timm model with non-trivial normalisation parameters and statistics."""
    torch.manual_seed(0)
    model = timm.create_model(name)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            assert module.running_mean is not None and module.running_var is not None
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.5, 1.5)
            nn.init.uniform_(module.weight, 0.5, 1.5)
    return model.eval()


def main() -> None:
    """Measure, print, and write the JSON file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="vit_base_patch16_224")
    parser.add_argument("--pattern", default="2:4")
    parser.add_argument("--score", default="covariance")
    parser.add_argument("--images", type=int, default=32)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--reconstruct", type=int, metavar="VIEWS", help="reconstruct from so many views of the images")
    parser.add_argument("--epochs", type=int, default=2, help="epochs per region of the reconstruction")
    parser.add_argument("--no-permute", action="store_true")
    parser.add_argument("--no-restore", action="store_true")
    parser.add_argument("--name", help="name of the JSON file in bench/results")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    model = shaken(args.model)
    data = list(torch.randn(args.images, 3, 224, 224, generator=torch.Generator().manual_seed(0)).split(args.batch))
    config = Config(args.pattern, score=args.score, permute=not args.no_permute, restore=not args.no_restore)
    start, cpu = time.perf_counter(), time.process_time()
    options = None if args.reconstruct is None else Reconstruction(views=args.reconstruct, epochs=args.epochs)
    with clocks() as spent:
        gm = transform(model, data[0][:1], config, data, reconstruction=options)
    total, cpu = time.perf_counter() - start, time.process_time() - cpu
    found = verify(gm)
    result = {
        **vars(args),
        "seconds": {**{k: round(v, 1) for k, v in spent.items()}, "total": round(total, 1), "cpu": round(cpu, 1)},
        "peak_rss_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024,
        "masked": len(gm.plan.masked),
        "legal": found.ok,
        "tensorrt": sum(v.tensorrt for v in found.verdicts.values()),
        "macs_reduction": round(gm.plan.macs.reduction, 4),
        "passes": {record.name: record.summary for record in gm.plan.passes},
        "permuted_difference": next(r.decision.get("difference") for r in gm.plan.passes if r.name == "permute"),
        "environment": environment(),
    }
    print(result)
    save(args.name or f"mask_speed_{args.model}_{args.pattern.replace(':', 'of')}", result)


if __name__ == "__main__":
    main()
