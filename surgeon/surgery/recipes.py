"""The recipes: several passes with their options, by name."""

from __future__ import annotations

from typing import Any, Literal

Steps = list[tuple[str, dict[str, Any]]]

RELUFY: Steps = [("swap-activation", {"epochs": 3.0})]
_ROUTER = {"split": "weights", "router": "trained", "objective": "norm", "share_trunk": False}
_LANGUAGE = {"schedule": "cosine", "beta2": 0.95}


def _d2dmoe(sparsify: dict[str, Any], moeify: dict[str, Any], *, gelu: bool = False) -> Steps:
    """Return D2DMoE with what differs between the authors' scripts. gelu: keep the activation."""
    routed = ("moeify", {**_ROUTER, "router_width": 128, **moeify})
    swapped: Steps = [] if gelu else [("swap-activation", {})]
    return [*swapped, ("sparsify", sparsify), routed, ("lower", {})]


_MLPIFY = {"init": "random", "error": "mse", "alpha": 1e-3, "alpha_schedule": "linear"}
_VIT = _d2dmoe(
    {
        "alpha": 0.2, "alpha_schedule": "linear_warmup", "epochs": 90.0, "lr": 2e-5, "schedule": "cosine",
        "weight_decay": 0.05, "label_smoothing": 0.1, "mixup": 0.8, "cutmix": 1.0,
    },
    {"expert_size": 6, "epochs": 7.0, "lr": 1e-3},
)  # fmt: skip
_BERT = _d2dmoe(
    {"penalty": "l1", "alpha": 1e-4, "alpha_schedule": "constant", "lr": 2e-5},
    {"expert_size": 24, "epochs": 10.0, "lr": 1e-3},
)
_GPT2_TRAINING = {**_LANGUAGE, "steps": 1000, "lr": 6e-4, "weight_decay": 0.1, "warmup": 0.1, "accumulate": 120}
_GPT2 = _d2dmoe(
    {"penalty": "l1", "alpha": 5e-4, "alpha_schedule": "constant", **_GPT2_TRAINING},
    {"expert_size": 4, "steps": 5000, "lr": 3e-3},
)
_GPT2_GELU = _d2dmoe(
    {"penalty": "l1", "alpha": 5e-5, "alpha_schedule": "constant", "displacement": -10.0, **_GPT2_TRAINING},
    {"expert_size": 4, "steps": 2000, "lr": 5e-3},
    gelu=True,
)
_GEMMA = _d2dmoe(
    {
        "alpha": 1e-3, "alpha_schedule": "constant", **_LANGUAGE, "steps": 1000, "lr": 1e-4, "weight_decay": 0.01,
        "warmup": 0.05, "accumulate": 128,
    },
    {"expert_size": 32, "router_width": 512, "steps": 1000, "lr": 1e-3},
)  # fmt: skip

Family = Literal["vit", "bert", "gpt2", "gemma"]
BY_FAMILY: dict[str, tuple[str, dict[Family, str]]] = {
    "d2dmoe": (
        "D2DMoE (arXiv 2310.04361) as published for the kind of model: takes one of the next four.",
        {"vit": "d2dmoe-vit", "bert": "d2dmoe-bert", "gpt2": "d2dmoe-gpt2", "gemma": "d2dmoe-gemma"},
    ),
    "d2dmoe-attention": (
        "d2dmoe after mlpify, which replaces attention projections by MLPs from random weights: takes one of the next "
        "two. The authors leave the attention of language models alone. mlpify.skip leaves other linear layers, such "
        "as a pooler, alone.",
        {"vit": "d2dmoe-attention-vit", "bert": "d2dmoe-attention-bert"},
    ),
}
"""Recipes that stand for another one, which depends on the model: what they are, and the recipe of each family."""

_SPARSE: Steps = [
    ("swap-activation", {}),
    ("sparsify", {"target": 0.05, "lr": 5e-5, "distill": 0.7, "distill_layers": 1.0}),
    ("moeify", {}),
]
_RECOVER: Steps = [("recover", {"lr": 3e-5, "distill": 0.7, "distill_layers": 1.0})]

RECIPES: dict[str, tuple[str, Steps]] = {
    "recommended": (
        "Our choice: ReLU, 5% of the neurons active, distillation of outputs and layers, experts of neurons that fire "
        "together, routers that start in closed form, fine-tuning with experts skipped. The learning rates suit a "
        "pretrained transformer; a small model may need higher ones. Run surgeon tune afterwards.",
        [*_SPARSE, *_RECOVER, ("lower", {})],
    ),
    "recommended-whole": (
        "The same, and every other linear layer skips inputs, such as attention's projections. It makes the whole "
        "model cheapest, in time where it runs for a few tokens at once, as in decoding. Needs surgeon tune "
        "afterwards, since tau means different things to both kinds of layers.",
        [*_SPARSE, ("sparsify-inputs", {}), *_RECOVER, ("lower", {})],
    ),
    "recommended-rotated": (
        "recommended-whole with rotate in it, so that linear layers can skip more of their inputs. Where norms stand "
        "behind the sums, as in BERT, only the values of attention are turned. A model with LayerNorms whose stream is "
        "turned is used as a graph: it cannot be put back into its class, as one with RMSNorms can.",
        [*_SPARSE[:2], ("rotate", {}), *_SPARSE[2:], ("sparsify-inputs", {}), *_RECOVER, ("lower", {})],
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
    "cmoe": (
        "CMoE (arXiv 2502.04416), without training: 16 experts, of which 2 always run, clusters of neurons that are "
        "among the largest of the same tokens, a neuron of each expert as its router, a fixed number of experts. tau "
        "0.86 runs 2 of the other 14.",
        [
            (
                "moeify",
                {
                    "experts": 16,
                    "shared": 2,
                    "split": "markers",
                    "router": "representatives",
                    "rule": "top_k",
                    "epochs": 0.0,
                },
            ),
            ("lower", {}),
        ],
    ),
    "d2dmoe-vit": (
        "D2DMoE for image classifiers: ReLU, square Hoyer that rises to 0.2, mixup, CutMix and label smoothing, 90 "
        "epochs, experts of 6 neurons.",
        _VIT,
    ),
    "d2dmoe-bert": (
        "D2DMoE for encoders of text: ReLU, L1 of weight 1e-4, experts of 24 neurons, 10 epochs for the routers.",
        _BERT,
    ),
    "d2dmoe-gpt2": (
        "D2DMoE for language models: ReLU, L1 of weight 5e-4, 1,000 steps of 120 batches (of 8), experts of 4 neurons, "
        "5,000 steps for the routers.",
        _GPT2,
    ),
    "d2dmoe-gemma": (
        "D2DMoE for gated language models: ReLU on the gate, square Hoyer of weight 1e-3, 1,000 steps of 128 batches "
        "(of 8), experts of 32 neurons, routers of width 512.",
        _GEMMA,
    ),
    "d2dmoe-gpt2-gelu": (
        "The authors' variant of d2dmoe-gpt2 that keeps GELU: L1 of weight 5e-5 on the shifted inputs of GELU, 2,000 "
        "steps for the routers.",
        _GPT2_GELU,
    ),
    "d2dmoe-attention-vit": (
        "d2dmoe-vit after mlpify.",
        [("mlpify", {**_MLPIFY, "dropout": 0.05, "epochs": 3.0, "lr": 1e-3}), *_VIT],
    ),
    "d2dmoe-attention-bert": ("d2dmoe-bert after mlpify.", [("mlpify", _MLPIFY), *_BERT]),
}


def all_recipes() -> dict[str, str]:
    """Return every recipe with what it is, in the order in which people read them."""
    shown: dict[str, str] = {}
    for name, (what, _) in RECIPES.items():
        for stands_for, (about, members) in BY_FAMILY.items():
            if name == next(iter(members.values())):
                shown[stands_for] = about
        shown[name] = what
    return shown
