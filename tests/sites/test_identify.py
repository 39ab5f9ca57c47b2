"""What stands between two linears is named by running it, in every spelling; what has no name is refused in words."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import surgeon
from surgeon.graph.traced import TracedGraph
from surgeon.kernels.activations import ACTIVATIONS
from surgeon.sites.ffn import FFN
from surgeon.sites.nonlinearity import HALVES, OTHER, half, other_half
from surgeon.sites.rejection import Rejection
from surgeon.sites.search import find_ffns
from tests.small_models import Function, Many

D, H = 6, 8
X = torch.randn(2, 5, D, generator=torch.Generator().manual_seed(0))
SQRT_2_PI = math.sqrt(2 / math.pi)
Between = Callable[..., Tensor]

KNOWN = [name for name, activation in ACTIVATIONS.items() if name != "identity" and activation.up is None]
# Name of the case → (what it must be called, what stands between the two linears).
PLAIN: dict[str, tuple[str, Between]] = {
    **{f"table_{name}": (name, lambda h, name=name: ACTIVATIONS[name].fn(h)) for name in KNOWN},
    "relu_inplace": ("relu", lambda h: F.relu_(h)),
    "relu_clamp": ("relu", lambda h: h.clamp(min=0)),
    "relu_maximum": ("relu", lambda h: torch.maximum(h, torch.zeros_like(h))),
    "relu_where": ("relu", lambda h: torch.where(h > 0, h, 0.0)),
    "relu_mask": ("relu", lambda h: h * (h > 0)),
    "gelu_erf": ("gelu", lambda h: h * 0.5 * (1 + torch.erf(h / math.sqrt(2)))),
    "gelu_tanh_written_out": ("gelu_tanh", lambda h: 0.5 * h * (1 + torch.tanh(SQRT_2_PI * (h + 0.044715 * h**3)))),
    "quick_gelu_written_out": ("quick_gelu", lambda h: h * torch.sigmoid(1.702 * h)),
    "silu_written_out": ("silu", lambda h: h / (1 + torch.exp(-h))),
    "silu_inplace": ("silu", lambda h: F.silu(h, inplace=True)),
    "relu2_power": ("relu2", lambda h: F.relu(h).pow(2)),
    "dropout": ("relu", lambda h: F.dropout(F.relu(h), 0.1, False)),
    "dropout_before": ("relu", lambda h: F.relu(F.dropout(h, 0.1, False))),
    "contiguous": ("gelu", lambda h: F.gelu(h).contiguous().clone()),
    "cast": ("gelu", lambda h: F.gelu(h.double()).float()),
    "flattened": ("relu", lambda h: F.relu(h.flatten(0, 1)).view(h.shape)),
    "transposed_and_back": ("relu", lambda h: F.relu(h.transpose(1, 2)).transpose(1, 2)),
    "scale_before": ("gelu", lambda h: F.gelu(h * 0.5)),
    "divided_before": ("tanh", lambda h: torch.tanh(h / 3.0)),
    "scale_after": ("gelu", lambda h: F.gelu(h) * 1.5),
    "scale_both": ("silu", lambda h: F.silu(0.25 * h) * 2.0),
    "negated": ("relu", lambda h: -F.relu(h)),
}  # fmt: skip
SCALES = {
    "scale_before": (0.5, 1.0), "scale_after": (1.0, 1.5), "scale_both": (0.25, 2.0), "negated": (1.0, -1.0),
    "divided_before": (1 / 3.0, 1.0),
}  # fmt: skip

# Name → (activation, which leaf is the gate, what is computed of the outputs of the two linears, in graph order).
GATED: dict[str, tuple[str, int, Between]] = {
    "gate_first": ("silu", 0, lambda a, b: F.silu(a) * b),
    "up_first": ("silu", 1, lambda a, b: a * F.silu(b)),
    "geglu": ("gelu", 0, lambda a, b: b * F.gelu(a)),
    "reglu": ("relu", 0, lambda a, b: F.relu(a) * b),
    "sigmoid": ("sigmoid", 0, lambda a, b: torch.sigmoid(a) * b),
    "bilinear": ("identity", 0, lambda a, b: a * b),
    "inplace": ("silu", 0, lambda a, b: F.silu(a).mul_(b)),
    "dropout": ("silu", 0, lambda a, b: F.dropout(F.silu(a) * b, 0.1, False)),
    "scaled": ("silu", 0, lambda a, b: F.silu(a) * b * 0.5),
    "written_out": ("silu", 0, lambda a, b: torch.sigmoid(a) * a * b),
}  # fmt: skip

# Name → (activation, where the gate lies, what is computed of the one linear of 2·H outputs).
FUSED: dict[str, tuple[str, str, Between]] = {
    "chunk_gate_first": ("silu", "first", lambda h: (lambda a, b: F.silu(a) * b)(*h.chunk(2, -1))),
    "chunk_gate_second": ("silu", "second", lambda h: (lambda a, b: a * F.silu(b))(*h.chunk(2, -1))),
    "split": ("gelu", "first", lambda h: (lambda a, b: F.gelu(a) * b)(*h.split(H, -1))),
    "split_sizes": ("gelu", "first", lambda h: (lambda a, b: F.gelu(a) * b)(*h.split([H, H], -1))),
    "tensor_split": ("relu", "first", lambda h: (lambda a, b: F.relu(a) * b)(*h.tensor_split(2, -1))),
    "slices": ("relu", "second", lambda h: h[..., :H] * F.relu(h[..., H:])),
    "narrow": ("relu", "first", lambda h: F.relu(h.narrow(-1, 0, H)) * h.narrow(-1, H, H)),
    "glu": ("sigmoid", "second", lambda h: F.glu(h, -1)),
    "interleaved": ("silu", "even", lambda h: F.silu(h[..., ::2]) * h[..., 1::2]),
    "interleaved_odd": ("silu", "odd", lambda h: h[..., ::2] * F.silu(h[..., 1::2])),
    "view_unbind": ("silu", "first", lambda h: (lambda a, b: F.silu(a) * b)(*h.view(*h.shape[:-1], 2, H).unbind(-2))),
    "unflatten_select": (
        "silu", "first", lambda h: F.silu(h.unflatten(-1, (2, H)).select(-2, 0)) * h.unflatten(-1, (2, H))[..., 1, :],
    ),
    "view_unbind_last": (
        "silu", "even", lambda h: (lambda a, b: F.silu(a) * b)(*h.view(*h.shape[:-1], H, 2).unbind(-1)),
    ),
}  # fmt: skip


# Name → (number of first linears, their width, what stands between, the words that the refusal must contain).
REFUSED: dict[str, tuple[int, int, Between, str]] = {
    "identity": (1, H, lambda h: h, "there is no activation between the two linears"),
    "only_scaled": (1, H, lambda h: h * 2.0, "there is no activation between the two linears"),
    "unknown": (1, H, lambda h: torch.sin(h), "not a known activation: f(-1) = -0.8415, f(0) = 0, f(1) = 0.8415"),
    "shifted": (1, H, lambda h: F.relu(h - 1.0), "not a known activation: f(-1) = 0, f(0) = 0, f(1) = 0"),
    "leaky_relu_of_other_slope": (1, H, lambda h: F.leaky_relu(h, 0.3), "not a known activation: f(-1) = -0.3"),
    "rounded": (1, H, lambda h: F.relu(h.round()), "not a known activation"),
    "truncated": (1, H, lambda h: F.relu(h.to(torch.int32).float()), "a conversion to another number type (to)"),
    "halves_added": (1, 2 * H, lambda h: F.relu(h[..., :H]) + h[..., H:], "the two halves of the first linear do not"),
    "halves_both_activated": (1, 2 * H, lambda h: F.relu(h[..., :H]) * torch.tanh(h[..., H:]), "the two halves"),
    "half_unused": (1, 2 * H, lambda h: F.relu(h[..., :H]), "the two halves of the first linear do not combine"),
    "linears_added": (2, H, lambda a, b: F.relu(a) + b, "the two first linears do not combine"),
    "linears_both_activated": (2, H, lambda a, b: F.relu(a) * torch.tanh(b), "the two first linears do not combine"),
    "three_parts": (1, 3 * H, lambda h: F.relu(h[..., :H]), f"{3 * H} values leave the first linear but {H} enter"),
    "merged_heads": (1, 2 * H, lambda h: F.relu(h).view(*h.shape[:1], -1, H), "the values change shape"),
    "every_pair_of_tokens": (
        1, H, lambda h: F.relu(h.unsqueeze(1) * h.unsqueeze(2)), "the values change shape between the linears",
    ),
    "bits": (
        1, H, lambda h: F.relu(h.to(torch.int32).bitwise_and(3).float()), "a conversion to another number type (to)",
    ),
    "tokens_mixed": (1, H, lambda h: F.relu(h) * h.flip(1), ""),
    "neurons_mixed": (1, H, lambda h: F.relu(h).flip(-1), ""),
    "transposed_square": (1, 5, lambda h: F.relu(h).transpose(1, 2), ""),
}  # fmt: skip


def ffn(count: int, width: int, hidden: int, between: Between) -> nn.Module:
    firsts = [f"first{number}" for number in range(count)]

    def compute(m: Any, x: Tensor) -> Tensor:
        return m.down(between(*(getattr(m, name)(x) for name in firsts)))

    return Function(compute, **dict.fromkeys(firsts, (D, width)), down=(hidden, D))


@pytest.fixture(scope="module")
def graph() -> TracedGraph:
    torch.manual_seed(0)
    return surgeon.trace(
        Many(
            **{f"plain_{name}": ffn(1, H, H, between) for name, (_, between) in PLAIN.items()},
            **{f"gated_{name}": ffn(2, H, H, between) for name, (_, _, between) in GATED.items()},
            **{f"fused_{name}": ffn(1, 2 * H, H, between) for name, (_, _, between) in FUSED.items()},
        ),
        X,
    )


@pytest.fixture(scope="module")
def found(graph: TracedGraph) -> dict[str, FFN]:
    return {site.path: site for site in find_ffns(graph)[0]}


@pytest.fixture(scope="module")
def refused() -> tuple[dict[str, FFN], dict[str, Rejection]]:
    torch.manual_seed(0)
    parts = {
        name: ffn(count, width, 5 if name == "transposed_square" else H, between)
        for name, (count, width, between, _) in REFUSED.items()
    }
    sites, rejections = find_ffns(surgeon.trace(Many(**parts), X))
    return {site.path.partition(".")[0]: site for site in sites}, {r.path.partition(".")[0]: r for r in rejections}


@pytest.mark.parametrize("name", PLAIN)
def test_plain(found: dict[str, FFN], name: str) -> None:
    site = found[f"plain_{name}"]
    assert (site.activation, site.gated, site.fused) == (PLAIN[name][0], False, None)
    scales = SCALES.get(name, (1.0, 1.0))
    assert (site.nonlinearity.input_scale, site.nonlinearity.output_scale) == pytest.approx(scales)
    assert site.dropout == (0.1 if "dropout" in name else 0.0)


@pytest.mark.parametrize("name", GATED)
def test_gated(found: dict[str, FFN], name: str) -> None:
    site = found[f"gated_{name}"]
    activation, gate, _ = GATED[name]
    assert (site.activation, site.gated, site.fused) == (activation, True, None)
    if activation != "identity":  # else gate and up may change places
        assert site.calls[0].first[0].path.endswith(f"first{gate}")
        assert site.calls[0].first[1].path.endswith(f"first{1 - gate}")


@pytest.mark.parametrize("name", FUSED)
def test_fused(found: dict[str, FFN], name: str) -> None:
    site = found[f"fused_{name}"]
    assert (site.activation, site.gated, site.fused) == (FUSED[name][0], True, FUSED[name][1])


@pytest.mark.parametrize(
    "kind", [*(f"plain_{n}" for n in PLAIN), *(f"gated_{n}" for n in GATED), *(f"fused_{n}" for n in FUSED)]
)
def test_weights_compute_what_the_model_computes(graph: TracedGraph, found: dict[str, FFN], kind: str) -> None:
    weights, act = found[kind].weights(graph), ACTIVATIONS[found[kind].activation].fn
    up = F.linear(X, weights.w1, weights.b1)
    hidden = act(up) if weights.gate is None else act(F.linear(X, weights.gate, weights.b_gate)) * up
    y = F.linear(hidden, weights.w2.t(), weights.b2)
    assert torch.allclose(y, graph(X)[kind], atol=1e-5)
    for rows in (weights.w1, weights.gate):
        assert rows is None or rows.shape == (H, D)
    assert weights.w2.shape == (H, D)


@pytest.mark.parametrize("name", REFUSED)
def test_refused_in_words(refused: tuple[dict[str, FFN], dict[str, Rejection]], name: str) -> None:
    sites, rejections = refused
    assert name not in sites
    assert REFUSED[name][3] in rejections[name].reason


@pytest.mark.parametrize("which", HALVES)
def test_halves(which: Any) -> None:
    rows = torch.arange(10).unsqueeze(1)
    a, b = half(rows, which), other_half(rows, which)
    assert len(a) == len(b) == 5
    assert torch.equal(torch.cat([a, b]).flatten().sort().values, torch.arange(10))
    assert torch.equal(half(rows, OTHER[which]), b)
    assert half(rows, "odd")[0] == 1
    assert half(rows, "second")[0] == 5
