"""Which split and which router miss least: a comparison on one sparse model, layer by layer, without the task.

    python examples/frontier/sentiment.py work --only sparse
    python examples/frontier/routers.py work/sentiment/0/sparse work/routers.json

For every choice the layers are split and the routers fitted; then, on held-out tokens, every layer runs the same share
of its experts, and what it misses is measured: the part of the squared norms of all experts' outputs that the skipped
ones have, mean over tokens and layers. The oracle selects by the true norms.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import sentiment
import torch
from torch import Tensor

import surgeon
from surgeon.graph.traced import fork
from surgeon.moe.module import MoE
from surgeon.moe.router import expert_norms
from surgeon.moe.site import find_moes
from surgeon.passes import Moeify
from surgeon.training.loop import RunSettings
from surgeon.training.observe import collect

SHARES = (0.05, 0.1, 0.2)
TRAINED: dict[str, Any] = {"router": "trained", "epochs": 1.0}
NEURONS: dict[str, Any] = {"router": "neurons", "epochs": 0}
CHOICES: dict[str, dict[str, Any]] = {
    "split of weights, published router": {"split": "weights", "objective": "norm", **TRAINED},
    "split at random, published router": {"split": "random", "objective": "norm", **TRAINED},
    "split by activations, published router": {"objective": "norm", **TRAINED},
    "the same, relative norms": {"objective": "relative", **TRAINED},
    "the same, logarithms": {"objective": "log", **TRAINED},
    "the same, relative, too low counts 4x": {"objective": "relative", "underestimate": 4.0, **TRAINED},
    "closed form, no training": {"objective": "relative", **NEURONS},
    "closed form, width 32": {"objective": "relative", "router_width": 32, **NEURONS},
    "closed form, width 128": {"objective": "relative", "router_width": 128, **NEURONS},
    "closed form, then trained": {"objective": "relative", **NEURONS, "epochs": 1.0},
    "the same, on the sparse model's inputs": {"objective": "relative", **NEURONS, "epochs": 1.0, "exposure": 0.15},
}  # fmt: skip


def missed(scores: Tensor, norms: Tensor, share: float) -> float:
    """What is missed [0, 1] at the tau at which `share` of the experts run; scores and norms [N, E]."""
    relative = scores / scores.amax(-1, keepdim=True).clamp_min(1e-9)
    tau = relative.flatten().kthvalue(max(1, int((1 - share) * relative.numel()))).values
    skipped = (norms * (relative < tau)).square().sum(-1)
    return float((skipped / norms.square().sum(-1).clamp_min(1e-12)).mean())


def measure(graph: surgeon.TracedGraph, held: Any) -> dict[str, list[float]]:
    """Mean over layers, at every share, of the layer's own router and of the oracle."""
    sites = find_moes(graph)
    values = collect(graph, [str(site.nodes[0].args[0]) for site in sites], held, tokens=16384)
    found: dict[str, list[list[float]]] = {"own": [], "oracle": []}
    with torch.no_grad():
        for site in sites:
            x = values[str(site.nodes[0].args[0])]
            moe = graph.get_submodule(site.path)
            assert isinstance(moe, MoE)
            norms = expert_norms(x, site.routed, site.activation)
            found["own"].append([missed(moe.router(x), norms, share) for share in SHARES])
            found["oracle"].append([missed(norms, norms, share) for share in SHARES])
    return {name: torch.tensor(rows).mean(0).tolist() for name, rows in found.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("surgery", type=Path, help="a sparse model: the study's variant of that name")
    parser.add_argument("out", type=Path, help="where the numbers go, .json")
    args = parser.parse_args()
    sparse = surgeon.load(args.surgery)
    results: dict[str, Any] = json.loads(args.out.read_text()) if args.out.is_file() else {}
    for name, options in CHOICES.items():
        if name not in results:
            data, started = sentiment.data(0), time.monotonic()
            graph = fork(sparse)
            report = Moeify(experts=48, **options).apply(graph, data=data, settings=RunSettings(seed=0))
            results[name] = measure(graph, SimpleNamespace(train=data.eval)) | {
                "router": report.sites[0].after, "seconds": round(time.monotonic() - started, 1)
            }  # fmt: skip
            args.out.write_text(json.dumps(results, indent=1))
        row = results[name]
        print(f"{name:42}", *(f"{a:.3f} ({b:.3f})" for a, b in zip(row["own"], row["oracle"], strict=True)), flush=True)


if __name__ == "__main__":
    main()
