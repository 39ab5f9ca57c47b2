"""A small vision transformer on scikit-learn's digits, every linear layer of its blocks converted.

python examples/frontier/digits.py work
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from study import main
from torch import nn
from variants import Study, Variant, recipe, without_training

from surgeon.data.batch import Batch
from surgeon.data.data import Data
from surgeon.jobs import demo
from surgeon.passes import (
    EarlyExit,
    HaltTokens,
    Lower,
    Mlpify,
    Moeify,
    Recover,
    Rotate,
    Sparsify,
    SparsifyInputs,
    SwapActivation,
)

# Of every fine-tuning of the whole model, and of the routers.
TRAINING: dict[str, Any] = {"epochs": 40.0, "lr": 1e-3, "weight_decay": 0.05}
ROUTER_EPOCHS = 10.0
PUBLISHED: dict[str, Any] = {"split": "weights", "router": "trained", "router_width": 32, "epochs": ROUTER_EPOCHS}
TARGET, DISTILL = 0.04, 0.7
RECOVER = Recover(tau=0.15, distill=DISTILL, **TRAINING | {"epochs": 15.0, "lr": 5e-4})
TAUS = (0.0, 0.02, 0.05, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.7)
LONG_TAUS = (*TAUS, 0.85, 0.95, 1.0)
LEAVING_TAUS = (0.0, 0.01, 0.02, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7)
HALTING_TAUS = (0.0, 0.3, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95)
TOP_K_TAUS = (0.0, 0.2, 0.4, 0.5, 0.6, 0.7, 0.8, 0.85, 0.9, 0.95)
BUDGETS = (0.41, 0.43, 0.45)
# Without training: of the whole model, where only feed-forward layers skip, and where every linear layer does.
CMOE = (0.0, 0.15, 0.3, 0.5, 0.65, 0.72, 0.79, 0.86, 0.93)
LAYERS, FFN_BUDGETS = ("*.mlp.*",), (0.43, 0.46, 0.5, 0.55)
WHOLE = (0.3, 0.35, 0.4, 0.45, 0.5, 0.6)


def model(seed: int) -> nn.Module:
    return demo.DigitsViT()


def inputs(data: Data) -> Any:
    return Batch.from_any(next(iter(data.eval))).args


def ffn(**options: Any) -> Moeify:
    return Moeify(**{"expert_size": 8} | options)


STUDY = Study(
    name="digits",
    task=demo.TASK,
    keep=0.99,
    data=demo.digits,
    model=model,
    inputs=inputs,
    dense={"epochs": 40.0, "lr": 2e-3, "weight_decay": 0.05, "schedule": "cosine"},
    longer=TRAINING | {"epochs": 55.0, "schedule": "linear"},
    variants={
        "moefication": Variant(
            [SwapActivation(**TRAINING), ffn(**PUBLISHED, objective="activation", rule="top_k"), Lower()],
            TOP_K_TAUS,
        ),
        "d2dmoe": Variant(
            [SwapActivation(), Sparsify(alpha=1e-3, **TRAINING), ffn(**PUBLISHED, objective="norm"), Lower()],
            TAUS,
            oracle=True,
        ),
        "d2dmoe_attention": Variant(
            [
                Mlpify(epochs=10.0, init="random", error="mse"),
                SwapActivation(),
                Sparsify(alpha=1e-3, **TRAINING),
                ffn(**PUBLISHED, objective="norm", share_trunk=False),
                Lower(),
            ],
            TAUS,
        ),
        "ours": Variant(
            [
                SwapActivation(), Sparsify(target=TARGET, distill=DISTILL, **TRAINING), ffn(epochs=ROUTER_EPOCHS),
                RECOVER, Lower(),
            ],
            TAUS,
            BUDGETS,
            oracle=True,
        ),
        # Replacements so wide that they can be exact: what counts is the few of their neurons that run.
        "ours_attention": Variant(
            [
                Mlpify(epochs=5.0, cost_factor=4.0),
                SwapActivation(),
                Sparsify(target=0.05, distill=DISTILL, **TRAINING),
                Moeify(expert_size={"*projection_mlp*": 4, "*": 8}, epochs=30.0),
                replace(RECOVER, epochs=30.0),
                Lower(),
            ],
            TAUS,
            budgets=(0.3, 0.35, 0.4),
            oracle=True,
        ),
        # Every linear layer: experts where there is an activation, inputs that are skipped everywhere else.
        "ours_inputs": Variant(
            [
                SwapActivation(), Sparsify(target=TARGET, distill=DISTILL, **TRAINING), ffn(epochs=ROUTER_EPOCHS),
                SparsifyInputs(skip=("head",)), replace(RECOVER, epochs=30.0, skip_inputs=0.7), Lower(),
            ],
            budgets=(0.34, 0.3, 0.27, 0.24),
        ),
        # The same in the principal components of the stream.
        "ours_rotated": Variant(
            [
                SwapActivation(), Sparsify(target=TARGET, distill=DISTILL, **TRAINING), Rotate(),
                ffn(epochs=ROUTER_EPOCHS), SparsifyInputs(skip=("head",)),
                replace(RECOVER, epochs=30.0, skip_inputs=0.7), Lower(),
            ],
            budgets=(0.3, 0.27, 0.24, 0.21, 0.18),
        ),
        "untrained": Variant([ffn(epochs=0), Lower()], TAUS, budgets=(0.7, 0.8)),
        # Samples that leave, with heads on the frozen model, and tokens that halt, trained for as long as the others.
        "early_exit": Variant([EarlyExit(epochs=40.0)], LEAVING_TAUS),
        "halting": Variant([HaltTokens(**TRAINING)], HALTING_TAUS),
        "halting_early": Variant([HaltTokens(depth=1.0, ponder=5e-3, **TRAINING)], HALTING_TAUS),
        # As published, and the layout of it that does best here: of 32 experts 8 always run.
        "cmoe": Variant(recipe("cmoe"), CMOE),
        "cmoe_tuned": Variant(recipe("cmoe", expert_size=8, experts=None, shared=8), CMOE),
        **without_training(LAYERS, FFN_BUDGETS, WHOLE, skip=("head",)),
    },
)  # fmt: skip

if __name__ == "__main__":
    torch.set_num_threads(1)
    main(STUDY)
