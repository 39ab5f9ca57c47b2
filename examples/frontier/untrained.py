"""Routes without training at equal cost, on digits: how far outputs move from the dense model's, in nats.

Accuracy on 360 images hardly tells such routes apart; the divergence on all images that were not looked at does.

python examples/frontier/untrained.py work work/untrained.json --seeds 0 1 2
python examples/frontier/untrained.py work work/untrained_gated.json --seeds 0 1 2 --gated
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import digits
import torch
import torch.nn.functional as F
from study import Run
from torch import Tensor, nn
from variants import recipe

import surgeon
from surgeon.data.batch import Batch
from surgeon.data.data import Data
from surgeon.jobs import demo
from surgeon.measure.read_off import place
from surgeon.measure.sweep import sweep
from surgeon.passes import Lower, Pass
from surgeon.surgery.pipeline import Pipeline

CALIBRATION, BATCH = 512, 64
COSTS = (0.3, 0.4, 0.5, 0.6, 0.7, 0.8)
TAUS = (0.02, 0.05, 0.1, 0.17, 0.25, 0.35, 0.5, 0.7)
TOP_K = (0.0, 0.15, 0.3, 0.45, 0.6, 0.7, 0.79, 0.86, 0.93)
ROUTES: dict[str, tuple[list[Pass[Any]], tuple[float, ...]]] = {
    "CMoE": (recipe("cmoe"), TOP_K),
    "CMoE, experts of 8 neurons, 6 of them shared": (recipe("cmoe", expert_size=8, experts=None, shared=6), TOP_K),
    "ours": ([digits.ffn(epochs=0), Lower()], TAUS),
    "ours, routers of width 16": ([digits.ffn(epochs=0, router_width=16), Lower()], TAUS),
}


class Gated(nn.Module):
    """llama's form of a feed-forward layer: [..., d] → [..., d]."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.gate, self.up = (nn.Linear(width, hidden, bias=False) for _ in range(2))
        self.dropout, self.down = nn.Dropout(0.1), nn.Linear(hidden, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.dropout(F.silu(self.gate(x)) * self.up(x)))  # type: ignore[no-any-return]


def gated(seed: int) -> nn.Module:
    model = demo.DigitsViT()
    for block in model.blocks:
        block.mlp = Gated(64, 192)
    return model


def parts(seed: int) -> tuple[Data, list[Batch]]:
    """The images to calibrate on, and all others."""
    data = demo.digits(seed)
    assert data.eval is not None
    trained = [Batch.from_any(item) for item in data.train]
    held_out = [Batch.from_any(item) for item in data.eval]
    images = torch.cat([batch.args[0] for batch in trained])
    seen = [Batch((x,), {}) for x in images[:CALIBRATION].split(BATCH)]
    others = torch.cat([images[CALIBRATION:], *(batch.args[0] for batch in held_out)])
    return Data(seen), [Batch((x,), {}) for x in others.split(BATCH)]


def curves(model: nn.Module, seed: int) -> dict[str, list[tuple[float, float]]]:
    """For every route points of (cost of the layers, KL divergence from the dense model)."""
    data, others = parts(seed)
    inputs, found = others[0].args, {}
    dense = surgeon.trace(model, inputs).eval()
    for name, (passes, taus) in ROUTES.items():
        graph = Pipeline(passes).run(model, inputs=inputs, data=data, seed=seed).graph.eval()
        for label, again in ((name, False), (f"{name}, compensated", True)):
            points = []
            for tau in taus:
                surgeon.set_tau(graph, tau)
                if again:
                    surgeon.compensate(graph, data.train)
                (point,) = sweep(graph, others, None, [None], inputs=inputs, dense=dense)
                points.append((point.layers, point.agreement[1].value))
            found[label] = sorted(points)
        print(f"seed {seed}: {name}", flush=True)
    return found


def at(points: Sequence[tuple[float, float]], cost: float) -> float | None:
    """The divergence at a cost, on the line between the logarithms of its neighbours."""
    where = place([x for x, _ in points], cost)
    if where is None:
        return None
    low, high, share = where
    values = [math.log(max(points[index][1], 1e-9)) for index in (low, high)]
    return math.exp((1 - share) * values[0] + share * values[1])


def table(seeds: dict[str, Any]) -> str:
    """Geometric means over the seeds, as Markdown."""
    lines = ["| cost of the layers | " + " | ".join(f"{cost:.0%}" for cost in COSTS) + " |"]
    lines.append("| --- " * (1 + len(COSTS)) + "|")
    for name in next(iter(seeds.values())):
        cells = []
        for cost in COSTS:
            values = [at(found[name], cost) for found in seeds.values()]
            known = [value for value in values if value is not None]
            cells.append(f"{statistics.geometric_mean(known):.4f}" if len(known) == len(values) else "—")
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", type=Path, help="the work directory of digits.py: dense models there are used")
    parser.add_argument("out", type=Path)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--gated", action="store_true")
    args = parser.parse_args()
    study = replace(digits.STUDY, name="digits_gated", model=gated) if args.gated else digits.STUDY
    seeds = {}
    for seed in args.seeds:
        run = Run(study, seed, args.work / study.name / str(seed))
        seeds[str(seed)] = curves(run.dense_model(), seed)
        run.screen.close()
    args.out.write_text(json.dumps({"curves": seeds}, indent=1))
    print(table(seeds))


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
