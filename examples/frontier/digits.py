"""A small vision transformer on scikit-learn's digits, every linear layer of its blocks converted.

python examples/frontier/digits.py work
"""

from __future__ import annotations

from typing import Any

import torch
from study import Study, Variant, main
from torch import nn

from surgeon import demo
from surgeon.batch import Batch, Data
from surgeon.passes import Lower, Mlpify, Moeify, Sparsify, SwapActivation

LR, DECAY = 1e-3, 0.05
TAUS = (0.0, 0.02, 0.05, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.7)

PUBLISHED = {"split": "weights", "router": "trained", "epochs": 10.0}


def model(seed: int) -> nn.Module:
    return demo.DigitsViT()


def inputs(data: Data) -> Any:
    return Batch.from_any(next(iter(data.eval))).args


def ffn(**options: Any) -> Moeify:
    return Moeify(expert_size=8, **options)


STUDY = Study(
    name="digits",
    task=demo.TASK,
    keep=0.99,
    data=demo.digits,
    model=model,
    inputs=inputs,
    dense={"epochs": 40.0, "lr": 2e-3, "weight_decay": DECAY, "schedule": "cosine"},
    longer={"epochs": 40.0, "lr": LR, "weight_decay": DECAY, "schedule": "linear"},
    variants={
        "moefication": Variant(
            [
                SwapActivation(epochs=40.0, lr=LR, weight_decay=DECAY),
                ffn(**PUBLISHED, objective="activation", rule="top_k", router_width=32),
                Lower(),
            ],
            (0.0, 0.2, 0.4, 0.5, 0.6, 0.7, 0.8, 0.85, 0.9, 0.95),
        ),
        "d2dmoe": Variant(
            [
                Mlpify(epochs=10.0, init="random"),
                SwapActivation(),
                Sparsify(alpha=1e-3, epochs=30.0, lr=LR, weight_decay=DECAY),
                ffn(**PUBLISHED, objective="norm", router_width=32, share_trunk=False),
                Lower(),
            ],
            TAUS,
            oracle=True,
        ),
        "ours": Variant(
            [
                SwapActivation(),
                Sparsify(target=0.04, distill=0.5, epochs=40.0, lr=LR, weight_decay=DECAY),
                ffn(epochs=10.0),
                Lower(),
            ],
            TAUS,
            budgets=(0.41, 0.43, 0.45, 0.5),
            oracle=True,
        ),
        "ours_attention": Variant(
            [
                Mlpify(epochs=10.0),
                SwapActivation(),
                Sparsify(
                    target={"*projection_mlp*": 0.1, "*": 0.04}, distill=0.5, epochs=40.0, lr=LR, weight_decay=DECAY
                ),
                ffn(epochs=10.0),
                Lower(),
            ],
            TAUS,
            budgets=(0.2, 0.23, 0.26, 0.3, 0.35),
            oracle=True,
        ),
        "untrained": Variant(
            [ffn(epochs=0), Lower()], TAUS, budgets=(0.5, 0.6, 0.7, 0.8), oracle=True
        ),
    },
)  # fmt: skip

if __name__ == "__main__":
    torch.set_num_threads(1)
    main(STUDY)
