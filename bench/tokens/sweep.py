"""Token merging on every timm architecture with an attention layer: supported, refused (and why), or failed.

    python -m bench.tokens.sweep --shard 0/8 --seconds 450     # resumes where it stopped; then the other shards
    python -m bench.tokens.sweep --report                      # the table in docs/

Each architecture is built at depth 2 for images of 8 x 8 patches if its family accepts a depth and a size, else at its
own depth and size; first on the meta device. Eight tokens are merged per block. Models that symbolic tracing cannot
handle are exported first. An architecture counts as

supported   if it is transformed, and its output with random weights equals that of the eager reference in
            tests/support/merging_reference.py within a relative RMS of 1e-4 and a tenth of what merging changes;
refused     if mpcompile raises one of its errors, which gives the reason;
failed      otherwise: another exception, or another output.

Results go into tome_sweep.json, one record per name, and docs/token_merging_models.md.
"""

from __future__ import annotations

import argparse
import collections
import gc
import inspect
import itertools
import re
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import timm
import torch
from tabulate import tabulate
from torch import nn

from mpcompile import Config, MPCompileError, Pipeline, transform
from mpcompile.errors import TraceError
from mpcompile.ir.module import IRModule
from mpcompile.kernels import ops
from mpcompile.passes.merge_tokens.insert import MergeTokens

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from bench import common  # noqa: E402
from tests.support import helpers, merging_reference  # noqa: E402
from tests.support.tokens import full_size_reference  # noqa: E402

NAME = "tome_sweep"
DOC = ROOT / "docs" / "token_merging_models.md"
R = 8
TOLERANCE = 1e-4
ATTENTION = re.compile(r"attention|attn|mla$|[mhsp]sa$", re.IGNORECASE)  # class names
# Families for which the reference drops the merged tokens; the others are compared with one that keeps all tokens.
SHRINKING = (
    *("Cait", "Eva", "Gemma4VitClassifier", "NaFlexVit", "Twins"),
    *("VisionTransformer", "VisionTransformerDistilled"),
)
# Families with stages or branches: the arguments for two blocks in each, and a size of images if it is not 128.
STAGES: dict[str, dict[str, Any]] = {
    **{family: {"depth": (2, 2, 2)} for family in ("Levit", "LevitDistilled", "PoolingVisionTransformer", "Visformer")},
    **{family: {"depths": (2, 2, 2, 2)} for family in ("MetaFormer", "MaxxVit", "Twins")},
    "VOLO": {"layers": (1, 2, 2, 2)},
    "CrossVit": {"depth": ((1, 2, 0),), "img_size": 120},
}
SMALL = 8  # patches per side of the images whose outputs are compared


def build(name: str, **kwargs: Any) -> tuple[nn.Module, dict[str, Any]]:
    """An architecture, at depth 2 if its family accepts a depth, and the arguments with which it was created."""
    grouped = {"depth": 2, "num_heads": 8, "num_kv_heads": (8, 4)}  # for families that name heads block by block
    for extra in ({"depth": 2, **kwargs}, {"depth": 2}, {**grouped, **kwargs}):
        try:
            return timm.create_model(name, **extra).eval(), extra
        except Exception:  # families reject a depth or a size with different exceptions
            continue
    return timm.create_model(name).eval(), {}


def shallow(name: str, family: str) -> tuple[nn.Module, dict[str, Any]]:
    """An architecture with stages, two blocks deep in each, on small images if its family accepts a size."""
    for extra in ({"img_size": 128, **STAGES[family]}, STAGES[family]):
        try:
            return timm.create_model(name, **extra).eval(), extra
        except Exception:
            continue
    return timm.create_model(name).eval(), {}


def architectures() -> list[str]:
    """All names, alternating between timm's modules, so that a sweep that stops early has covered every family."""
    turns = [timm.list_models(module=module) for module in timm.list_modules()]
    return [name for turn in itertools.zip_longest(*turns) for name in turn if name is not None]


def attention_layers(model: nn.Module) -> list[str]:
    """The classes of attention layers in a model."""
    names = {type(module).__name__ for module in model.modules()}
    return sorted(name for name in names if ATTENTION.search(name.replace("Flatten", "")))


def merge(model: nn.Module, images: torch.Tensor) -> tuple[IRModule, str]:
    """The transformed model, and the way it was traced."""
    config, pipeline = Config(pattern="dense", tome_r=R, tome_method="tome"), Pipeline([MergeTokens()])
    try:
        return transform(model, images, config, pipeline=pipeline), "symbolic"
    except TraceError:
        try:
            exported = torch.export.export(model, (images,)).module(check_guards=False)
        except Exception as error:
            text = str(error).strip().splitlines()
            raise TraceError(f"neither traced nor exported: {text[0] if text else type(error).__name__}") from error
        return transform(exported, None, config, pipeline=pipeline), "export"


def blocks(model: nn.Module) -> list[nn.Module]:
    """The modules that may add attention to their input."""
    return [m for m in model.modules() if any(ATTENTION.search(type(child).__name__) for child in m.children())]


def reference(model: nn.Module, images: torch.Tensor, gm: IRModule) -> torch.Tensor:
    """The output of the eager reference that knows the model's layout: without its tokens, or on all of them."""
    decision = gm.plan.passes[-1].decision
    streams = decision.get("streams") or [decision]
    stream_of = {site: number for number, stream in enumerate(streams) for site in stream["sites"]}
    found = list(getattr(model, "blocks", []))
    if not found or isinstance(found[0], (nn.ModuleList, nn.Sequential)):  # stages of blocks
        found = blocks(model)
    spread = any(node.target is ops.token_spread for node in gm.graph.nodes)
    if len(streams) == 1 and type(model).__name__ in SHRINKING and not spread:
        last = found[-len(decision["sites"]) :]  # earlier ones attend within windows
        return merging_reference.forward(model, images, R, decision["prefix"], last)
    order = [stream_of[node.name] for node in gm.graph.nodes if node.name in stream_of]
    prefixes = [stream["prefix"] for stream in streams]
    return full_size_reference.forward(model, images, R, order, prefixes, blocks(model))


def small_side(model: nn.Module) -> int:
    """The side, in pixels, of an image of about ``SMALL`` x ``SMALL`` tokens."""
    modules = list(model.modules())
    embeds = [m for m in modules if getattr(m, "img_size", None) and getattr(m, "grid_size", None)]
    sizes = [m.patch_size for m in modules if hasattr(m, "patch_size")]
    if embeds:  # pixels per token, including the convolutions in front
        patch = embeds[0].img_size[0] // embeds[0].grid_size[0]
    else:
        patch = sizes[0] if sizes else 16
        patch = patch[0] if isinstance(patch, (tuple, list)) else patch
    pooled = next((m.pooling_kernel_size for m in modules if hasattr(m, "pooling_kernel_size")), 1)
    return int(patch * -(-SMALL // pooled) * pooled)


def compare(name: str, model: nn.Module) -> dict[str, Any]:
    """Transform an architecture, given on the meta device, with weights on small images; compare with the reference."""
    side = small_side(model)
    torch.manual_seed(0)
    family = type(model).__name__
    model, used = shallow(name, family) if family in STAGES else build(name, img_size=side)
    deep = not used.keys() - {"img_size"}
    size = used["img_size"] if "img_size" in used else model.default_cfg["input_size"][-1]
    if family != "MetaFormer":  # its squared activations make a deep model with such weights chaotic
        helpers.randomise(model)
    for key, parameter in model.named_parameters():
        if re.search("bias_table|attention_biases", key):  # zero, or nearly so, in a new model
            nn.init.normal_(parameter)
    model = model.double() if deep else model  # rounding in a deep model would choose other pairs
    images = torch.randn(2, 3, size, size, dtype=torch.float64 if deep else torch.float32)
    gm, traced = merge(model, images)
    decision = gm.plan.passes[-1].decision
    with torch.no_grad():
        for attempt in itertools.count():
            try:
                expected = reference(model, images, gm)
                break
            except merging_reference.Undecided:
                if attempt == 20:
                    raise
                images = torch.randn_like(images)
        error = common.relative_rms(gm(images), expected)
        change = common.relative_rms(model(images), expected)
    streams = decision.get("streams") or [decision]
    prefix, tokens = ([stream[key] for stream in streams] for key in ("prefix", "tokens"))
    facts = {"traced": traced, "prefix": prefix, "tokens": tokens} if len(streams) > 1 else {}
    facts = facts or {"traced": traced, "prefix": prefix[0], "tokens": tokens[0]}
    return {"relative_rms": error, "change": change, "size": size, **facts}


def examine(name: str) -> dict[str, Any]:
    """The record of one architecture."""
    start = time.perf_counter()
    record: dict[str, Any] = {"name": name}
    try:
        with torch.device("meta"):
            model, kwargs = build(name)
        record |= {"family": type(model).__name__, "kwargs": kwargs, "attention": attention_layers(model)}
        if not record["attention"]:
            return {**record, "outcome": "no attention"}
        if not kwargs or record["family"] in STAGES:
            merge(model, torch.empty(2, *model.default_cfg["input_size"], device="meta"))
        record |= compare(name, model)
        equal = record["relative_rms"] < min(TOLERANCE, record["change"] / 10)
        record |= {"outcome": "supported"} if equal else {"outcome": "failed", "reason": "differs from the reference"}
    except MPCompileError as error:
        record |= {"outcome": "refused", "reason": str(error)}
    except Exception as error:
        record |= {"outcome": "failed", "reason": f"{type(error).__name__}: {error}"[:400]}
    return {**record, "seconds": round(time.perf_counter() - start, 1)}


def load(folder: Path) -> dict[str, dict[str, Any]]:
    """Records of all shards, by name."""
    records = {}
    for path in sorted(folder.glob(f"{NAME}*.json")):
        records |= {r["name"]: r for r in (common.load(path.stem, folder) or {"records": []})["records"]}
    return records


def sweep(args: argparse.Namespace) -> None:
    """Examine the remaining architectures of this shard, for at most ``args.seconds``."""
    number, of = map(int, args.shard.split("/"))
    stem = f"{NAME}-{number}of{of}"
    names = args.models or architectures()[number::of]
    records = (common.load(stem, args.out) or {"records": []})["records"]
    known = load(args.out)
    deadline = time.monotonic() + args.seconds
    for name in names:
        if name in known and not args.models:
            continue
        if time.monotonic() > deadline:
            print("out of time; run it again to continue")
            return
        record = examine(name)
        print(name, record["outcome"], record.get("reason", "")[:160], record.get("seconds", ""), flush=True)
        records = [r for r in records if r["name"] != name] + [record]
        common.save(stem, {"records": records}, args.out)
        gc.collect()
    print("done")


def short(reason: str) -> str:
    """A reason without the parts that differ from variant to variant."""
    reason = re.sub(r"^[\w.]+: ", "", reason)
    reason = reason.split(". Use ")[0].split("; expected")[0]
    return re.sub(r"\(\d[\d, ]*\)", "(...)", reason)


def why(record: dict[str, Any]) -> str:
    """The reason of a record, as the table shows it."""
    text = record.get("reason", "")
    found = re.search(r"no attention block to merge in.*?, found (.*?)(\. Use|$)", text)
    return short(found.group(1) if found else text).replace("|", "/")


def reasons(records: list[dict[str, Any]]) -> str:
    """The table of what each reason to refuse costs."""
    families: dict[str, collections.Counter[str]] = collections.defaultdict(collections.Counter)
    for record in records:
        if record["outcome"] == "refused":
            families[why(record)][record.get("family", "?")] += 1
    order = sorted(families.items(), key=lambda item: -item[1].total())
    return tabulate(
        [[why, of.total(), ", ".join(f"{name} {n}" for name, n in of.most_common())] for why, of in order],
        headers=["refused because", "architectures", "of"],
        tablefmt="github",
    )


def report(args: argparse.Namespace) -> int:
    """Collect the shards into one file and write the table; return 1 if an architecture failed."""
    records = load(args.out)
    missing = [name for name in timm.list_models() if name not in records]
    common.save(NAME, {"timm": timm.__version__, "records": [records[n] for n in sorted(records)]}, args.out)
    with_attention = [r for r in records.values() if r["outcome"] != "no attention"]
    counts = collections.Counter(r["outcome"] for r in with_attention)
    rows: dict[tuple[str, str, str], list[str]] = collections.defaultdict(list)
    for record in sorted(with_attention, key=lambda r: r["name"]):
        rows[record["outcome"], record.get("family", "?"), why(record)].append(record["name"])
    order = sorted(rows.items(), key=lambda item: (("supported", "refused", "failed").index(item[0][0]), item[0][1:]))
    table = tabulate(
        [
            [f"`{family}`", len(n), outcome, reason, ", ".join(n[:3]) + (", ..." if len(n) > 3 else "")]
            for (outcome, family, reason), n in order
        ],
        headers=["timm class", "architectures", "merging", "why not", "such as"],
        tablefmt="github",
    )
    head = HEAD
    line = f"timm {timm.__version__}: {len(with_attention)} architectures with an attention layer, " + ", ".join(
        f"{counts[outcome]} {outcome}" for outcome in ("supported", "refused", "failed")
    )
    line += f", {len(missing)} of timm's names not examined" if missing else ""
    DOC.parent.mkdir(exist_ok=True)
    DOC.write_text(f"{head}{MARK}\n\n{line}.\n\n{reasons(with_attention)}\n\n{table}\n", encoding="utf-8")
    print(line)
    for record in with_attention:
        if record["outcome"] == "failed":
            print("failed:", record["name"], record["reason"])
    return 1 if counts["failed"] or missing else 0


MARK = "<!-- written by python -m bench.tokens.sweep --report -->"
HEAD = f"""# Which timm models can merge tokens

{
    inspect.cleandoc('''
Every architecture of timm with an attention layer was built (two blocks deep if its family accepts a depth), traced,
and transformed with `Config(pattern="dense", tome_r=8)`. "Supported" means more than that it ran: with random weights,
its output equals that of an independent eager reference, which shares no code with the pass. The relative RMS
difference is below 1e-4, and below a tenth of the change that merging makes. "Refused" means that an error named the
layer and the reason before anything was changed. Families with stages were transformed at their own depth and size too,
and compared with two blocks in each stage where the family accepts that. Models with windows are refused because a
merged token has no place in a window.
''')
}

"""


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shard", default="0/1", metavar="I/N", help="every N-th architecture, starting at number I")
    parser.add_argument(
        "--seconds", type=float, default=1e9, help="stop after the architecture in progress at that time"
    )
    parser.add_argument("--models", nargs="+", metavar="NAME", help="examine only these, again")
    parser.add_argument("--report", action="store_true", help="collect the shards and write the table")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=common.RESULTS, metavar="FOLDER", help="(bench/results)")
    args = parser.parse_args(argv)
    warnings.filterwarnings("ignore")
    torch.set_num_threads(args.threads)
    if args.report:
        return report(args)
    sweep(args)
    return 0


if __name__ == "__main__":
    sys.exit(main())
