"""The method on top of other ways to make a model small: digits, a base that is pruned, distilled or quantised.

    python examples/frontier/bases.py work --seeds 0 1 2

trains a vision transformer, makes three smaller bases of it, converts the feed-forward layers of each, and measures
what keeps 99% of the base's accuracy: a share of the base's multiply-adds, and of those of the first model. It writes
bases.json into the work directory and prints the table. What is done is not done again.

- pruned: of all hidden neurons the half with the smallest products of weight norms is cut out, over all layers at once,
  so that every layer has another width; then fine-tuned.
- distilled: half as many blocks, taught by the first model, which teaches the conversion too (`--teacher`).
- quantised: 8-bit weights. The dense base is torchao's, and ours has `quantize` at the end.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Mapping
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import digits
import torch
from report import percent
from study import Run
from torch import nn
from variants import Study, Variant

import surgeon
from surgeon.data.losses import evaluate
from surgeon.engines import torchao
from surgeon.jobs import demo
from surgeon.measure.meter import measure
from surgeon.measure.read_off import kept_at
from surgeon.passes import Lower, Quantize, Recover, Sparsify, SwapActivation

KEEP, LEFT = 0.99, 0.5
TRAINING = digits.TRAINING | {"epochs": 20.0}
RECOVER = Recover(tau=0.15, distill=digits.DISTILL, **TRAINING | {"epochs": 10.0, "lr": 5e-4})
OURS = [
    SwapActivation(), Sparsify(target=digits.TARGET, distill=digits.DISTILL, **TRAINING),
    digits.ffn(epochs=digits.ROUTER_EPOCHS), RECOVER, Lower(),
]  # fmt: skip
DENSE = replace(
    digits.STUDY, name="bases_dense", dense=digits.STUDY.dense | {"epochs": 30.0},
    variants={
        "ours": Variant(OURS, digits.TAUS), "ours in 8 bits": Variant([Quantize()], digits.TAUS, starts_from="ours"),
    },
)  # fmt: skip
ALONE = {"ours": DENSE.variants["ours"]}


def studies(work: Path) -> dict[str, Study]:
    """A study for every base that is trained; those made of the first model find it in the work directory."""
    first = partial(dense_model, work)
    tuning = TRAINING | {"epochs": 10.0, "schedule": "linear"}
    return {
        "dense": DENSE,
        "pruned": replace(
            DENSE, name="bases_pruned", model=lambda seed: pruned(first(seed)), dense=tuning, variants=ALONE
        ),
        "distilled": replace(
            DENSE, name="bases_distilled", model=lambda seed: demo.DigitsViT(depth=2), teacher=first, variants=ALONE
        ),
    }  # fmt: skip


def run_of(work: Path, study: Study, seed: int) -> Run:
    return Run(study, seed, work / study.name / str(seed))


def dense_model(work: Path, seed: int) -> nn.Module:
    run = run_of(work, DENSE, seed)
    try:
        return run.dense_model()
    finally:
        run.screen.close()


@torch.no_grad()
def pruned(model: nn.Module) -> nn.Module:
    """The model with the share LEFT of its hidden neurons: those whose weights in and out have the largest norms."""
    layers = [block.mlp for block in model.blocks]  # type: ignore[union-attr]
    sizes = [up.weight.norm(dim=1) * down.weight.norm(dim=0) for up, *_, down in layers]
    every = torch.cat(sizes)
    least = every.topk(round(LEFT * len(every))).values.min()
    for layer, size in zip(layers, sizes, strict=True):
        kept = (size >= least).nonzero().squeeze(1)
        up, down = layer[0], layer[-1]
        smaller = nn.Linear(up.in_features, len(kept)), nn.Linear(len(kept), down.out_features)
        smaller[0].weight.copy_(up.weight[kept])
        smaller[0].bias.copy_(up.bias[kept])
        smaller[1].weight.copy_(down.weight[:, kept])
        smaller[1].bias.copy_(down.bias)
        layer[0], layer[-1] = smaller
    return model


def base(run: Run) -> dict[str, Any]:
    """A base's accuracy, its multiply-adds, and the widths of its feed-forward layers."""
    quality, model, data = run.dense(), run.dense_model(), run.data()
    cost, _ = measure(model, run.study.inputs(data), {})
    widths = [block.mlp[0].out_features for block in model.blocks]  # type: ignore[union-attr]
    return {"quality": quality, "multiply_adds": cost.multiply_adds, "widths": widths}


def in_8_bits(run: Run) -> dict[str, Any]:
    """The accuracy of the dense model with torchao's linears, for the input's scale of each token and 8-bit weights."""

    def make() -> dict[str, Any]:
        data = run.data()
        graph = surgeon.trace(run.dense_model(), run.study.inputs(data)).eval()
        return asdict(evaluate(torchao.quantised(graph, "int8"), data.eval, run.study.task))

    return run.result("dense in 8 bits", run.study.dense, make)


def of_seed(work: Path, seed: int) -> dict[str, Any]:
    """Every base, and ours on top of it."""
    found: dict[str, Any] = {}
    for name, study in studies(work).items():
        run = run_of(work, study, seed)
        found[name] = base(run) | {"ours": run.variant("ours")["curves"]["uniform"]}
        if name == "dense":
            eight = {"quality": in_8_bits(run), "ours": run.variant("ours in 8 bits")["curves"]["uniform"]}
            found["quantised"] = found[name] | eight
        run.screen.close()
    return found


def table(seeds: Mapping[str, Mapping[str, Any]]) -> str:
    """Means and spreads over the seeds, as Markdown."""
    lines = [
        "| base | its accuracy | its multiply-adds, of dense | ours at 99% of it: layers | whole model, of the base "
        "| of dense |",
        "| --- " * 6 + "|",
    ]
    for name in ("dense", "pruned", "distilled", "quantised"):
        qualities, shares = [], []
        costs: dict[str, list[Any]] = {"layers": [], "relative": [], "of dense": []}
        for found in seeds.values():
            one, share = found[name], found[name]["multiply_adds"] / found["dense"]["multiply_adds"]
            qualities.append(100 * one["quality"]["value"])
            shares.append(100 * share)
            values = [point["quality"] for point in one["ours"]]
            for cost, kept in costs.items():
                factor = share if cost == "of dense" else 1.0
                points = [factor * point["relative" if cost == "of dense" else cost] for point in one["ours"]]
                kept.append(kept_at(points, values, KEEP * one["quality"]["value"], higher_is_better=True))
        cells = [f"{statistics.fmean(values):.1f}%" for values in (qualities, shares)]
        lines.append(f"| {name} | " + " | ".join([*cells, *(percent(kept) for kept in costs.values())]) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", type=Path, help="where models and results are kept; a started study goes on there")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    args = parser.parse_args()
    found = {str(seed): of_seed(args.work, seed) for seed in args.seeds}
    file = args.work / "bases.json"
    file.write_text(json.dumps({"keep": KEEP, "bases": found}, indent=1))
    print(table(found))


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
