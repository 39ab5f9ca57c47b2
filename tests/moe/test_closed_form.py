"""Routers in closed form: how well neurons of a layer predict its experts, and which ones are taken."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import surgeon.moe.closed_form
from surgeon.kernels.experts import Experts
from surgeon.moe.closed_form import fit_closed_form
from surgeon.moe.router import Objective, Router, target

D, WIDE = 6, 24  # width of the inputs, hidden neurons of the layers


def layer(*, gated: bool = False, bias: bool = True, seed: int = 0, size: int = 4) -> Experts:
    """WIDE neurons in experts of `size`, half of which are much larger than the others."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    count = WIDE // size
    scale = torch.where(torch.arange(count) % 2 == 0, 3.0, 0.5)[:, None, None]
    return Experts(
        draw(count, size, D), draw(count, size) if bias else None, draw(count, size, D) if gated else None,
        draw(count, size) if gated and bias else None, draw(count, size, 8) * scale,
    )  # fmt: skip


def fitted(layers: Sequence[Experts], width: int, objective: Objective = "norm", tokens: int = 800) -> list[Router]:
    """Routers that share one trunk, fitted to the layers."""
    x = torch.randn(tokens, D, generator=torch.Generator().manual_seed(3))
    torch.manual_seed(0)
    routers = [Router(D, width, len(one.w1), bias=True) for one in layers]
    for router in routers[1:]:
        router.fc1 = routers[0].fc1
    with torch.no_grad():
        fit_closed_form(routers, x, [(one, "relu") for one in layers], objective)
    return routers


def unexplained(router: Router, one: Experts, objective: Objective = "norm") -> float:
    """Share of the variance of the targets that is left, on tokens that were not seen."""
    x = torch.randn(500, D, generator=torch.Generator().manual_seed(9))
    wanted = target(objective, x, one, "relu")
    with torch.no_grad():
        return float((router(x) - wanted).square().sum() / (wanted - wanted.mean(0)).square().sum())


@pytest.mark.parametrize("kind", ["plain", "biasless", "gated"])
@pytest.mark.parametrize("objective", ["norm", "relative"])
def test_closed_form_predicts_the_norms(kind: str, objective: Any) -> None:
    one = layer(gated=kind == "gated", bias=kind != "biasless")
    (router,) = fitted([one], 20, objective)
    assert unexplained(router, one, objective) < (0.75 if kind == "gated" else 0.3)


def test_closed_form_is_the_best_that_its_features_allow() -> None:
    """fc2 is what least squares over the chosen neurons gives."""
    one = layer()
    (router,) = fitted([one], 8)
    x = torch.randn(800, D, generator=torch.Generator().manual_seed(3))
    features = F.pad(F.relu(router.fc1(x)), (0, 1), value=1.0).double()
    best = torch.linalg.lstsq(features, target("norm", x, one, "relu").double()).solution
    assert torch.allclose(router.fc2.weight.double(), best[:-1].t(), rtol=0.02, atol=0.02)


def test_closed_form_takes_neurons_of_the_layer_and_the_useful_ones_first() -> None:
    one = layer()
    (router,) = fitted([one], 12)
    rows = one.w1.flatten(0, 1)
    chosen = [(rows == row).all(1).nonzero().item() for row in router.fc1.weight]
    assert len(set(chosen)) == 12
    assert one.b1 is not None
    assert torch.equal(router.fc1.bias, one.b1.flatten()[chosen])
    # neurons of the large experts, every other one, explain most
    assert sum((index // 4) % 2 == 0 for index in chosen[:6]) >= 5
    random = Router(D, 12, len(one.w1), bias=True)
    assert unexplained(router, one) < 0.5 * unexplained(random, one)


def test_more_neurons_explain_more() -> None:
    one = layer()
    left = [unexplained(fitted([one], width)[0], one) for width in (2, 6, 24)]
    assert left == sorted(left, reverse=True)
    assert left[2] < 0.5 * left[0]


def test_one_trunk_serves_all_layers_that_share_it() -> None:
    layers = [layer(seed=0), layer(seed=5, size=8), layer(gated=True, seed=6)]
    routers = fitted(layers, 24)
    assert all(router.fc1 is routers[0].fc1 for router in routers)
    for router, one in zip(routers[:2], layers[:2], strict=True):
        assert unexplained(router, one) < 0.3
    # layers count alike, whatever the size of what they give
    loud = layers[1]._replace(w2=layers[1].w2 * 1000)
    again = fitted([layers[0], loud, layers[2]], 24)
    assert torch.equal(again[0].fc1.weight, routers[0].fc1.weight)


def test_a_trunk_wider_than_there_are_neurons_is_filled_and_no_worse() -> None:
    one = layer()
    (exact,), (wide,) = fitted([one], WIDE), fitted([one], 3 * WIDE + 5)
    assert wide.fc1.weight.shape == (3 * WIDE + 5, D)
    assert bool(torch.cat([p.detach().flatten() for p in wide.parameters()]).isfinite().all())
    assert unexplained(wide, one) == pytest.approx(unexplained(exact, one), abs=0.02)


def test_closed_form_survives_neurons_that_are_silent_or_alike() -> None:
    one = layer()
    assert one.b1 is not None
    one.w1[0] = one.w1[1]
    one.b1[0] = one.b1[1]
    one.b1[3] = -1e3
    (router,) = fitted([one], WIDE)
    assert bool(torch.cat([p.detach().flatten() for p in router.parameters()]).isfinite().all())
    assert unexplained(router, one) < 0.2


def test_closed_form_of_more_neurons_than_are_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    one = layer()
    (all_compared,) = fitted([one], 6)
    monkeypatch.setattr(surgeon.moe.closed_form, "_CANDIDATES", 8)
    (few_compared,) = fitted([one], 6)
    rows = one.w1.flatten(0, 1)
    assert all(bool((rows == row).all(1).any()) for row in few_compared.fc1.weight)
    assert unexplained(all_compared, one) < unexplained(few_compared, one) < 0.3
    (wider,) = fitted([one], 20)  # than there are candidates
    assert unexplained(wider, one) < 1.1 * unexplained(few_compared, one)


def test_where_few_neurons_tell_anything_the_trunk_repeats_them() -> None:
    """Two neurons that ever fire: each stands in the trunk as often, and none of the silent ones does."""
    one = layer()
    assert one.b1 is not None
    one.b1.fill_(-100.0)
    one.b1[0, 2] = one.b1[3, 1] = 1.0
    (router,) = fitted([one], 6)
    rows = one.w1.flatten(0, 1)
    chosen = [(rows == row).all(1).nonzero().item() for row in router.fc1.weight]
    assert sorted(chosen) == [2] * 3 + [13] * 3
    one.b1.fill_(-100.0)
    (silent,) = fitted([one], 6)
    assert bool(silent.fc2.weight.isfinite().all())
