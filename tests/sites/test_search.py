"""Where a pass can work: what is found under which path, and one test for each reason a candidate is refused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune

import surgeon
from surgeon.graph.traced import TracedGraph
from surgeon.passes import Moeify
from surgeon.sites.rejection import Rejection
from surgeon.sites.search import find_ffns, find_linear_sites
from tests.small_models import Function, Fused, Gated, Many, Plain, Wrapped

D, H = 6, 8
X = torch.randn(2, 5, D, generator=torch.Generator().manual_seed(0))


def pair(between: Callable[..., Tensor], **parts: Any) -> Callable[[], nn.Module]:
    """down(between(module, up x))."""
    return lambda: Function(lambda m, x: m.down(between(m, m.up(x))), up=(D, H), down=(H, D), **parts)


def w(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.randn(*shape))


def reads_hidden(m: Any, x: Tensor) -> Any:
    h = F.relu(m.up(x))
    return m.down(h), h.sum()


def reads_pre_activation(m: Any, x: Tensor) -> Any:
    z = m.up(x)
    return m.down(F.relu(z)), z


def two_inputs(m: Any, x: Tensor) -> Tensor:
    return m.down(F.silu(m.gate(x)) * m.up(x * 2.0))


def three(m: Any, x: Tensor) -> Tensor:
    return m.down(F.silu(m.a(x)) * m.b(x) * m.c(x))


def two_behind_one(m: Any, x: Tensor) -> Tensor:
    return m.down(F.relu(m.mid(F.relu(m.up(x)))))


def constant(m: Any, x: Tensor) -> Tensor:
    return x + m.down(F.relu(m.up(m.table)))


def weight_elsewhere(m: Any, x: Tensor) -> Tensor:
    return m.down(F.relu(m.up(x))) * m.up.weight.norm()


def tied_transposed(m: Any, x: Tensor) -> Tensor:
    return F.linear(F.relu(F.linear(x, m.w)), m.w.t())


def other_activation(m: Any, x: Tensor) -> Tensor:
    return m.down(F.relu(m.up(x))) + m.down(F.gelu(m.up(x)))


REJECTED: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "layer_norm": (pair(lambda m, h: m.norm(F.relu(h)), norm=nn.LayerNorm(H)), "a normalisation (layer_norm) stands"),
    "norm_first": (pair(lambda m, h: F.relu(m.norm(h)), norm=nn.LayerNorm(H)), "a normalisation (layer_norm) stands"),
    "rms_norm": (pair(lambda m, h: m.norm(F.relu(h)), norm=nn.RMSNorm(H)), "a normalisation (rms_norm) stands"),
    "convolution": (
        pair(lambda m, h: F.relu(m.conv(h.transpose(1, 2)).transpose(1, 2)), conv=nn.Conv1d(H, H, 3, padding=1)),
        "a convolution (conv1d) stands",
    ),
    "softmax": (pair(lambda m, h: torch.softmax(h, -1)), "a softmax (softmax) stands"),
    "mean": (pair(lambda m, h: F.relu(h) - h.mean(1, keepdim=True)), "a mean (mean) stands"),
    "maximum_of_tokens": (pair(lambda m, h: F.relu(h - h.amax(1, keepdim=True))), "a maximum (amax) stands"),
    "pooling": (pair(lambda m, h: F.relu(h).sum(1)), "a sum (sum) stands"),
    "cumulative": (pair(lambda m, h: F.relu(h).cumsum(1)), "a cumulative sum (cumsum) stands"),
    "concatenation": (
        lambda: Function(
            lambda m, x: m.down(torch.cat([F.relu(m.up(x)), F.gelu(m.up2(x))], -1)),
            up=(D, H), up2=(D, H), down=(2 * H, D),
        ),
        "a concatenation (cat) stands",
    ),
    "prelu": (pair(lambda m, h: m.act(h), act=nn.PReLU(5)), "a parameter ('prelu.act.weight') stands"),
    "roll": (pair(lambda m, h: F.relu(h).roll(1, 1)), "a shift (roll) stands"),
    "gather": (pair(lambda m, h: F.relu(h).gather(-1, m.order.expand_as(h)), order=torch.arange(H)), "stands"),
    "reversal": (pair(lambda m, h: F.relu(h).flip(-1)), "a reversal (flip) stands"),
    "other_token_shape": (pair(lambda m, h: F.relu(h).unsqueeze(1)), "the leading (token) dimensions change"),
    "whole_numbers": (pair(lambda m, h: F.relu(h.long().float())), "a conversion to another number type (to)"),
    "not_by_value": (
        lambda: Function(lambda m, x: m.down(F.relu(torch.cdist(m.up(x), m.up(x)))), up=(D, H), down=(5, D)),
        "an op that is not pointwise (cdist) stands",
    ),
    "sort": (pair(lambda m, h: F.relu(h).sort(-1).values), "a sort (sort) stands"),
    "noise": (pair(lambda m, h: F.relu(h) * torch.rand_like(h)), "noise (rand_like) stands"),
    "learned_offset": (
        pair(lambda m, h: F.relu(h * 2 + m.offset), offset=w(1)),
        "a parameter ('learned_offset.offset') stands between the linears and does more than scale the neurons",
    ),
    "scale_of_tokens": (pair(lambda m, h: F.relu(h) * m.scale, scale=w(5, 1)), "a parameter ('scale_of_tokens.scale')"),
    "scale_of_both": (pair(lambda m, h: F.gelu(h * m.scale) * m.scale, scale=w(H)), "('scale_of_both.scale') stands"),
    "zero_divisor": (pair(lambda m, h: F.relu(h) / m.scale, scale=torch.arange(H) * 1.0), "('zero_divisor.scale')"),
    "outside": (
        lambda: Function(lambda m, x: m.down(F.relu(m.up(x)) * x[..., :1]), up=(D, H), down=(H, D)),
        "a value from outside, computed by ",
    ),
    "first_computed": (
        lambda: Function(
            lambda m, x: m.down(F.relu(m.up(x))), up=parametrizations.weight_norm(nn.Linear(D, H)), down=(H, D)
        ),
        "the first linear: its weight has a parametrization. Make it permanent: torch.nn.utils.parametrize."
        "remove_parametrizations(first_computed.up, 'weight')",
    ),
    "second_computed": (
        lambda: Function(
            lambda m, x: m.down(F.relu(m.up(x))), up=(D, H), down=parametrizations.weight_norm(nn.Linear(H, D))
        ),
        "the second linear: its weight has a parametrization",
    ),
    "pruned_by_a_mask": (
        lambda: Function(
            lambda m, x: m.down(F.relu(m.up(x))), up=(D, H), down=prune.l1_unstructured(nn.Linear(H, D), "weight", 0.5)
        ),
        "the second linear: its weight has a pruning mask. Make it permanent: torch.nn.utils.prune.remove("
        "pruned_by_a_mask.down, 'weight')",
    ),
    "stored_in_8_bits": (
        lambda: Function(
            lambda m, x: F.linear(F.relu(m.up(x)), m.table * m.scale), up=(D, H), scale=w(D, 1),
            table=torch.randint(-127, 127, (D, H), dtype=torch.int8),
        ),
        "the second linear: its weight is stored in int8 ('stored_in_8_bits.table'). Run the surgery on the model "
        "before it was quantised",
    ),
    "computed": (
        lambda: Function(
            lambda m, x: F.linear(F.relu(m.up(x)), m.table * m.scale), up=(D, H), scale=w(D, 1), table=w(D, H)
        ),
        "the second linear: its weight is computed in the graph (by ",
    ),
    "three_linears": (
        lambda: Function(three, a=(D, H), b=(D, H), c=(D, H), down=(H, D)),
        "3 linears feed the second one; a gated FFN has two",
    ),
    "escapes": (lambda: Function(reads_hidden, up=(D, H), down=(H, D)), "are also used outside the FFN, by 'escapes'"),
    "escapes_early": (
        lambda: Function(reads_pre_activation, up=(D, H), down=(H, D)), "the hidden values (",
    ),
    "other_inputs": (
        lambda: Function(two_inputs, gate=(D, H), up=(D, H), down=(H, D)), "gate and up read different inputs",
    ),
    "pooler": (
        lambda: Function(lambda m, x: m.out(torch.tanh(m.dense(x[:, 0]))), dense=(D, D), out=(D, 2)),
        "tanh between linears 6→6→2 is a pooler or a classifier head, not an FFN",
    ),
    "no_activation": (pair(lambda m, h: h), "there is no activation between the two linears"),
    "overlap": (
        lambda: Function(two_behind_one, up=(D, H), mid=(H, H), down=(H, D)), "it shares a linear with the FFN at '",
    ),
    "constant": (
        lambda: Function(constant, table=w(5, D), up=(D, H), down=(H, D)), "it does not depend on the model's input",
    ),
    "weight_elsewhere": (
        lambda: Function(weight_elsewhere, up=(D, H), down=(H, D)), "'weight_elsewhere.up.weight' is also used",
    ),
    "tied_transposed": (lambda: Function(tied_transposed, w=w(H, D)), "two of its linears share one weight"),
    "other_activation": (
        lambda: Function(other_activation, up=(D, H), down=(H, D)), "in several places with different activations",
    ),
    "unknown_function": (pair(lambda m, h: torch.cos(h)), "not a known activation"),
}  # fmt: skip


@pytest.fixture(scope="module")
def refused() -> tuple[list[str], dict[str, list[Rejection]]]:
    torch.manual_seed(0)
    sites, rejections = find_ffns(surgeon.trace(Many(**{name: make() for name, (make, _) in REJECTED.items()}), X))
    return [site.path for site in sites], {
        name: [r for r in rejections if r.path.partition(".")[0] == name] for name in REJECTED
    }


@pytest.mark.parametrize("name", REJECTED)
def test_rejected_with_the_reason(refused: tuple[list[str], dict[str, list[Rejection]]], name: str) -> None:
    found, rejections = refused
    inside = [path for path in found if path.partition(".")[0] == name]
    assert len(inside) == (1 if name == "overlap" else 0)
    reasons = [rejection.reason for rejection in rejections[name]]
    assert any(REJECTED[name][1] in reason for reason in reasons), reasons
    whole_site = ("different activations", "share one weight")  # these are about no single node
    assert all(r.node or any(words in r.reason for words in whole_site) for r in rejections[name])


def test_rejection_names_a_node_of_the_graph() -> None:
    graph = surgeon.trace(pair(lambda m, h: m.norm(F.relu(h)), norm=nn.LayerNorm(H))(), X)
    _, (rejection,) = find_ffns(graph)
    node = next(node for node in graph.graph.nodes if node.name == rejection.node)
    assert node.target is torch.ops.aten.layer_norm.default


# --- what is found ----------------------------------------------------------------------------------------------------


def trace(model: nn.Module, width: int = D) -> TracedGraph:
    return surgeon.trace(model, torch.randn(2, 5, width))


@pytest.mark.parametrize(
    ("make", "describe"),
    [
        (lambda: Plain(D, H), "FFN 6→8→6 gelu"),
        (lambda: Plain(D, H, 4, act=F.relu), "FFN 6→8→4 relu"),
        (lambda: Gated(D, H), "gated FFN 6→8→6 silu"),
        (lambda: Fused(D, H), "gated FFN 6→8→6 silu"),
    ],
)
def test_site_describes_itself(make: Callable[[], nn.Module], describe: str) -> None:
    model = Wrapped(make(), D)
    graph = trace(model)
    (site,), rejections = find_ffns(graph)
    assert not rejections
    assert site.path == "ffn"
    assert site.describe == describe
    assert site.parameters(graph) == sum(p.numel() for p in model.ffn.parameters())
    assert site.multiply_adds == sum(p.numel() for p in model.ffn.parameters() if p.dim() == 2)
    assert site.dropout == (0.1 if isinstance(model.ffn, Plain) else 0.0)


def test_families(traces: Any) -> None:
    expected = {
        "gpt2": (["transformer.h.0.mlp", "transformer.h.1.mlp"], "gelu_tanh", False),
        "bert": (["bert.encoder.layer.0", "bert.encoder.layer.1"], "gelu", False),
        "llama": (["model.layers.0.mlp", "model.layers.1.mlp"], "silu", True),
        "phi3": (["model.layers.0.mlp", "model.layers.1.mlp"], "silu", True),
        "vit": (["vit.layers.0.mlp", "vit.layers.1.mlp"], "gelu", False),
        "t5": (["encoder.block.0.layer.1.DenseReluDense", "decoder.block.0.layer.2.DenseReluDense"], "relu", False),
        "albert": (["albert.encoder.albert_layer_groups.0.albert_layers.0"], "gelu_tanh", False),
    }
    for name, (paths, activation, gated) in expected.items():
        sites, _ = find_ffns(traces(name))
        assert [site.path for site in sites] == paths, name
        assert {(site.activation, site.gated) for site in sites} == {(activation, gated)}, name
        assert {(site.d_in, site.hidden, site.d_out) for site in sites} == {(16, 32, 16)}, name


def test_shared_weights_are_one_site_with_every_execution(traces: Any) -> None:
    for name in ("stack:shared", "albert"):
        (site,), _ = find_ffns(traces(name))
        assert len(site.calls) == 2
        assert site.calls[0].x is not site.calls[1].x


def test_two_sites_under_one_module_have_paths_of_their_own() -> None:
    model = Function(
        lambda m, x: m.down2(F.relu(m.up2(m.down1(F.gelu(m.up1(x)))))),
        up1=(D, H),
        down1=(H, D),
        up2=(D, H),
        down2=(H, D),
    )
    sites, _ = find_ffns(trace(Many(inner=model)))
    assert len({site.path for site in sites}) == len(sites) == 2
    assert all(site.path.startswith("inner.") for site in sites)


def test_sequential_takes_the_first_of_overlapping_candidates() -> None:
    model = nn.Sequential(nn.Linear(D, H), nn.ReLU(), nn.Linear(H, H), nn.ReLU(), nn.Linear(H, D))
    (site,), (rejection,) = find_ffns(trace(model))
    assert (site.hidden, site.d_out) == (H, H)
    assert "it shares a linear with the FFN" in rejection.reason


def test_without_rejections_where_there_is_only_attention() -> None:
    layer = nn.MultiheadAttention(D, 2, batch_first=True)
    assert find_ffns(trace(Function(lambda m, x: m.a(x, x, x, need_weights=False)[0], a=layer))) == ([], [])


def test_the_size_of_a_hidden_value_may_be_read_outside() -> None:
    def compute(m: Any, x: Tensor) -> Tensor:
        h = F.relu(m.up(x))
        return m.down(h) / h.shape[1]

    (site,), _ = find_ffns(trace(Function(compute, up=(D, H), down=(H, D))))
    assert site.hidden == H


def test_a_vector_may_leave_as_a_row() -> None:
    model = Function(lambda m, x: m.down(F.relu(m.up(x)).unsqueeze(0)), up=(D, H), down=(H, D)).eval()
    vector = X[0, 0]
    graph = surgeon.trace(model, vector)
    report = Moeify(experts=4).apply(graph, inputs=vector)
    assert report.matched
    assert graph(vector).shape == (1, D)


def test_weights_are_views_where_nothing_is_folded_in() -> None:
    graph = trace(Wrapped(Gated(D, H), D))
    weights = find_ffns(graph)[0][0].weights(graph)
    assert weights.w1.data_ptr() == graph.get_parameter("ffn.up.weight").data_ptr()
    assert weights.gate is not None
    assert weights.gate.data_ptr() == graph.get_parameter("ffn.gate.weight").data_ptr()
    assert weights.w2.data_ptr() == graph.get_parameter("ffn.down.weight").data_ptr()


# --- standalone linears -----------------------------------------------------------------------------------------------


def test_standalone_linears_leave_out_feed_forward_layers_and_heads(traces: Any) -> None:
    sites, rejections = find_linear_sites(traces("gelu"))
    assert [site.path for site in sites] == [f"blocks.{b}.attention.{part}" for b in (0, 1) for part in "qkvo"]
    assert [(r.path, r.reason) for r in rejections] == [("head", "it computes the model's output (a head)")]
    assert sites[0].describe == "linear 16→16"
    assert sites[0].multiply_adds == 256


def test_linear_with_a_weight_read_elsewhere_is_refused() -> None:
    model = Function(lambda m, x: torch.softmax(m.a(x), -1) * m.a.weight.sum(), a=(D, D))
    sites, (rejection,) = find_linear_sites(trace(model))
    assert not sites
    assert rejection.path == "a"
    assert "its weight is also used by" in rejection.reason


def test_linear_executed_twice_is_one_site() -> None:
    model = Function(lambda m, x: torch.softmax(m.a(torch.softmax(m.a(x), -1)), -1), a=(D, D))
    (site,), rejections = find_linear_sites(trace(model))
    assert len(site.calls) == 2
    assert not rejections


def test_tied_embedding_is_no_standalone_linear(traces: Any) -> None:
    _, rejections = find_linear_sites(traces("gpt2"))
    assert any("its weight is also used by" in r.reason or "a head" in r.reason for r in rejections)
    assert all("wte" not in site.path and "lm_head" not in site.path for site in find_linear_sites(traces("gpt2"))[0])
