"""From the result files of the studies: a plot for each, and the table of what it costs to keep the dense quality.

python examples/frontier/report.py results
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from surgeon.data.quality import Quality
from surgeon.measure.compare import Comparison
from surgeon.measure.curves import Curve
from surgeon.measure.read_off import Kept, kept_at
from surgeon.measure.sweep import Dense, Point
from surgeon.render.frontier_plot import draw_frontier

NAMES = {
    "moefication": "MoEfication",
    "d2dmoe": "D2DMoE as published",
    "d2dmoe_attention": "D2DMoE, attention too",
    "ours": "ours",
    "ours_attention": "ours, attention too",
    "untrained": "ours, no training",
    "cmoe": "CMoE, no training",
    "cmoe_tuned": "CMoE with more shared experts, no training",
    "early_exit": "ZTW, early exits",
    "halting": "A-ViT, tokens halt",
    "halting_early": "A-ViT, earlier",
    "moefication_tuned": "MoEfication, tuned",
    "d2dmoe_tuned": "D2DMoE, tuned",
    "ours_tuned": "ours, tuned",
    "ours_inputs_tuned": "ours, tuned, inputs skipped too",
    "ours_inputs": "ours, inputs skipped too",
    "ours_rotated": "ours, inputs skipped too, stream turned",
    "teal": "TEAL, FFNs",
    "wina": "WINA, FFNs",
    "inputs": "inputs refitted, FFNs",
    "teal_whole": "TEAL",
    "wina_whole": "WINA",
    "inputs_whole": "inputs refitted",
    "rotated": "stream turned, inputs refitted, FFNs",
    "rotated_whole": "stream turned, inputs refitted",
}


def cells(results: dict[str, Any], variant: str, curve: str, reference: str) -> list[str]:
    """What the converted layers and the whole model cost where the quality of a dense model is kept."""
    found, seeds = [], [one for one in results["seeds"].values() if variant in one and reference in one]
    for cost in ("layers", "relative"):
        values = []
        for one in seeds:
            dense = one[reference]
            points = one[variant]["curves"][curve]
            costs, qualities = [point[cost] for point in points], [point["quality"] for point in points]
            wanted = dense["value"] * results["keep"]
            values.append(kept_at(costs, qualities, wanted, higher_is_better=dense["higher_is_better"]))
        found.append(percent(values))
    return found


def percent(values: Sequence[Kept | None]) -> str:
    """Mean and spread over the seeds."""
    reached = [value for value in values if value is not None]
    if not reached:
        return "not reached"
    shares = [100 * value.share for value in reached]
    spread = f" ± {statistics.stdev(shares):.1f}" if len(shares) > 1 else ""
    mean = f"{'≤ ' * any(value.at_most for value in reached)}{statistics.fmean(shares):.1f}%{spread}"
    return mean if len(reached) == len(values) else f"{mean}, by {len(reached)} of {len(values)}"


def table(results: dict[str, Any]) -> str:
    """As Markdown."""
    seeds = list(results["seeds"].values())
    references = [name for name in ("dense", "longer") if any(name in found for found in seeds)]
    quality = {name: _mean([found[name]["value"] for found in seeds if name in found]) for name in references}
    name, keep = seeds[0]["dense"]["name"], f"{100 * results['keep']:.0f}%"
    lines = [f"## {results['study']}", "", f"Dense {name} {quality['dense']}"]
    head = [f"converted layers at {keep} of dense", "whole model"]
    if "longer" in references:
        lines[-1] += f"; trained as much again {quality['longer']}"
        head += [f"converted layers at {keep} of dense trained as much again", "whole model"]
    lines[-1] += f"; {len(seeds)} seed{'s' * (len(seeds) > 1)}, {seeds[0]['dense']['items']:,} held-out items each."
    lines += ["", "| | selection | " + " | ".join(head) + " |", "| --- " * (2 + len(head)) + "|"]
    selections = {"uniform": "one tau", "tuned": "a tau for each layer", "oracle": "one tau, oracle router"}
    for variant, found in seeds[0].items():
        if variant in ("dense", "longer"):
            continue
        measured = sum(variant in one for one in seeds)
        fewer = "" if measured == len(seeds) else f" ({measured} seed{'s' * (measured > 1)})"
        for curve in found["curves"]:
            row = [cell for reference in references for cell in cells(results, variant, curve, reference)]
            lines.append(f"| {NAMES.get(variant, variant)}{fewer} | {selections[curve]} | " + " | ".join(row) + " |")
    return "\n".join(lines)


def divergence_table(results: dict[str, Any]) -> str:
    """As Markdown: how far what trains nothing is from the dense model at equal cost. Empty if it was not measured."""
    tables = []
    for cost, what, suffix, shares in (
        ("layers", "feed-forward layers", "", (0.15, 0.2, 0.25, 0.4)),
        ("relative", "whole model", "_whole", (0.4, 0.45, 0.5, 0.58)),
    ):
        rows = []
        for name in ("teal", "wina", "inputs"):
            runs = [
                curve
                for found in results["seeds"].values()
                for curve in found.get(name + suffix, {"curves": {}})["curves"].values()
                if all("divergence" in point for point in curve)
            ]
            if runs:
                cells = [_divergence([_at(run, cost, share) for run in runs]) for share in shares]
                rows.append(f"| {NAMES[name + suffix]} | " + " | ".join(cells) + " |")
        if rows:
            head = " | ".join(f"{share:.0%}" for share in shares)
            title = f"| KL divergence from dense at a share of the {what} | {head} |"
            tables.append("\n".join([title, "| --- " * 5 + "|", *rows]))
    return "".join(f"\n\n{one}" for one in tables)


def _at(points: Sequence[dict[str, Any]], cost: str, share: float) -> float | None:
    """The logarithm of the divergence at a cost, between two points; None outside."""
    ordered = sorted((point[cost], math.log(point["divergence"])) for point in points)
    for (low, below), (high, above) in pairwise(ordered):
        if low <= share <= high:
            return below + (above - below) * (share - low) / max(high - low, 1e-9)
    return None


def _divergence(values: Sequence[float | None]) -> str:
    """The geometric mean over the seeds."""
    known = [value for value in values if value is not None]
    return f"{math.exp(statistics.fmean(known)):.4f}" if len(known) == len(values) else ""


def plot(results: dict[str, Any], file: Path) -> None:
    """Quality against cost: the mean over the seeds at each setting, and their range.

    With one tau for all layers, or where there is no such curve with a tau for each layer.
    """
    seeds = list(results["seeds"].values())
    dense = [found["dense"] for found in seeds]
    made = []
    for variant in NAMES:
        for curve, router in (("uniform", "own"), ("oracle", "oracle")):
            curves = [found[variant]["curves"] for found in seeds if variant in found]
            runs = [one.get(curve) or (one.get("tuned") if curve == "uniform" else None) for one in curves]
            # The oracle is shown for what it is to be compared with.
            if runs and all(runs) and (curve == "uniform" or variant.startswith("ours")):
                points = tuple(_mean_point(same, dense[0], router) for same in zip(*runs, strict=True))
                made.append(Curve(NAMES[variant], "", router, points))  # type: ignore[arg-type]
    mean = _quality([one["value"] for one in dense], dense[0])
    found = Comparison(
        results["task"], results["keep"], results["keep"] * mean.value, Dense(None, mean), tuple(made), {}
    )
    many = f"mean of {len(seeds)} seeds" if len(seeds) > 1 else "one seed"
    what = "tokens" if "token" in mean.name else "samples"
    draw_frontier(
        found, file, title=f"{results['study']}, {many}", spread="range of the seeds",
        measured=f"{mean.items:,} held-out {what}",
    )  # fmt: skip


def _mean_point(same: Sequence[dict[str, Any]], dense: dict[str, Any], router: str) -> Point:
    """One setting over the seeds."""
    costs = {cost: statistics.fmean(point[cost] for point in same) for cost in ("executed", "layers", "relative")}
    quality = _quality([point["quality"] for point in same], dense)
    tau = None if "taus" in same[0] else same[0]["tau"]
    return Point(tau, quality, costs["executed"], costs["layers"], 0, costs["relative"], router=router)  # type: ignore[arg-type]


def _quality(values: Sequence[float], dense: dict[str, Any]) -> Quality:
    """The mean over the seeds, and their range where an interval stands."""
    low, high = (min(values), max(values)) if len(values) > 1 else (None, None)
    name, higher = dense["name"], dense["higher_is_better"]
    return Quality(name, statistics.fmean(values), higher, dense["items"], "samples", dense["items"], low, high)


def _mean(values: Sequence[float]) -> str:
    spread = f" ± {statistics.stdev(values):.4f}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):.4f}{spread}"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path, help="the directory with the result files of the studies")
    parser.add_argument(
        "--keep", type=float, help="share of the dense quality to keep; tables only  [default: a study's]"
    )
    args = parser.parse_args()
    for path in sorted(args.results.glob("*.json")):
        content = json.loads(path.read_text())
        if "seeds" not in content:
            continue
        if args.keep is not None:
            content["keep"] = args.keep
        elif set(NAMES) & set(next(iter(content["seeds"].values()))) - {"ours"}:
            plot(content, path.with_suffix(".png"))
        print(table(content) + divergence_table(content), end="\n\n")
