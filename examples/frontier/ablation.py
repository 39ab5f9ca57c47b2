"""What each part of the method is worth, on the feed-forward layers of the vision transformer for digits.

Phases added one by one, then each choice of ours against its alternatives, everything else being equal and without the
last phase, which every one of them would have to go through anew. Names without a curve are what several start from.

python examples/frontier/ablation.py work --seeds 0 1 2
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import digits
import torch
from study import main
from variants import Variant

from surgeon.passes import Lower, Sparsify, SwapActivation

TAUS = digits.TAUS
ALPHAS = (1e-4, 1e-3, 1e-2)
TOP_K = (0.0, 0.3, 0.5, 0.6, 0.7, 0.8, 0.85, 0.9, 0.95)
TRAINED: dict[str, Any] = {"router": "trained", "epochs": digits.ROUTER_EPOCHS}
PUBLISHED: dict[str, Any] = {"split": "weights", "objective": "norm", "router_width": 32, **TRAINED}
SPARSE: dict[str, Any] = {"target": digits.TARGET, "distill": digits.DISTILL}
OURS = "+ distillation (ours)"


def sparse(swap: bool = True, **options: Any) -> Variant:
    """Fine-tuned for sparsity."""
    first = [SwapActivation()] if swap else []
    return Variant([*first, Sparsify(**digits.TRAINING, **options)])


def split(start: str | None = "sparse", **options: Any) -> Variant:
    """Split into experts from there, by ours if no option says otherwise."""
    return Variant([digits.ffn(**{"epochs": digits.ROUTER_EPOCHS} | options), Lower()], TAUS, starts_from=start)


def same(**options: Any) -> Variant:
    """The very experts and routers of ours, used in another way."""
    return Variant([], TAUS, starts_from=OURS, **options)


VARIANTS = {
    "relu": Variant([SwapActivation(**digits.TRAINING)]),
    "published": sparse(alpha=1e-3),
    "target": sparse(target=digits.TARGET),
    "sparse": sparse(**SPARSE),
    "gelu": sparse(swap=False, **SPARSE),
    **{f"alpha_{alpha:g}": sparse(alpha=alpha, distill=digits.DISTILL) for alpha in ALPHAS},
    # Phases, one after the other.
    "the dense model split, closed-form routers": split(None, epochs=0),
    "+ ReLU, published split and routers": split("relu", **PUBLISHED),
    "+ square Hoyer (D2DMoE)": split("published", **PUBLISHED),
    "+ split by activations": split("published", **PUBLISHED | {"split": "activations"}),
    "+ our routers": split("published"),
    "+ a target for each layer": split("target"),
    OURS: split(),
    "+ a tau for each layer": same(budgets=digits.BUDGETS),
    "+ fine-tuning with experts skipped": Variant(
        [digits.ffn(epochs=digits.ROUTER_EPOCHS), digits.RECOVER, Lower()], TAUS, digits.BUDGETS, starts_from="sparse"
    ),
    # What the penalty is, on what.
    **{f"alpha {alpha:g} in place of the target": split(f"alpha_{alpha:g}") for alpha in ALPHAS},
    "GELU in place of ReLU": split("gelu"),
    # Experts and routers.
    **{f"experts of {size} neurons in place of 8": split(expert_size=size) for size in (4, 16, 32)},
    "two experts that always run": split(shared=2),
    "split of weights": split(split="weights"),
    "split at random": split(split="random"),
    "router trained on norms": split(**TRAINED, objective="norm"),
    "router trained on relative norms": split(**TRAINED),
    "router trained on logarithms": split(**TRAINED, objective="log"),
    "router, too low counts four times": split(underestimate=4.0),
    "router on the sparse model's inputs": split(exposure=0.1),
    "router in closed form only": split(epochs=0),
    # Selection.
    "rule cumulative": same(rules=["cumulative"]),
    "rule energy": same(rules=["energy"]),
    "rule top_k": Variant([], TOP_K, starts_from=OURS, rules=["top_k"]),
    "compensation": same(compensated=True),
}

if __name__ == "__main__":
    torch.set_num_threads(1)
    main(replace(digits.STUDY, name="ablation", variants=VARIANTS))
