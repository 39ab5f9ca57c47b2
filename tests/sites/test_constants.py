"""Parameters and buffers between the linears: what scales neurons is folded into the weights, exactly."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import surgeon
from surgeon.graph.traced import TracedGraph, fork
from surgeon.moe.site import MoESite, find_moes
from surgeon.passes import Lower, Moeify, Sparsify, SwapActivation
from surgeon.sites.ffn import FFN
from surgeon.sites.search import find_ffns
from tests.small_models import Function, Many

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
    "scale_after": (plain(lambda m, h: F.relu(h) * m.s, s=learned(H)), "relu"),
    "scale_before": (plain(lambda m, h: F.gelu(m.s * h), s=learned(H)), "gelu"),
    "scales_before_and_after": (plain(lambda m, h: m.t * F.silu(h * m.s), s=learned(H), t=learned(1, 1, H)), "silu"),
    "divided": (plain(lambda m, h: F.gelu(h / m.s) / m.t, s=learned(H), t=learned(H)), "gelu"),
    "one_number": (plain(lambda m, h: F.gelu(h * m.s), s=learned(1)), "gelu"),
    "a_scalar": (plain(lambda m, h: F.gelu(h) * m.s, s=learned()), "gelu"),
    "with_a_number": (plain(lambda m, h: 2 * F.gelu(0.5 * h) * m.s, s=learned(H)), "gelu"),
    "mask": (plain(lambda m, h: F.relu(h) * m.mask, mask=MASK.float()), "relu"),
    "mask_before": (plain(lambda m, h: torch.sigmoid(2 * h * m.mask), mask=MASK.float()), "sigmoid"),
    "mask_of_truth_values": (plain(lambda m, h: F.gelu(h) * m.mask, mask=MASK.bool()), "gelu"),
    "mask_by_where": (plain(lambda m, h: torch.where(m.mask, F.gelu(h), 0.0), mask=MASK.bool()), "gelu"),
    "mask_by_filling": (plain(lambda m, h: F.gelu(h).masked_fill(~m.mask, 0), mask=MASK.bool()), "gelu"),
    "mask_by_comparing": (plain(lambda m, h: F.gelu(h.masked_fill(m.mask == 0, 0)), mask=MASK), "gelu"),
    "mask_of_integers": (plain(lambda m, h: F.gelu(h) * m.mask, mask=MASK), "gelu"),
    "computed": (plain(lambda m, h: F.gelu(h) * torch.exp(m.s).view(1, 1, -1) * m.mask.to(h), s=learned(H), mask=MASK),
                 "gelu"),
    "prelu": (plain(lambda m, h: m.act(h), act=nn.PReLU()), "prelu"),
    "prelu_with_slopes": (plain(lambda m, h: torch.where(h > 0, h, m.a * h), a=learned(H)), "prelu"),
    "prelu_and_scale": (plain(lambda m, h: m.s * (F.relu(h) - m.a * F.relu(-h)), a=learned(H), s=learned(H)), "prelu"),
    "gated": (gated(lambda m, g, u: F.silu(m.s * g) * u * m.t, s=learned(H), t=learned(H)), "silu"),
    "gated_of_up": (gated(lambda m, g, u: F.silu(g) * (m.s * u), s=learned(H)), "silu"),
    "gated_prelu": (gated(lambda m, g, u: m.act(g) * u, act=nn.PReLU()), "prelu"),
    "fused": (fused(lambda m, h: F.silu(h[..., :H] * m.s) * h[..., H:] * m.t, s=learned(H), t=learned(H)), "silu"),
    "fused_of_both": (fused(lambda m, h: F.glu(h * m.s, -1), s=learned(2 * H)), "sigmoid"),
    "gated_relu_of_both": (gated(lambda m, g, u: F.relu(g) * F.relu(u) * m.s, s=learned(H)), "relu_relu"),
    "fused_relu_of_both": (fused(lambda m, h: 2 * F.relu(h)[..., :H] * F.relu(h)[..., H:]), "relu_relu"),
    "fused_prelu": (fused(lambda m, h: torch.where(h[..., :H] > 0, 1.0, m.a) * h[..., :H] * h[..., H:], a=learned(H)),
                    "prelu"),
}  # fmt: skip


SWAPPED = [name for name, (_, activation) in FOUND.items() if activation != "relu_relu"]


@dataclass(frozen=True)
class Converted:
    model: Many
    sites: dict[str, FFN]
    graph: TracedGraph
    moes: dict[str, MoESite]
    lowered: dict[str, Tensor]


@pytest.fixture(scope="module")
def traced() -> tuple[Many, TracedGraph]:
    torch.manual_seed(0)
    model = Many(**{name: make() for name, (make, _) in FOUND.items()}).eval()
    return model, surgeon.trace(model, X)


@pytest.fixture(scope="module")
def converted(traced: tuple[Many, TracedGraph]) -> Converted:
    model, original = traced
    graph = fork(original)
    sites = {site.path.partition(".")[0]: site for site in find_ffns(graph)[0]}
    Moeify(experts=4, router_width=8).apply(graph, inputs=X)
    lowered = fork(graph)
    Lower().apply(lowered)
    with torch.no_grad():
        outputs = lowered(X)
    return Converted(model, sites, graph, {moe.path.partition(".")[0]: moe for moe in find_moes(graph)}, outputs)


@pytest.mark.parametrize("name", FOUND)
def test_folded_exactly(traced: tuple[Many, TracedGraph], converted: Converted, name: str) -> None:
    activation = FOUND[name][1]
    site, moe, part = converted.sites[name], converted.moes[name], converted.model.get_submodule(name)
    assert site.describe.endswith(f"FFN 6→8→6 {activation}")
    assert site.parameters(traced[1]) == sum(p.numel() for p in part.parameters())
    left = {path for path, _ in converted.graph.named_parameters() if path.startswith(f"{name}.")}
    assert all(path.startswith(f"{moe.path}.") for path in left)
    with torch.no_grad():
        want, got = part(X), converted.graph(X)[name]
    for y in (got, converted.lowered[name]):
        assert float((y - want).abs().max() / want.abs().max()) < 1e-5
    assert moe.experts * moe.size - moe.filling == (2 * H if activation == "prelu" else H)


@pytest.fixture(scope="module")
def swapped(traced: tuple[Many, TracedGraph]) -> dict[str, FFN]:
    graph = fork(traced[1])
    report = SwapActivation(to="relu2").apply(graph, inputs=X)
    assert {change.path.partition(".")[0]: change.before for change in report.sites} == {
        name: activation for name, (_, activation) in FOUND.items() if name in SWAPPED
    }
    assert {refused.code for refused in report.rejected} == {"both-activated"}
    return {site.path.partition(".")[0]: site for site in find_ffns(graph)[0]}


@pytest.mark.parametrize("name", SWAPPED)
def test_another_activation_keeps_the_scales(converted: Converted, swapped: dict[str, FFN], name: str) -> None:
    before, after = converted.sites[name].nonlinearity, swapped[name].nonlinearity
    assert (after.activation, after.slopes) == ("relu2", None)
    assert [factor.at for factor in after.factors] == [factor.at for factor in before.factors]


def test_activations_are_those_of_the_model() -> None:
    torch.manual_seed(0)
    h = numbers(3, H)
    for name, want in (
        ("scale_before", lambda m: F.gelu(m.s * h)),
        ("divided", lambda m: F.gelu(h / m.s)),
        ("prelu", lambda m: m.act(h)),
    ):
        graph = surgeon.trace(model := FOUND[name][0](), X)
        (site,), _ = find_ffns(graph)
        assert torch.allclose(site.activations(graph, h), want(model), atol=1e-6), name


def test_taps_stand_only_where_sparsity_can_be_measured() -> None:
    for name, tapped in (("scale_after", True), ("mask_before", False), ("prelu", False)):
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
