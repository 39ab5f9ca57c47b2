"""Where a vision transformer spends its experts: the cheapest and costliest held-out digits, patch by patch.

python examples/frontier/load_map.py work/digits/0/ours load_map.png --tau 0.2
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from matplotlib.figure import Figure

import surgeon
from surgeon.data.batch import Batch
from surgeon.jobs import demo

SHOWN = 8


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("surgery", type=Path, help="a saved surgery of the digits study")
    parser.add_argument("out", type=Path, help="the picture, .png")
    parser.add_argument("--tau", type=float, default=0.2)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    graph = surgeon.load(args.surgery)
    surgeon.set_tau(graph, args.tau)
    images = torch.cat([Batch.from_any(item).args[0] for item in demo.digits(args.seed).eval])
    load = surgeon.token_load(graph, images)[:, 1:]  # without the class token
    order = load.mean(1).argsort()
    figure = Figure(figsize=(1.3 * SHOWN, 5.8), layout="constrained")
    axes = figure.subplots(4, SHOWN)
    scale = float(load.quantile(0.99))
    for row, (name, chosen) in enumerate((("cheapest", order[:SHOWN]), ("costliest", order[-SHOWN:].flip(0)))):
        for column, index in enumerate(chosen.tolist()):
            picture, heat = axes[2 * row, column], axes[2 * row + 1, column]
            picture.imshow(images[index, 0], cmap="gray_r")
            shown = heat.imshow(load[index].reshape(4, 4), cmap="viridis", vmin=0, vmax=scale)
            picture.set_title(f"{load[index].mean():.1%}", fontsize=9)
            if column == 0:
                picture.set_ylabel(name)
                heat.set_ylabel("load")
            for one in (picture, heat):
                one.set_xticks([])
                one.set_yticks([])
    figure.colorbar(shown, ax=axes, label="share of the experts' multiply-adds that a patch runs", shrink=0.7)
    figure.savefig(args.out, dpi=120)
    print(f"mean load {load.mean():.1%}, of the cheapest digit {load.mean(1).min():.1%}, of the costliest "
          f"{load.mean(1).max():.1%}; written to {args.out}")  # fmt: skip


if __name__ == "__main__":
    main()
