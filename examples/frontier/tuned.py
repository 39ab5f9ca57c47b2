"""Every method tuned alike: four settings each, the best by a validation part, read off on the test part.

A fifth of what there is to train on is for validation, and no model is trained on it, the dense one included. Of each
method's settings the one counts whose layers cost least where it keeps the dense model's quality on the validation
part. The table is then read off on the test part.

python examples/frontier/tuned.py digits work --seeds 0 1 2
python examples/frontier/tuned.py code work --only d2dmoe_tuned ours_tuned
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import digits
import language
import torch
from sklearn.model_selection import train_test_split
from study import Run
from torch.utils.data import DataLoader, TensorDataset
from variants import Study, Variant

from surgeon.data.batch import Batch
from surgeon.data.data import Data
from surgeon.data.losses import evaluate
from surgeon.jobs import demo
from surgeon.measure.read_off import kept_at
from surgeon.passes import Lower, Moeify, Recover, Sparsify, SparsifyInputs, SwapActivation

Part = Literal["validation", "test"]
# Of routers, for every method.
ROUTERS = {"epochs": 40.0}
CODE_ROUTERS, CODE_TAUS = {"steps": 200}, (*language.TAUS, 0.85, 1.0)
# Of the rows that are kept for validation, one of so many is measured on.
EVERY = 24


@dataclass(frozen=True)
class Tuned:
    """A study, its data by seed and part to measure on, and of each method the settings by name.

    cost: of methods that are compared by something other than the cost of the converted layers.
    """

    of: Study
    data: Callable[[int, Part], Data]
    methods: Mapping[str, Mapping[str, Variant]]
    cost: Mapping[str, str] = field(default_factory=dict)

    @property
    def name(self) -> str:
        return f"{self.of.name}-tuned"

    def study(self, part: Part) -> Study:
        return replace(
            self.of,
            name=self.name,
            data=lambda seed: self.data(seed, part),
            part="" if part == "test" else f"-{part}",
            variants={name: variant for settings in self.methods.values() for name, variant in settings.items()},
        )


# --- digits ---------------------------------------------------------------------------------------------------------


def images(seed: int, part: Part) -> Data:
    """Four fifths of the training images to train on, and the validation or the test part to measure on."""
    batch = 64
    whole = demo.digits(seed, batch)
    pixels, labels = whole.train.source.dataset.tensors  # type: ignore[attr-defined]
    chosen, left = train_test_split(range(len(pixels)), test_size=0.2, random_state=seed, stratify=labels)
    generator = torch.Generator().manual_seed(seed)
    train = DataLoader(TensorDataset(pixels[chosen], labels[chosen]), batch, shuffle=True, generator=generator)
    validation = [Batch((x,), {}, y) for x, y in zip(pixels[left].split(batch), labels[left].split(batch), strict=True)]
    return Data(train, validation if part == "validation" else whole.eval, demo.TASK, "scikit-learn digits")


def moefication(lr: float, size: int) -> Variant:
    training = digits.TRAINING | {"lr": lr}
    routers = digits.PUBLISHED | ROUTERS | {"expert_size": size}
    passes = [SwapActivation(**training), digits.ffn(**routers, objective="activation", rule="top_k"), Lower()]
    return Variant(passes, digits.TOP_K_TAUS)


def d2dmoe(alpha: float) -> Variant:
    sparsify = Sparsify(alpha=alpha, **digits.TRAINING)
    passes = [SwapActivation(), sparsify, digits.ffn(**digits.PUBLISHED | ROUTERS, objective="norm"), Lower()]
    return Variant(passes, digits.LONG_TAUS)


def ours(target: float) -> Variant:
    sparsify = Sparsify(target=target, distill=0.7, **digits.TRAINING)
    return Variant([SwapActivation(), sparsify, digits.ffn(**ROUTERS), digits.RECOVER, Lower()], digits.LONG_TAUS)


def with_inputs(target: float) -> Variant:
    """Ours, and every other linear layer but the head skips inputs; a tau for each layer within budgets."""
    recover: Recover = replace(digits.RECOVER, epochs=30.0, skip_inputs=0.7)
    sparsify = Sparsify(target=target, distill=0.7, **digits.TRAINING)
    passes = [SwapActivation(), sparsify, digits.ffn(**ROUTERS), SparsifyInputs(skip=("head",)), recover, Lower()]
    return Variant(passes, budgets=(0.34, 0.3, 0.27, 0.24))


DIGITS = Tuned(
    digits.STUDY,
    images,
    {
        "moefication_tuned": {
            f"learning rate {lr:g}, experts of {size}": moefication(lr, size) for lr in (1e-3, 4e-3) for size in (8, 4)
        },
        "d2dmoe_tuned": {f"alpha {alpha:g}": d2dmoe(alpha) for alpha in (1e-3, 3e-3, 1e-2, 3e-2)},
        "ours_tuned": {f"{target:.0%} active": ours(target) for target in (0.02, 0.04, 0.06, 0.1)},
        "ours_inputs_tuned": {
            f"inputs too, {target:.0%} active": with_inputs(target) for target in (0.02, 0.04, 0.06, 0.1)
        },
    },
    {"ours_inputs_tuned": "relative"},  # the whole model
)

# --- code -----------------------------------------------------------------------------------------------------------


def files(seed: int, part: Part) -> Data:
    """Four fifths of the training tokens to train on; the last files of them, or the test part, to measure on."""
    whole, rows = language.data(seed), language.tokens()[0]
    train, left = rows[: len(rows) * 4 // 5], rows[len(rows) * 4 // 5 :: EVERY]
    validation = [Batch((), {"input_ids": chosen}) for chosen in left.split(language.BATCH)]
    return replace(whole, train=language.Chunks(train, seed), eval=validation if part == "validation" else whole.eval)


def code_d2dmoe(alpha: float) -> Variant:
    sparsify = Sparsify(alpha=alpha, **language.FINE_TUNING)
    routers = language.PUBLISHED | CODE_ROUTERS
    passes = [SwapActivation(), sparsify, Moeify(expert_size=16, **routers, objective="norm"), Lower()]
    return Variant(passes, CODE_TAUS)


def code_ours(target: float) -> Variant:
    before, sparsify, moeify, *rest = language.ours(target=target)
    assert isinstance(moeify, Moeify)
    return Variant([before, sparsify, replace(moeify, **CODE_ROUTERS), *rest], CODE_TAUS)


CODE = Tuned(
    language.study(gated=False),
    files,
    {
        "d2dmoe_tuned": {f"alpha {alpha:g}": code_d2dmoe(alpha) for alpha in (1e-4, 3e-4, 1e-3, 3e-3)},
        "ours_tuned": {f"{target:.0%} active": code_ours(target) for target in (0.03, 0.06, 0.1, 0.15)},
    },
)

STUDIES = {"digits": DIGITS, "code": CODE}


def cost(points: list[dict[str, Any]], which: str, wanted: float, *, higher_is_better: bool) -> float:
    """What it costs to keep a quality; infinite if nothing does."""
    found = kept_at(
        [p[which] for p in points], [p["quality"] for p in points], wanted, higher_is_better=higher_is_better
    )
    return math.inf if found is None else found.share


def run(tuned: Tuned, work: Path, seed: int, methods: list[str]) -> dict[str, Any]:
    """Return the test curves of the setting that each method has by the validation part."""
    place = work / tuned.name / str(seed)
    test, validation = (Run(tuned.study(part), seed, place) for part in ("test", "validation"))
    found: dict[str, Any] = {"dense": test.dense()}
    dense = validation.result(
        "dense-validation",
        "the dense model on the validation part",
        lambda: asdict(evaluate(validation.dense_model(), validation.data().eval, tuned.of.task)),
    )
    for method in methods:
        which = tuned.cost.get(method, "layers")
        costs, curves = {}, {}
        for name in tuned.methods[method]:
            curves[name] = test.variant(name)
            points = [point for curve in validation.variant(name)["curves"].values() for point in curve]
            wanted = tuned.of.keep * dense["value"]
            costs[name] = cost(points, which, wanted, higher_is_better=dense["higher_is_better"])
        best = min(costs, key=costs.__getitem__)
        print(f"seed {seed}, {method}: {best}, by {costs}", flush=True)
        known = {name: value if math.isfinite(value) else None for name, value in costs.items()}
        found[method] = curves[best] | {"setting": best, "validation": known}
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("study", choices=list(STUDIES))
    parser.add_argument("work", type=Path, help="where models and results are kept; a started study goes on there")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--only", nargs="+", help="some of the methods: those that end in _tuned")
    args = parser.parse_args()
    tuned = STUDIES[args.study]
    methods = args.only or list(tuned.methods)
    if unknown := set(methods) - set(tuned.methods):
        parser.error(f"--only {' '.join(sorted(unknown))}: {args.study} has {', '.join(tuned.methods)}")
    torch.set_num_threads(1)
    seeds = {str(seed): run(tuned, args.work, seed, methods) for seed in args.seeds}
    path = args.work / f"{tuned.name}.json"
    content = {"study": tuned.name, "task": tuned.of.task, "keep": tuned.of.keep, "seeds": seeds}
    path.write_text(json.dumps(content, indent=1))
    print(f"written to {path}")


if __name__ == "__main__":
    main()
