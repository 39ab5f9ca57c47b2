"""Parameters and buffers between the linears: what scales neurons is folded into the weights, exactly."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import surgeon
from surgeon.measure.meter import parameter_count
from surgeon.moe.site import find_moes
from surgeon.passes import Lower, Moeify, Sparsify, SwapActivation
from surgeon.sites.search import find_ffns
from tests.small_models import Function

D, H = 6, 8
X = torch.randn(2, 5, D, generator=torch.Generator().manual_seed(0))


def numbers(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(3))


def learned(*shape: int) -> nn.Parameter:
    return nn.Parameter(numbers(*shape))


MASK = torch.tensor([1, 0, 1, 1, 0, 1, 1, 1])


def plain(between: Callable[..., Tensor], **parts: Any) -> Callable[[], nn.Module]:
    return lambda: Function(lambda m, x: m.down(between(m, m.up(x))), up=(D, H), down=(H, D), **parts)


def gated(between: Callable[..., Tensor], **parts: Any) -> Callable[[], nn.Module]:
    return lambda: Function(
        lambda m, x: m.down(between(m, m.gate(x), m.up(x))), gate=(D, H), up=(D, H), down=(H, D), **parts
    )


def fused(between: Callable[..., Tensor], **parts: Any) -> Callable[[], nn.Module]:
    return lambda: Function(lambda m, x: m.down(between(m, m.up(x))), up=(D, 2 * H), down=(H, D), **parts)


FOUND: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "scale after": (plain(lambda m, h: F.relu(h) * m.s, s=learned(H)), "relu"),
    "scale before": (plain(lambda m, h: F.gelu(m.s * h), s=learned(H)), "gelu"),
    "scales before and after": (plain(lambda m, h: m.t * F.silu(h * m.s), s=learned(H), t=learned(1, 1, H)), "silu"),
    "divided": (plain(lambda m, h: F.gelu(h / m.s) / m.t, s=learned(H), t=learned(H)), "gelu"),
    "one number": (plain(lambda m, h: F.gelu(h * m.s), s=learned(1)), "gelu"),
    "a scalar": (plain(lambda m, h: F.gelu(h) * m.s, s=learned()), "gelu"),
    "with a number": (plain(lambda m, h: 2 * F.gelu(0.5 * h) * m.s, s=learned(H)), "gelu"),
    "mask": (plain(lambda m, h: F.relu(h) * m.mask, mask=MASK.float()), "relu"),
    "mask before": (plain(lambda m, h: torch.sigmoid(2 * h * m.mask), mask=MASK.float()), "sigmoid"),
    "mask of truth values": (plain(lambda m, h: F.gelu(h) * m.mask, mask=MASK.bool()), "gelu"),
    "mask by where": (plain(lambda m, h: torch.where(m.mask, F.gelu(h), 0.0), mask=MASK.bool()), "gelu"),
    "mask by filling": (plain(lambda m, h: F.gelu(h).masked_fill(~m.mask, 0), mask=MASK.bool()), "gelu"),
    "mask by comparing": (plain(lambda m, h: F.gelu(h.masked_fill(m.mask == 0, 0)), mask=MASK), "gelu"),
    "mask of integers": (plain(lambda m, h: F.gelu(h) * m.mask, mask=MASK), "gelu"),
    "computed": (plain(lambda m, h: F.gelu(h) * torch.exp(m.s).view(1, 1, -1) * m.mask.to(h), s=learned(H), mask=MASK),
                 "gelu"),
    "prelu": (plain(lambda m, h: m.act(h), act=nn.PReLU()), "prelu"),
    "prelu with slopes": (plain(lambda m, h: torch.where(h > 0, h, m.a * h), a=learned(H)), "prelu"),
    "prelu and scale": (plain(lambda m, h: m.s * (F.relu(h) - m.a * F.relu(-h)), a=learned(H), s=learned(H)), "prelu"),
    "gated": (gated(lambda m, g, u: F.silu(m.s * g) * u * m.t, s=learned(H), t=learned(H)), "silu"),
    "gated, of up": (gated(lambda m, g, u: F.silu(g) * (m.s * u), s=learned(H)), "silu"),
    "gated prelu": (gated(lambda m, g, u: m.act(g) * u, act=nn.PReLU()), "prelu"),
    "fused": (fused(lambda m, h: F.silu(h[..., :H] * m.s) * h[..., H:] * m.t, s=learned(H), t=learned(H)), "silu"),
    "fused, of both": (fused(lambda m, h: F.glu(h * m.s, -1), s=learned(2 * H)), "sigmoid"),
    "fused prelu": (fused(lambda m, h: torch.where(h[..., :H] > 0, 1.0, m.a) * h[..., :H] * h[..., H:], a=learned(H)),
                    "prelu"),
}  # fmt: skip


@pytest.mark.parametrize("name", FOUND)
def test_folded_exactly(name: str) -> None:
    torch.manual_seed(0)
    make, activation = FOUND[name]
    model = make().eval()
    graph = surgeon.trace(model, X)
    (site,), rejections = find_ffns(graph)
    assert not rejections
    assert site.describe.endswith(f"FFN 6→8→6 {activation}")
    assert site.parameters(graph) == sum(p.numel() for p in model.parameters()) == parameter_count(graph)
    report = Moeify(experts=4, router_width=8).apply(graph, inputs=X)
    assert report.matched
    assert {name for name, _ in graph.named_parameters() if ".moe." not in name} == set()
    want = model(X)
    for _ in range(2):
        assert float((graph(X) - want).abs().max() / want.abs().max()) < 1e-5
        Lower().apply(graph)
    (moe,) = find_moes(graph)
    assert moe.experts * moe.size - moe.filling == (2 * H if activation == "prelu" else H)


@pytest.mark.parametrize("name", FOUND)
def test_another_activation_keeps_the_scales(name: str) -> None:
    torch.manual_seed(0)
    graph = surgeon.trace(FOUND[name][0]().eval(), X)
    (before,), _ = find_ffns(graph)
    report = SwapActivation(to="relu2").apply(graph, inputs=X)
    assert report.sites[0].before == FOUND[name][1]
    (after,), _ = find_ffns(graph)
    assert (after.activation, after.nonlinearity.slopes) == ("relu2", None)
    assert [factor.at for factor in after.nonlinearity.factors] == [factor.at for factor in before.nonlinearity.factors]
    h = numbers(3, 2 * H if before.fused else H)
    z = h if before.fused is None else h[:, :H]
    assert after.activations(graph, h).shape == z.shape


def test_activations_are_those_of_the_model() -> None:
    torch.manual_seed(0)
    h = numbers(3, H)
    for name, want in (
        ("scale before", lambda m: F.gelu(m.s * h)),
        ("divided", lambda m: F.gelu(h / m.s)),
        ("prelu", lambda m: m.act(h)),
    ):
        graph = surgeon.trace(model := FOUND[name][0](), X)
        (site,), _ = find_ffns(graph)
        assert torch.allclose(site.activations(graph, h), want(model), atol=1e-6), name


def test_taps_stand_only_where_sparsity_can_be_measured() -> None:
    for name, tapped in (("scale after", True), ("mask before", False), ("prelu", False)):
        graph = surgeon.trace(FOUND[name][0](), X)
        matched, refused = Sparsify().explain(graph)
        assert bool(matched) == tapped, name
        assert [rejection.code for rejection in refused] == ([] if tapped else ["parameter-between"])


def test_layers_that_share_weights_share_constants_too() -> None:
    def twice(m: Any, x: Tensor) -> Tensor:
        for _ in range(2):
            x = x + m.down(F.gelu(m.up(x)) * torch.exp(m.s))
        return x

    graph = surgeon.trace(Function(twice, up=(D, H), down=(H, D), s=learned(H)), X)
    (site,), rejections = find_ffns(graph)
    assert len(site.calls) == 2
    assert not rejections
