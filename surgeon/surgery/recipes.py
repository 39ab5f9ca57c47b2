"""The recipes: several passes with their options, by name."""

from __future__ import annotations

from typing import Any

Steps = list[tuple[str, dict[str, Any]]]

RELUFY: Steps = [("swap-activation", {"epochs": 3.0})]
D2DMOE: Steps = [
    ("swap-activation", {}),
    ("sparsify", {"alpha": 1e-3, "alpha_schedule": "linear"}),
    (
        "moeify",
        {
            "split": "weights",
            "router": "trained",
            "router_width": 128,
            "objective": "norm",
            "share_trunk": False,
            "epochs": 5.0,
        },
    ),
    ("lower", {}),
]
RECIPES: dict[str, tuple[str, Steps]] = {
    "recommended": (
        "Our choice: ReLU, 5% of the neurons active, distillation of outputs and layers, experts of neurons that fire "
        "together, routers that start in closed form, fine-tuning with experts skipped. The learning rates suit a "
        "pretrained transformer; a small model may need higher ones. Run surgeon tune afterwards.",
        [
            ("swap-activation", {}),
            ("sparsify", {"target": 0.05, "lr": 5e-5, "distill": 0.7, "distill_layers": 1.0}),
            ("moeify", {}),
            ("recover", {"lr": 3e-5, "distill": 0.7, "distill_layers": 1.0}),
            ("lower", {}),
        ],
    ),
    "relufy": ("ReLU in place of the activation, and recovery training, without a sparsity penalty.", RELUFY),
    "moefication": (
        "MoEfication (arXiv 2110.01786), as D2DMoE compares with it: ReLU, clusters of weights, routers that classify, "
        "a fixed number of experts. Set the published expert size, 24, with moeify.expert_size.",
        [
            *RELUFY,
            (
                "moeify",
                {
                    "split": "weights",
                    "router": "trained",
                    "router_width": 128,
                    "objective": "activation",
                    "rule": "top_k",
                    "epochs": 5.0,
                },
            ),
            ("lower", {}),
        ],
    ),
    "d2dmoe": (
        "D2DMoE (arXiv 2310.04361) as published: ReLU, square Hoyer with one weight for all layers, clusters of "
        "weights, routers of width 128 that regress norms, experts above a share of the largest score. Set the "
        "published expert sizes (24 for BERT, 4 for GPT-2, 6 for ViT-B) with moeify.expert_size.",
        D2DMOE,
    ),
    "d2dmoe-attention": (
        "d2dmoe after mlpify, which replaces attention projections by MLPs from random weights. Set the expert sizes "
        "as for d2dmoe. mlpify.skip leaves other linear layers, such as a pooler, alone.",
        [("mlpify", {"init": "random", "error": "mse"}), *D2DMOE],
    ),
}
