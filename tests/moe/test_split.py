"""Which neurons make up an expert: like ones together, and the most active ones in those that always run."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from surgeon.moe.split import output_sizes, split_neurons
from surgeon.sites.ffn import FFNWeights

D, KINDS, EACH = 8, 4, 6
H = KINDS * EACH
# Neurons of four kinds in turn, each of which listens to one input of its own.
KIND = torch.arange(H) % KINDS


def weights() -> FFNWeights:
    generator = torch.Generator().manual_seed(0)
    rows = torch.eye(D)[KIND] + 0.01 * torch.randn(H, D, generator=generator)
    return FFNWeights(rows, torch.zeros(H), None, None, torch.ones(H, 3), None)


def split(x: torch.Tensor | None = None, **options: Any) -> torch.Tensor:
    active = None if x is None else output_sizes(weights(), "relu", x)
    usual: dict[str, Any] = {"split": "weights", "shared": 0, "active": active, "seed": 0}
    return split_neurons(weights(), KINDS, EACH, **{**usual, **options})


@pytest.mark.parametrize("how", ["weights", "activations", "auto"])
def test_neurons_of_a_kind_are_one_expert(how: str) -> None:
    x = None if how == "weights" else torch.randn(200, D, generator=torch.Generator().manual_seed(1))
    labels = split(split=how, x=x)
    assert labels.dtype == torch.int64
    assert len({(int(kind), int(label)) for kind, label in zip(KIND, labels, strict=True)}) == KINDS
    assert torch.equal(labels.bincount(), torch.full((KINDS,), EACH))


def test_random_experts_are_of_one_size_and_follow_the_seed() -> None:
    labels = split(split="random")
    assert torch.equal(labels.bincount(), torch.full((KINDS,), EACH))
    assert torch.equal(labels, split(split="random"))
    assert not torch.equal(labels, split(split="random", seed=1))


def test_the_first_experts_are_those_of_the_most_active_neurons() -> None:
    x = torch.zeros(50, D)
    x[:, 2] = 1.0  # what neurons of the third kind listen to, always
    x[:10, :2] = 1.0
    labels = split(split="activations", shared=1, x=x)
    assert torch.equal(labels == 0, KIND == 2)


def test_the_last_expert_gets_the_neurons_that_are_left() -> None:
    for how in ("weights", "random"):
        labels = split_neurons(weights(), 3, 9, split=how, shared=1, active=torch.rand(H, 5), seed=0)  # type: ignore[arg-type]
        assert labels.bincount().tolist() == [9, 9, 6]
