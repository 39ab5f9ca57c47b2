"""Routers: what they compute, and what they are asked to predict."""

from __future__ import annotations

from typing import Any, get_args

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from surgeon.kernels.activations import ACTIVATIONS
from surgeon.kernels.experts import Experts
from surgeon.moe.router import Objective, Router, activation_sums, expert_norms, router_loss, target
from surgeon.sites.ffn import FFNWeights

D, E, S = 6, 4, 5


def experts(*, gated: bool = False, bias: bool = True, d_out: int = 7, seed: int = 0) -> Experts:
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    return Experts(
        draw(E, S, D),
        draw(E, S) if bias else None,
        draw(E, S, D) if gated else None,
        draw(E, S) if gated and bias else None,
        draw(E, S, d_out),
    )


X = torch.randn(40, D, generator=torch.Generator().manual_seed(1))
KINDS = {
    "plain": experts(),
    "biasless": experts(bias=False),
    "gated": experts(gated=True),
    "gated_biasless": experts(gated=True, bias=False),
    "narrow": experts(d_out=3),  # narrower than an expert: without the Gram matrix
}


def activations(weights: Experts, x: Tensor, activation: str) -> Tensor:
    """[N, E, s] in float64, one neuron after the other."""
    act = ACTIVATIONS[activation].fn
    w = Experts(*(None if part is None else part.double() for part in weights))  # type: ignore[arg-type]
    columns = []
    for expert in range(len(w.w1)):
        for neuron in range(w.w1.shape[1]):
            up = x.double() @ w.w1[expert, neuron]
            up = up if w.b1 is None else up + w.b1[expert, neuron]
            if w.gate is not None:
                gate = x.double() @ w.gate[expert, neuron]
                up = act(gate if w.b_gate is None else gate + w.b_gate[expert, neuron]) * up
            else:
                up = act(up)
            columns.append(up)
    return torch.stack(columns, 1).unflatten(1, w.w1.shape[:2])


def true_norms(weights: Experts, x: Tensor, activation: str) -> Tensor:
    return torch.einsum("nes,eso->neo", activations(weights, x, activation), weights.w2.double()).norm(dim=-1)


# --- the module -------------------------------------------------------------------------------------------------------


def test_router_is_as_published() -> None:
    torch.manual_seed(0)
    router = Router(D, 8, E)
    want = (F.relu(X @ router.fc1.weight.t()) @ router.fc2.weight.t()).abs()
    assert torch.equal(router(X), want)
    assert sorted(dict(router.named_parameters())) == ["fc1.weight", "fc2.weight"]


@pytest.mark.parametrize("kind", KINDS)
def test_router_of_neurons_scores_by_their_hidden_values(kind: str) -> None:
    weights = KINDS[kind].flat()
    neurons, bias = torch.tensor([3, 8, 11, 19]), weights.b1 is not None
    router = Router(D, None, E, bias=bias, activation="silu", gated=weights.gate is not None)
    router.start_from_neurons(neurons, FFNWeights(*weights, None))

    def scaled(rows: Tensor, bias: Tensor | None) -> Tensor:
        length = rows[neurons].norm(dim=1)
        given = 0 if bias is None else bias[neurons] / length
        return X @ (rows[neurons] / length[:, None]).t() + given

    up, act = scaled(weights.w1, weights.b1), ACTIVATIONS["silu"].fn
    want = act(up) if weights.gate is None else act(scaled(weights.gate, weights.b_gate)) * up
    want = want.abs()
    assert torch.allclose(router(X), want, atol=1e-5)
    assert router.fc1 is None
    assert {p.shape for p in router.parameters() if p.dim() == 2} == {(E, D)}


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("hidden", ["relu", "tanh"])
@pytest.mark.parametrize("output", ["abs", "relu", "softplus", "exp", "sigmoid"])
def test_router_is_what_its_options_say(bias: bool, hidden: Any, output: Any) -> None:
    torch.manual_seed(0)
    router = Router(D, 8, E, bias=bias, hidden=hidden, output=output)
    logits = router.fc2(getattr(torch, hidden)(router.fc1(X)))
    want = F.softplus(logits, 50.0) if output == "softplus" else getattr(torch, output)(logits)
    assert torch.allclose(router(X), want, atol=1e-6)
    assert bool((router(X) >= 0).all())
    assert (router.fc1.bias is not None) == bias


@pytest.mark.parametrize("bias", [False, True])
def test_steps_write_down_what_forward_computes(bias: bool) -> None:
    """`lower` writes the router into the graph by the steps."""
    torch.manual_seed(0)
    router = Router(D, 8, E, bias=bias, output="exp")
    written: list[str] = []
    asked: list[str] = []

    def step(op: Any, *args: Any) -> Any:
        written.append(str(op))
        return op(*args)

    def linear(name: str, x: Any) -> Any:
        asked.append(name)
        return router.get_submodule(name)(x)

    assert torch.equal(router.steps(step, X, linear), router(X))
    assert written == ["aten.relu.default", "aten.exp.default"]
    assert asked == ["fc1", "fc2"]


def test_router_of_one_layer() -> None:
    torch.manual_seed(0)
    router = Router(D, None, E)
    assert list(dict(router.named_parameters())) == ["fc2.weight"]
    assert torch.equal(router(X), (X @ router.fc2.weight.t()).abs())
    assert router.first is router.fc2
    wide = Router(D, 8, E)
    assert wide.first is wide.fc1


@pytest.mark.parametrize("width", [None, E])
def test_centres_are_means_of_normalised_rows(width: int | None) -> None:
    rows = KINDS["plain"].w1
    router = Router(D, width, E, hidden="tanh", output="sigmoid")
    router.start_from_centres(rows)
    products = torch.stack(
        [torch.stack([X @ (row / row.norm()) for row in expert]).mean(0) for expert in rows], dim=1
    )  # fmt: skip
    want = torch.sigmoid(products if width is None else products.tanh())
    assert torch.allclose(router(X), want, atol=1e-6)
    assert torch.equal(router(X).argsort(-1), products.argsort(-1))


def test_router_takes_dtype_and_device_of_what_it_is_like() -> None:
    router = Router(D, 8, E, bias=True, like=torch.zeros(1, dtype=torch.float64))
    assert {parameter.dtype for parameter in router.parameters()} == {torch.float64}


# --- targets ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("activation", ["relu", "gelu", "silu"])
def test_expert_norms_are_those_of_the_outputs(kind: str, activation: str) -> None:
    got = expert_norms(X, KINDS[kind], activation)
    assert (got.shape, got.dtype) == ((40, E), torch.float32)
    assert torch.allclose(got.double(), true_norms(KINDS[kind], X, activation), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", ["plain", "gated"])
def test_norms_may_be_those_of_hidden_activations(kind: str) -> None:
    want = activations(KINDS[kind], X, "relu").norm(dim=-1)
    assert torch.allclose(expert_norms(X, KINDS[kind], "relu", "hidden").double(), want, rtol=1e-5, atol=1e-5)
    shares = target("relative", X, KINDS[kind], "relu", "hidden")
    assert torch.allclose(shares.double(), want / want.amax(-1, keepdim=True), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", ["plain", "narrow"])
def test_norm_of_a_silent_expert_is_zero_and_not_nan(kind: str) -> None:
    weights = KINDS[kind]._replace(b1=torch.full((E, S), -1e3))
    assert torch.equal(expert_norms(X, weights, "relu"), torch.zeros(40, E))


def test_expert_norms_of_half_precision_weights() -> None:
    half = Experts(*(None if part is None else part.bfloat16() for part in KINDS["plain"]))  # type: ignore[arg-type]
    got = expert_norms(X.bfloat16(), half, "relu")
    assert got.dtype == torch.float32
    assert torch.allclose(got.double(), true_norms(KINDS["plain"], X, "relu"), rtol=0.05, atol=0.3)


@pytest.mark.parametrize("kind", ["plain", "gated"])
def test_activation_sums_leave_out_what_is_below_zero(kind: str) -> None:
    want = activations(KINDS[kind], X, "gelu").clamp_min(0).sum(-1)
    assert torch.allclose(activation_sums(X, KINDS[kind], "gelu").double(), want, rtol=1e-5, atol=1e-5)


def test_target_of_each_objective() -> None:
    weights = KINDS["plain"]
    norms = true_norms(weights, X, "relu")
    shares = norms / norms.amax(-1, keepdim=True)
    sums = activations(weights, X, "relu").sum(-1)
    want = {"norm": norms, "relative": shares, "log": (shares + 0.01).log(), "activation": sums / sums.max()}
    assert set(want) == set(get_args(Objective))
    for objective, value in want.items():
        got = target(objective, X, weights, "relu")  # type: ignore[arg-type]
        assert torch.allclose(got.double(), value, rtol=1e-4, atol=1e-5), objective


@pytest.mark.parametrize("objective", get_args(Objective))
def test_targets_of_silent_layers_are_finite(objective: Objective) -> None:
    weights = KINDS["plain"]._replace(b1=torch.full((E, S), -1e3))
    assert bool(target(objective, X, weights, "relu").isfinite().all())


# --- loss -------------------------------------------------------------------------------------------------------------


def test_loss_is_mean_squared_error() -> None:
    scores, wanted = torch.tensor([[1.0, 2.0]]), torch.tensor([[3.0, 1.0]])
    assert float(router_loss("norm", scores, wanted)) == pytest.approx((4 + 1) / 2)
    assert float(router_loss("relative", scores, wanted)) == pytest.approx((4 + 1) / 2)
    assert float(router_loss("log", scores.exp(), wanted)) == pytest.approx((4 + 1) / 2)


@pytest.mark.parametrize("objective", ["norm", "relative", "log"])
def test_underestimates_weigh_what_they_are_said_to(objective: Any) -> None:
    scores, wanted = torch.tensor([[1.0, 2.0]]), torch.tensor([[3.0, 1.0]])
    scores = scores.exp() if objective == "log" else scores
    assert float(router_loss(objective, scores, wanted, 3.0)) == pytest.approx((3 * 4 + 1) / 2)
    assert float(router_loss(objective, scores, wanted, 0.5)) == pytest.approx((0.5 * 4 + 1) / 2)


def test_loss_of_activations_is_cross_entropy() -> None:
    logits, wanted = torch.tensor([[2.0, -1.0]]), torch.tensor([[1.0, 0.5]])
    scores = logits.sigmoid()
    want = -(scores[0, 0].log() + 0.5 * scores[0, 1].log() + 0.5 * (1 - scores[0, 1]).log()) / 2
    assert float(router_loss("activation", logits, wanted)) == pytest.approx(float(want))


def test_a_router_that_is_certain_and_wrong_still_learns() -> None:
    router = Router(D, 4, E, hidden="tanh", output="sigmoid")
    with torch.no_grad():
        router.fc2.weight.fill_(50.0)
    logits = router.logits(X)
    assert torch.equal(router(X), logits.sigmoid())
    certain = (router(X) == 0) | (router(X) == 1)
    assert bool(certain.any())
    logits.retain_grad()
    loss = router_loss("activation", logits, 1.0 - router(X).detach().round())
    loss.backward()
    assert bool(loss.isfinite())
    assert logits.grad is not None
    assert bool((logits.grad[certain].abs() > 0.5 / logits.numel()).all())
