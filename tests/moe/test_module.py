"""Experts: all of them together are the dense layer, and tau says which of them run."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import surgeon
from surgeon.errors import UsageError
from surgeon.graph.traced import fork
from surgeon.kernels.activations import ACTIVATIONS
from surgeon.moe.knobs import get_tau, set_tau
from surgeon.moe.module import MoE
from surgeon.moe.router import Router
from surgeon.moe.site import find_moes
from surgeon.passes import Lower, Moeify
from surgeon.sites.ffn import FFNWeights
from tests.small_models import vectors

D, H, OUT, E = 6, 24, 5, 4


def weights(*, gated: bool = False, bias: bool = True, d_out: int = OUT) -> FFNWeights:
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    return FFNWeights(
        draw(H, D),
        draw(H) if bias else None,
        draw(H, D) if gated else None,
        draw(H) if gated and bias else None,
        draw(H, d_out),
        draw(d_out) if bias else None,
    )


def dense(w: FFNWeights, x: Tensor, activation: str) -> Tensor:
    act, up = ACTIVATIONS[activation].fn, F.linear(x, w.w1, w.b1)
    hidden = act(up) if w.gate is None else act(F.linear(x, w.gate, w.b_gate)) * up
    return F.linear(hidden, w.w2.t(), w.b2)


def labels() -> Tensor:
    return torch.arange(H)[torch.randperm(H, generator=torch.Generator().manual_seed(1))] % E


def moe(w: FFNWeights, activation: str = "relu") -> MoE:
    torch.manual_seed(0)
    return MoE(w, labels(), E, activation, Router(D, 8, E))


X = torch.randn(3, 7, D, generator=torch.Generator().manual_seed(2))
KINDS = {
    "plain": weights(),
    "biasless": weights(bias=False),
    "gated": weights(gated=True),
    "gated_biasless": weights(gated=True, bias=False),
    "square": weights(d_out=D),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("activation", ["relu", "gelu", "silu"])
def test_all_experts_are_the_dense_layer(kind: str, activation: str) -> None:
    w = KINDS[kind]
    y = moe(w, activation)(X).detach()
    want = dense(w, X, activation)
    assert float((y - want).abs().max() / want.abs().max()) < 1e-6


def test_neurons_are_laid_out_by_label() -> None:
    w = KINDS["gated"]
    module, order = moe(w), labels()
    assert module.w1 is not None
    assert module.w1.shape == (E, H // E, D)
    for expert in range(E):
        rows = (order == expert).nonzero().flatten()
        for mine, theirs in (
            (module.w1, w.w1), (module.b1, w.b1), (module.gate, w.gate), (module.b_gate, w.b_gate), (module.w2, w.w2)
        ):  # fmt: skip
            assert mine is not None
            assert theirs is not None
            assert torch.equal(mine[expert], theirs[rows])
            assert mine.is_contiguous()
    assert torch.equal(module.b2, w.b2)  # type: ignore[arg-type]


def test_experts_own_their_weights() -> None:
    w = KINDS["plain"]
    module = moe(w)
    with torch.no_grad():
        module.b2.zero_()  # type: ignore[union-attr]
        module.w1.zero_()  # type: ignore[union-attr]
    assert w.b2 is not None
    assert w.b2.any()
    assert w.w1.any()


@pytest.mark.parametrize("tau", [0.0, 0.5, 1.0])
def test_tau_selects_by_share_of_the_largest_score(tau: float) -> None:
    w = KINDS["plain"]
    module = moe(w)
    module.tau.fill_(tau)
    with torch.no_grad():
        scores = module.router(X)
        want = w.b2.expand(3, 7, OUT).clone()  # type: ignore[union-attr]
        for expert in range(E):
            rows = (labels() == expert).nonzero().flatten()
            part = dense(FFNWeights(w.w1[rows], w.b1[rows], None, None, w.w2[rows], None), X, "relu")  # type: ignore[index]
            chosen = scores[..., expert] >= tau * scores.amax(-1)
            want += part * chosen.unsqueeze(-1)
        assert torch.allclose(module(X), want, atol=1e-5)


def test_gradients_reach_the_experts_and_not_the_router() -> None:
    module = moe(KINDS["plain"])
    module.tau.fill_(0.5)
    module(X).sum().backward()
    assert module.w1 is not None
    assert module.w1.grad is not None
    assert module.w1.grad.any()
    assert module.router.fc1.weight.grad is None


# --- in a graph -------------------------------------------------------------------------------------------------------


@pytest.fixture(params=["module", "dynamic"])
def graph(request: pytest.FixtureRequest, traces: Any) -> Any:
    made = traces("stack:gelu")
    Moeify(experts=4, router_width=8).apply(made)
    if request.param == "dynamic":
        Lower().apply(made)
    assert {site.form for site in find_moes(made)} == {request.param}
    return made


def test_sites(graph: Any) -> None:
    sites = find_moes(graph)
    assert [site.path for site in sites] == ["blocks.0.ffn.moe", "blocks.1.ffn.moe"]
    site = sites[0]
    assert site.experts == 4
    assert site.describe == "4 experts × 8"
    assert site.expert_multiply_adds == 8 * (16 + 16)
    assert site.router_parameters == 16 * 8 + 8 * 4
    assert site.multiply_adds == 4 * site.expert_multiply_adds + site.router_parameters
    assert len(site.nodes) == 1


def test_tau_for_all_by_path_and_by_pattern(graph: Any) -> None:
    first, second = "blocks.0.ffn.moe", "blocks.1.ffn.moe"
    assert surgeon.set_tau(graph, 0.5) == [first, second]
    assert surgeon.get_tau(graph) == {first: 0.5, second: 0.5}
    assert set_tau(graph, 0.25, "blocks.1.ffn") == [second]
    assert get_tau(graph) == {first: 0.5, second: 0.25}
    assert set_tau(graph, 0.125, second) == [second]
    assert set_tau(graph, 1.0, "blocks.*") == [first, second]
    assert set_tau(graph, {first: 0.5, "blocks.1.ffn": 0.0}) == [first, second]
    assert get_tau(graph) == {first: 0.5, second: 0.0}


def test_tau_takes_effect_at_the_next_call(graph: Any) -> None:
    inputs = vectors()
    want = graph(**inputs)
    set_tau(graph, 1.0)
    changed = graph(**inputs)
    assert not torch.allclose(changed, want, atol=1e-5)
    set_tau(graph, 0.0)
    assert torch.equal(graph(**inputs), want)


def test_tau_of_a_fork_is_shared(graph: Any) -> None:
    copied = fork(graph)
    set_tau(copied, 0.5)
    assert set(get_tau(graph).values()) == {0.5}


@pytest.mark.parametrize(("tau", "path", "words"), [
    (1.5, None, "tau is 1.5.*from 0 to 1"),
    (-0.1, None, "tau is -0.1"),
    (float("nan"), None, "tau is nan"),
    (0.5, "blocks.7", "No layer 'blocks.7'. Layers with experts: blocks.0.ffn.moe, blocks.1.ffn.moe"),
    ({"nowhere": 0.5}, None, "No layer 'nowhere'"),
])  # fmt: skip
def test_wrong_tau(graph: Any, tau: Any, path: str | None, words: str) -> None:
    with pytest.raises(UsageError, match=words):
        set_tau(graph, tau, path)
    assert set(get_tau(graph).values()) == {0.0}


def test_tau_without_experts(traces: Any) -> None:
    with pytest.raises(UsageError, match=r"The graph has no experts to set anything for\. Apply moeify first"):
        set_tau(traces("stack:gelu"), 0.5)
    assert get_tau(traces("stack:gelu")) == {}


def test_a_mapping_with_a_wrong_entry_changes_nothing(graph: Any) -> None:
    with pytest.raises(UsageError):
        set_tau(graph, {"blocks.0.ffn": 0.5, "nowhere": 0.5})
    assert set(get_tau(graph).values()) == {0.0}
