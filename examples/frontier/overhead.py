"""What deciding costs: router and selection beside the dense layer, in multiply-adds and in time, in one run.

python examples/frontier/overhead.py work/overhead.json
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

import surgeon
from surgeon.kernels.selection import selection_threshold
from surgeon.moe.module import MoE
from surgeon.moe.site import find_moes
from surgeon.passes import Moeify

TOKENS, REPEATS = 2048, 30
# Width, hidden width and number of experts: MiniLM's layers, GPT-2's.
SHAPES = ((384, 1536, 48), (768, 3072, 96), (768, 3072, 24))


def seconds(call: Callable[[], object]) -> float:
    started = time.perf_counter()
    call()
    return time.perf_counter() - started


@torch.no_grad()
def overhead(width: int, hidden: int, experts: int) -> dict[str, float]:
    torch.manual_seed(0)
    dense = nn.Sequential(nn.Linear(width, hidden), nn.ReLU(), nn.Linear(hidden, width)).eval()
    x = torch.randn(TOKENS, width)
    graph = surgeon.trace(dense, (x,))
    Moeify(experts=experts, split="random").apply(graph, inputs=(x,))
    (site,) = find_moes(graph)
    moe = graph.get_submodule(site.path)
    assert isinstance(moe, MoE)
    tau = torch.tensor(0.2)

    def decide() -> torch.Tensor:
        scores = moe.router(x)
        return scores >= selection_threshold(scores, tau, "max").unsqueeze(-1)

    times = [(seconds(lambda: dense(x)), seconds(decide)) for _ in range(REPEATS + 3)][3:]
    router = sum(layer.weight.numel() for layer in (moe.router.fc1, moe.router.fc2))
    return {
        "width": width, "hidden": hidden, "experts": experts, "router_width": moe.router.fc1.out_features,
        "compute": router / (2 * width * hidden),
        "time": statistics.median(decided / ran for ran, decided in times),
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="where the numbers go, .json")
    args = parser.parse_args()
    torch.set_num_threads(1)
    found = [overhead(*shape) for shape in SHAPES]
    for row in found:
        print(
            f"d {row['width']}, hidden {row['hidden']}, {row['experts']} experts, router width {row['router_width']}: "
            f"{row['compute']:.1%} of the dense layer's multiply-adds, {row['time']:.1%} of its time"
        )
    args.out.write_text(json.dumps({"tokens": TOKENS, "threads": 1, "layers": found}, indent=1))


if __name__ == "__main__":
    main()
