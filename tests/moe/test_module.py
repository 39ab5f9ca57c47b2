"""Experts: all of them together are the dense layer, and tau says which of them run."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from surgeon.kernels.activations import ACTIVATIONS
from surgeon.moe.module import MoE
from surgeon.moe.router import Router
from surgeon.sites.ffn import FFNWeights

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
