"""Digits with every method tuned alike: four settings each, the best by a validation part, read off on the test part.

A fifth of the training images is for validation, and no model is trained on it, the dense one included. Of each
method's settings the one counts whose layers cost least where it keeps 99% of the dense accuracy on the validation
part. The table is then read off on the test part.

python examples/frontier/tuned.py work --seeds 0 1 2
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, Literal

import torch
from digits import LONG_TAUS, PUBLISHED, RECOVER, TOP_K_TAUS, TRAINING, ffn
from digits import STUDY as DIGITS
from sklearn.model_selection import train_test_split
from study import Run
from torch.utils.data import DataLoader, TensorDataset
from variants import Study, Variant

from surgeon.data.batch import Batch
from surgeon.data.data import Data
from surgeon.data.losses import evaluate
from surgeon.jobs import demo
from surgeon.measure.read_off import kept_at
from surgeon.passes import Lower, Recover, Sparsify, SparsifyInputs, SwapActivation

Part = Literal["validation", "test"]
BATCH = 64
# Of routers, for every method.
ROUTERS = {"epochs": 40.0}


def data(seed: int, part: Part) -> Data:
    """Four fifths of the training images to train on, and the validation or the test part to measure on."""
    whole = demo.digits(seed, BATCH)
    images, labels = whole.train.source.dataset.tensors  # type: ignore[attr-defined]
    chosen, left = train_test_split(range(len(images)), test_size=0.2, random_state=seed, stratify=labels)
    generator = torch.Generator().manual_seed(seed)
    train = DataLoader(TensorDataset(images[chosen], labels[chosen]), BATCH, shuffle=True, generator=generator)
    validation = [Batch((x,), {}, y) for x, y in zip(images[left].split(BATCH), labels[left].split(BATCH), strict=True)]
    return Data(train, validation if part == "validation" else whole.eval, demo.TASK, "scikit-learn digits")


def moefication(lr: float, size: int) -> Variant:
    routers = PUBLISHED | ROUTERS
    passes = [
        SwapActivation(**TRAINING | {"lr": lr}),
        ffn(**routers, expert_size=size, objective="activation", rule="top_k"),
        Lower(),
    ]
    return Variant(passes, TOP_K_TAUS)


def d2dmoe(alpha: float) -> Variant:
    passes = [
        SwapActivation(),
        Sparsify(alpha=alpha, **TRAINING),
        ffn(**PUBLISHED | ROUTERS, objective="norm"),
        Lower(),
    ]
    return Variant(passes, LONG_TAUS)


def ours(target: float) -> Variant:
    sparsify = Sparsify(target=target, distill=0.7, **TRAINING)
    return Variant([SwapActivation(), sparsify, ffn(**ROUTERS), RECOVER, Lower()], LONG_TAUS)


def with_inputs(target: float) -> Variant:
    """Ours, and every other linear layer but the head skips inputs; a tau for each layer within budgets."""
    recover: Recover = replace(RECOVER, epochs=30.0, skip_inputs=0.7)
    sparsify = Sparsify(target=target, distill=0.7, **TRAINING)
    passes = [SwapActivation(), sparsify, ffn(**ROUTERS), SparsifyInputs(skip=("head",)), recover, Lower()]
    return Variant(passes, budgets=(0.34, 0.3, 0.27, 0.24))


METHODS: Mapping[str, Mapping[str, Variant]] = {
    "moefication_tuned": {
        f"learning rate {lr:g}, experts of {size}": moefication(lr, size) for lr in (1e-3, 4e-3) for size in (8, 4)
    },
    "d2dmoe_tuned": {f"alpha {alpha:g}": d2dmoe(alpha) for alpha in (1e-3, 3e-3, 1e-2, 3e-2)},
    "ours_tuned": {f"{target:.0%} active": ours(target) for target in (0.02, 0.04, 0.06, 0.1)},
    "ours_inputs_tuned": {
        f"inputs too, {target:.0%} active": with_inputs(target) for target in (0.02, 0.04, 0.06, 0.1)
    },
}
COST = {"ours_inputs_tuned": "relative"}  # of the whole model; for the others it is that of the converted layers


def study(part: Part) -> Study:
    return replace(
        DIGITS,
        name="digits-tuned",
        data=lambda seed: data(seed, part),
        part="" if part == "test" else f"-{part}",
        variants={name: variant for settings in METHODS.values() for name, variant in settings.items()},
    )


def cost(points: list[dict[str, Any]], which: str, wanted: float) -> float:
    """What it costs to keep an accuracy; infinite if nothing does."""
    found = kept_at([p[which] for p in points], [p["quality"] for p in points], wanted, higher_is_better=True)
    return math.inf if found is None else found.share


def run(work: Path, seed: int, methods: list[str]) -> dict[str, Any]:
    """Return the test curves of the setting that each method has by the validation part."""
    place = work / "digits-tuned" / str(seed)
    test, validation = (Run(study(part), seed, place) for part in ("test", "validation"))
    found: dict[str, Any] = {"dense": test.dense()}
    dense = validation.result(
        "dense-validation",
        "the dense model on the validation part",
        lambda: asdict(evaluate(validation.dense_model(), validation.data().eval, demo.TASK)),
    )
    for method in methods:
        which = COST.get(method, "layers")
        costs, curves = {}, {}
        for name in METHODS[method]:
            curves[name] = test.variant(name)
            points = [point for curve in validation.variant(name)["curves"].values() for point in curve]
            costs[name] = cost(points, which, DIGITS.keep * dense["value"])
        best = min(costs, key=costs.__getitem__)
        print(f"seed {seed}, {method}: {best}, by {costs}", flush=True)
        known = {name: value if math.isfinite(value) else None for name, value in costs.items()}
        found[method] = curves[best] | {"setting": best, "validation": known}
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", type=Path, help="where models and results are kept; a started study goes on there")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--only", nargs="+", choices=list(METHODS), default=list(METHODS), help="some of the methods")
    args = parser.parse_args()
    torch.set_num_threads(1)
    seeds = {str(seed): run(args.work, seed, args.only) for seed in args.seeds}
    path = args.work / "digits-tuned.json"
    content = {"study": "digits-tuned", "task": demo.TASK, "keep": DIGITS.keep, "seeds": seeds}
    path.write_text(json.dumps(content, indent=1))
    print(f"written to {path}")


if __name__ == "__main__":
    main()
