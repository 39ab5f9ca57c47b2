"""Which neurons make up an expert: like ones together, and the most active ones in those that always run."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from surgeon.kernels.activations import ACTIVATIONS
from surgeon.moe.split import markers, neuron_features, output_sizes, representatives, split_neurons
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


# --- CMoE -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_markers_are_the_largest_hidden_values_of_normalised_inputs_and_rows(gated: bool, bias: bool) -> None:
    generator = torch.Generator().manual_seed(3)
    w1, gate, x = (torch.randn(rows, D, generator=generator) * 3 for rows in (H, H, 20))
    b1, b_gate = torch.randn(2, H, generator=generator)
    given = FFNWeights(
        w1, b1 if bias else None, gate if gated else None, b_gate if bias and gated else None, torch.ones(H, 3), None
    )
    found = markers(given, "silu", x, 5)
    assert found.shape == (H, 20)
    for token, column in zip(x, found.t(), strict=True):
        sizes = []
        for neuron in range(H):
            up = float(w1[neuron] @ token + bias * b1[neuron]) / float(w1[neuron].norm() * token.norm())
            first = float(gate[neuron] @ token + bias * b_gate[neuron]) / float(gate[neuron].norm() * token.norm())
            act = float(ACTIVATIONS["silu"].fn(torch.tensor(first if gated else up)))
            sizes.append(abs(act * up if gated else act))
        largest = sorted(range(H), key=lambda neuron: -sizes[neuron])[:5]
        assert column.nonzero().squeeze(1).tolist() == sorted(largest)
        assert set(column.tolist()) == {0.0, 1.0}


def test_tokens_that_are_not_finite_are_not_marked_as_others() -> None:
    assert bool(markers(weights(), "relu", torch.full((1, D), torch.nan), 2).isnan().all())


def test_markers_put_the_most_marked_first_and_the_others_around_the_next() -> None:
    # Neuron 0 is marked by every token, the others in three disjoint groups of tokens.
    marked = torch.zeros(10, 30)
    marked[0] = 1.0
    groups = {1: [1, 2, 3], 2: [4, 5, 6], 3: [7, 8, 9]}
    for number, members in groups.items():
        for place, neuron in enumerate(members):  # the first of a group most often
            marked[neuron, number * 10 - 10 : number * 10 - 2 * place] = 1.0
    given = FFNWeights(torch.randn(10, D), None, None, None, torch.ones(10, 3), None)
    labels = split_neurons(given, 10, 1, split="markers", shared=1, active=marked, seed=0)
    assert int(labels[0]) == 0
    # Experts of three, of which the first takes what always runs, and two places are filled.
    labels = split_neurons(given, 4, 3, split="markers", shared=1, active=marked, seed=0)
    assert labels.bincount().tolist() == [3, 3, 3, 1]
    marked = marked.index_select(0, torch.tensor([*range(1, 10)]))
    given = FFNWeights(torch.randn(9, D), None, None, None, torch.ones(9, 3), None)
    labels = split_neurons(given, 3, 3, split="markers", shared=0, active=marked, seed=0)
    assert {frozenset((labels == label).nonzero().squeeze(1).tolist()) for label in range(3)} == {
        frozenset(neuron - 1 for neuron in members) for members in groups.values()
    }


def test_a_representative_is_the_neuron_nearest_to_the_mean_of_its_expert() -> None:
    features = torch.tensor([[9.0, 9.0], [0.0, 0.0], [1.0, 1.0], [5.0, 5.0], [0.0, 8.0], [0.0, 1.0], [0.0, 0.0]])
    labels = torch.tensor([0, 1, 1, 1, 2, 2, 2])
    # The means are (2, 2) and (0, 3).
    assert representatives(features, labels, 1).tolist() == [2, 5]
    assert representatives(features, labels, 0).tolist() == [0, 2, 5]


@pytest.mark.parametrize(
    ("how", "given"), [("markers", True), ("activations", True), ("weights", True), ("auto", False)]
)
def test_neurons_are_compared_by_what_the_split_goes_by(how: Any, given: bool) -> None:
    active = torch.rand(H, 5) if given else None
    found = neuron_features(weights(), how, active)
    if how == "markers":
        assert found is active
    elif how == "activations":
        assert active is not None
        assert torch.allclose(found, active / active.norm(dim=1, keepdim=True))
    else:
        assert torch.allclose(found, weights().w1 / weights().w1.norm(dim=1, keepdim=True))


# ----------------------------------------------------------------------------------------------------------------------


def test_the_last_expert_gets_the_neurons_that_are_left() -> None:
    for how in ("weights", "random"):
        labels = split_neurons(weights(), 3, 9, split=how, shared=1, active=torch.rand(H, 5), seed=0)  # type: ignore[arg-type]
        assert labels.bincount().tolist() == [9, 9, 6]
