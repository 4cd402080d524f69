"""The tables of docs/masks.md, in Markdown, from the JSON files of mask_ladder, mask_speed and permutation.

python -m bench.masks.tables
"""

from __future__ import annotations

import json
from typing import Any

from tabulate import tabulate

from bench.common import RESULTS
from bench.masks.ladder import RUNGS


def markdown(rows: list[list[Any]], head: list[str]) -> str:
    """A Markdown table."""
    return tabulate(rows, headers=head, tablefmt="github", disable_numparse=True)


def ladder(result: dict[str, Any]) -> str:
    """Images classified correctly, and wins and losses against the rung below, by pattern and calibration images."""
    columns = sorted({(row["pattern"], row["images"]) for row in result["rows"] if not row["flips"]})
    found = {(row["pattern"], row["images"], row["rung"]): row for row in result["rows"] if not row["flips"]}
    lines = []
    for rung in RUNGS:
        row = [found.get((*column, rung)) for column in columns]
        if any(row):
            cells = ["" if r is None else f"{r['right']:,}" for r in row]
            paired = ["" if r is None or "wins" not in r else f" (+{r['wins']} -{r['losses']})" for r in row]
            lines.append([rung, *(c + p for c, p in zip(cells, paired, strict=True))])
    title = f"{result['model']}, dense {result['dense']:,} of {result['of']:,}:"
    return f"{title}\n\n{markdown(lines, ['', *(f'{p}, {n} images' for p, n in columns)])}"


def speed(results: list[dict[str, Any]]) -> str:
    """Seconds of each step, memory, and results."""
    lines = []
    for r in results:
        s = {k: f"{v:.0f}" for k, v in r["seconds"].items()}
        steps = [s.get("permutation", ""), s["masks"], s.get("restore, least squares", ""), s.get("restore", "")]
        difference = "" if r["permuted_difference"] is None else f"{r['permuted_difference']:.1e}"
        made = [f"{r['masked']}, {'legal' if r['legal'] else 'ILLEGAL'}", f"-{r['macs_reduction']:.2%}", difference]
        lines.append([r["model"], r["pattern"], *steps, s["total"], f"{r['peak_rss_mib']:,}", *made])
    head = ["model", "pattern", "permutation s", "masks s", "least squares s", "restore s", "in all s", "peak MiB"]
    return markdown(lines, [*head, "masked layers", "MACs", "permuted against dense"])


def permutation(result: dict[str, Any]) -> str:
    """Efficacy of the search, retained magnitude, equality."""
    search = [[r["scores"], r["seed"], f"{r['efficacy']:.1f} %", r["seconds"]] for r in result.get("search", [])]
    kept = [
        [r["model"], r["pattern"], f"{r['retained_before']:.2%}", f"{r['retained_after']:.2%}", r["seconds"]]
        for r in result.get("retained", [])
    ]
    equal = [[r["model"], r["classes"], r["layers"], f"{r['difference']:.1e}"] for r in result.get("equality", [])]
    return "\n\n".join(
        [
            markdown(search, ["64 x 128", "seed", "efficacy", "s"]),
            markdown(kept, ["model", "pattern", "retained as given", "retained permuted", "s"]),
            markdown(equal, ["model", "classes", "layers", "largest relative difference"]),
        ]
    )


def main() -> None:
    """Print all tables."""

    def read(pattern: str) -> list[dict[str, Any]]:
        return [json.loads(path.read_text(encoding="utf-8")) for path in sorted(RESULTS.glob(pattern))]

    parts = [ladder(result) for result in read("mask_ladder_*.json")]
    parts += [speed(read("mask_speed_*.json")), *(permutation(result) for result in read("permutation.json"))]
    print("\n\n".join(parts))


if __name__ == "__main__":
    main()
