"""mlpify: replacements cost what the layers did and learn to imitate them."""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import surgeon
from surgeon.agreement import relative_error, run
from surgeon.cost import measure
from surgeon.errors import UsageError
from surgeon.fit import Settings
from surgeon.fused import fused_parts
from surgeon.graph import aten
from surgeon.inputs import as_args_kwargs
from surgeon.passes import Lower, Mlpify, Moeify, Sparsify
from surgeon.passes.mlpify import Kind, ReplacementMLP, Start
from surgeon.rewrite import own_parameters
from surgeon.search import find_ffns
from tests.models import CLASSES, WIDTH, Function, Many, Plain, labelled_vectors, tokens, vectors


@pytest.mark.parametrize(
    ("d_in", "d_out", "factor", "width"),
    [(768, 768, 1.0, 384), (768, 768, 0.5, 192), (16, 16, 1.0, 8), (768, 3072, 1.0, 615), (1, 1, 0.1, 0)],
)
def test_width_of_equal_cost(d_in: int, d_out: int, factor: float, width: int) -> None:
    assert Mlpify(cost_factor=factor).hidden_width(d_in, d_out) == width


@pytest.mark.parametrize("d", [64, 384, 768])
def test_equal_cost_is_equal(d: int) -> None:
    width = Mlpify().hidden_width(d, d)
    module = ReplacementMLP("w", range(d), d, width, "relu", torch.zeros(1), bias=True)
    assert sum(p.numel() for p in module.parameters()) == pytest.approx(d * d + d, rel=0.01)


def test_replaces_projections_and_nothing_else(traces: Any) -> None:
    graph = traces("gelu")
    before, _ = measure(graph, (), tokens())
    state = {name: value.clone() for name, value in graph.state_dict().items()}
    report = Mlpify().apply(graph, inputs=tokens())
    assert report.matched == [f"blocks.{b}.attention.{part}" for b in (0, 1) for part in "qkvo"]
    assert ("head", "it computes the model's output (a head)") in report.rejected
    assert {(site.before, site.after) for site in report.sites} == {("linear 16→16", "MLP 16→8→16 relu")}
    after, _ = measure(graph, (), tokens())
    assert after.multiply_adds == before.multiply_adds
    left = {name for name in state if ".attention." not in name}
    made = {
        f"{path}.projection_mlp.{fc}.{kind}"
        for path in report.matched
        for fc in ("fc1", "fc2")
        for kind in ("weight", "bias")
    }
    assert set(graph.state_dict()) == left | made
    assert all(torch.equal(graph.state_dict()[name], state[name]) for name in left)
    assert not report.preserved


@functools.cache
def _one_layer(d_in: int, d_out: int, bias: bool) -> tuple[surgeon.TracedGraph, Tensor]:
    torch.manual_seed(0)
    x = torch.randn(2, 5, d_in)
    return surgeon.trace(Function(lambda m, x: torch.softmax(m.a(x), -1), a=(d_in, d_out, bias)), x), x


def one_layer(d_in: int = 6, d_out: int = 6, bias: bool = True) -> tuple[surgeon.TracedGraph, Tensor]:
    """A linear layer `a` in front of a softmax, with parameters of its own, and inputs for it."""
    graph, x = _one_layer(d_in, d_out, bias)
    graph = surgeon.graph.fork(graph)
    own_parameters(graph)
    return graph, x


@pytest.mark.parametrize("kind", ["plain", "residual"])
@pytest.mark.parametrize("activation", ["relu", "relu2", "gelu", "silu"])
def test_replacement_in_the_graph_is_the_module(activation: str, kind: Kind) -> None:
    graph, x = one_layer()
    Mlpify(activation=activation, kind=kind).apply(graph)
    like = torch.zeros(1)
    module = ReplacementMLP("w", range(6), 6, 3, activation, like, bias=True, residual=kind == "residual")
    module.load_state_dict(
        {name.removeprefix("a.projection_mlp."): value for name, value in graph.state_dict().items()}
    )
    assert torch.allclose(graph(x), torch.softmax(module(x)[0], -1), atol=1e-6)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("d_in", "d_out", "width"), [(6, 15, 5), (15, 6, 4)])
def test_outputs_of_another_width(d_in: int, d_out: int, width: int, bias: bool) -> None:
    graph, x = one_layer(d_in, d_out, bias)
    want = graph(x)
    report = Mlpify(steps=1).apply(graph, inputs=x, data=[x])
    assert graph(x).shape == want.shape
    (site,) = report.sites
    assert site.after == f"MLP {d_in}→{width}→{d_out} relu"
    assert site.parameters == (d_in * d_out + bias * d_out, width * (d_in + 1 + d_out) + bias * d_out)
    assert site.multiply_adds == (d_in * d_out, width * (d_in + d_out))
    assert [(ffn.d_in, ffn.hidden, ffn.d_out) for ffn in find_ffns(graph)[0]] == [(d_in, width, d_out)]


def test_bias_only_where_there_was_one() -> None:
    graph, _ = one_layer(bias=False)
    Mlpify().apply(graph)
    assert set(graph.state_dict()) == {
        "a.projection_mlp.fc1.weight",
        "a.projection_mlp.fc1.bias",
        "a.projection_mlp.fc2.weight",
    }


@pytest.mark.parametrize("name", ["gpt2", "stack:shared"])
def test_spellings_and_shared_layers(traces: Any, name: str) -> None:
    graph, inputs = traces(name), traces.inputs(name)
    report = Mlpify().apply(graph, inputs=inputs)
    assert report.matched
    graph(**inputs)
    assert {site.path.rpartition(".")[0] for site in find_ffns(graph)[0]} >= {path for path in report.matched}  # noqa: C416


def test_dropout_is_switched() -> None:
    graph, x = one_layer()
    Mlpify(dropout=0.5).apply(graph)
    assert torch.equal(graph.eval()(x), graph(x))
    assert not torch.equal(graph.train()(x), graph(x))


@pytest.mark.parametrize("mode", [True, False])
def test_dropout_stands_after_the_activation_and_after_the_mlp(mode: bool) -> None:
    graph, x = one_layer()
    Mlpify(dropout=0.25, kind="residual").apply(graph.train(mode))
    dropouts = [node for node in graph.graph.nodes if node.target is aten.dropout.default]
    assert [node.args[0].target for node in dropouts] == [aten.relu.default, aten.linear.default]
    assert all(node.args[1:] == (0.25, mode) for node in dropouts)
    (added,) = dropouts[1].users
    assert (added.target, added.args[0].op, added.args[1]) == (aten.add.Tensor, "placeholder", dropouts[1])
    (ffn,) = find_ffns(graph)[0]
    assert ffn.dropout == 0.25
    assert ffn.calls[0].output is dropouts[1].args[0]
    moe = Moeify(experts=3).apply(graph.eval(), inputs=x)
    low = Lower().apply(graph, inputs=x)
    assert len(moe.matched) == len(low.matched) == 1
    assert not torch.equal(graph.train()(x), graph(x))


def test_a_graph_without_a_training_mode_gets_no_dropout() -> None:
    graph, _ = one_layer()
    graph.meta["trace"] = dataclasses.replace(graph.meta["trace"], form="eval")
    report = Mlpify(dropout=0.5).apply(graph)
    assert any(note.startswith("No dropout was put in") for note in report.notes)
    assert not [node for node in graph.graph.nodes if node.target is aten.dropout.default]


@pytest.mark.parametrize(("option", "words"), [
    ({"activation": "tanh"}, "activation is 'tanh', but must be one of"),
    ({"cost_factor": 0.0}, "cost_factor is 0.0, but must be positive"),
    ({"dropout": 1.0}, "dropout is 1.0, but must be at least 0 and below 1"),
    ({"dropout": -0.1}, "dropout is -0.1, but must be"),
    ({"alpha": -1.0}, "alpha is -1.0, but must not be negative"),
    ({"kind": "other"}, "kind is 'other'; it can be plain or residual"),
    ({"init": "zeros"}, "init is 'zeros'; it can be svd or random"),
    ({"steps": 0}, "steps is 0, but must be at least 1"),
])  # fmt: skip
def test_wrong_options(option: Any, words: str) -> None:
    with pytest.raises(UsageError, match=words):
        Mlpify(**option)


def test_too_small_a_layer_is_refused() -> None:
    graph, _ = one_layer()
    report = Mlpify(cost_factor=0.01).apply(graph)
    assert report.rejected == [("a", "a replacement of equal cost for 6→6 has no neuron")]


def test_a_residual_needs_equal_widths() -> None:
    graph, _ = one_layer(6, 8)
    report = Mlpify(kind="residual").apply(graph)
    assert report.rejected == [("a", "a residual needs an output as wide as the input, and this is 6→8")]
    graph, x = one_layer()
    report = Mlpify(kind="residual", steps=1).apply(graph, inputs=x, data=[x])
    assert report.sites[0].after == "MLP 6→3→6 relu + input"


def test_the_pipeline_refuses_it_without_data(traces: Any) -> None:
    with pytest.raises(UsageError, match="mlpify needs data"):
        surgeon.Pipeline([Mlpify()]).run(traces("stack:gelu"), inputs=vectors())
    dry = surgeon.Pipeline([Mlpify()]).run(traces("stack:gelu"), inputs=vectors(), dry_run=True)
    assert dry.reports[0].matched
    assert dry.reports[0].fit is None


@pytest.mark.parametrize("init", ["svd", "random"])
def test_imitation_learns(traces: Any, init: Start) -> None:
    graph = traces("stack:gelu")
    state = {name: value.clone() for name, value in graph.state_dict().items()}
    want = graph(**vectors())
    untrained = surgeon.graph.fork(graph)
    rough = Mlpify().apply(untrained, inputs=vectors())
    report = Mlpify(epochs=40, lr=1e-2, init=init).apply(graph, inputs=vectors(), data=labelled_vectors(4))
    assert report.fit is not None
    first, last = report.fit.losses[0][1], report.fit.losses[-1][1]
    assert last["unexplained variance"] < 0.9 * first["unexplained variance"]
    assert last["unexplained variance"] < 0.5
    assert 0 < last["active"] <= 1
    assert report.max_error is not None
    assert rough.max_error is not None
    assert report.max_error < rough.max_error
    assert not torch.equal(graph(**vectors()), want)
    assert all(torch.equal(graph.state_dict()[name], state[name]) for name in state if ".mix." not in name)


def first_error(graph: surgeon.TracedGraph, x: Any, **options: Any) -> float:
    """The unexplained variance that the replacements start with."""
    report = Mlpify(steps=1, alpha=0.0, **options).apply(graph, data=[x])
    assert report.fit is not None
    return report.fit.losses[0][1]["unexplained variance"]


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("kind", ["plain", "residual"])
@pytest.mark.parametrize("activation", ["relu", "gelu", "silu"])
def test_svd_start_is_exact_where_the_width_suffices(activation: str, kind: Kind, bias: bool) -> None:
    x = 3.0 + torch.randn(20, 5, 6)
    graph, _ = one_layer(bias=bias)
    want = graph(x)
    report = Mlpify(
        steps=1, lr=1e-9, alpha=0.0, activation=activation, kind=kind, cost_factor=4.0
    ).apply(graph, data=[x])  # fmt: skip
    assert report.fit is not None
    assert report.fit.losses[0][1]["unexplained variance"] < 1e-8
    assert torch.allclose(graph(x), want, atol=1e-5)


@pytest.mark.parametrize("activation", ["relu", "relu2", "gelu", "silu"])
def test_svd_start_is_nearer_than_a_random_one(activation: str) -> None:
    x = torch.randn(20, 5, 6)
    svd, random = (first_error(one_layer()[0], x, activation=activation, init=init) for init in ("svd", "random"))
    assert svd < 0.7 < 0.9 < random


def test_svd_start_follows_the_data() -> None:
    """The inputs vary in one direction only, which one pair of neurons is enough for."""
    x = 2.0 + torch.randn(50, 5, 1) * torch.randn(6)
    assert first_error(one_layer()[0], x) < 1e-4 < first_error(one_layer()[0], torch.randn(50, 5, 6))


@pytest.mark.parametrize("x", [torch.ones(1, 1, 6), torch.zeros(2, 5, 6)], ids=["one token", "nothing but zeros"])
def test_data_that_does_not_vary(x: Tensor) -> None:
    graph, _ = one_layer()
    want = graph(x)
    Mlpify(steps=1, lr=1e-9).apply(graph, data=[x])
    assert torch.allclose(graph(x), want, atol=1e-4)


def test_a_layer_that_gives_nothing_is_imitated() -> None:
    graph, x = one_layer()
    for parameter in graph.parameters():
        parameter.data.zero_()
    assert first_error(graph, x) == pytest.approx(0.0, abs=1e-12)


@pytest.mark.parametrize("init", ["svd", "random"])
def test_the_error_is_relative_to_what_the_layer_gives(init: Start) -> None:
    """Otherwise layers with small outputs would not be learned beside others."""
    graph, x = one_layer()
    small, _ = one_layer()
    for parameter in small.parameters():
        parameter.data.mul_(1e-3)
    large, little = (first_error(one, x, init=init) for one in (graph, small))
    if init == "svd":
        assert little == pytest.approx(large, rel=1e-3)
    else:
        assert little > 1e4 * large  # the same random values beside targets a thousandth as large


def test_penalty_makes_the_replacements_sparse(traces: Any) -> None:
    shares = []
    for alpha in (0.0, 1.0):
        report = Mlpify(epochs=20, lr=1e-2, alpha=alpha).apply(traces("stack:gelu"), data=labelled_vectors(4))
        assert report.fit is not None
        shares.append(report.fit.losses[-1][1]["square Hoyer"])
    assert shares[1] < 0.7 * shares[0]


def test_imitates_what_the_layer_gave_and_not_what_became_of_it() -> None:
    """The layer's output is changed in place afterwards."""

    def compute(m: Any, x: Tensor) -> Tensor:
        y = m.a(x)
        y += 100.0
        return torch.softmax(y * m.scale.weight.sum(), -1)

    x = torch.randn(4, 5, 6)
    graph = surgeon.trace(Function(compute, a=(6, 6), scale=nn.Linear(1, 1)), x)
    report = Mlpify(steps=1, lr=1e-9, init="random").apply(graph, data=[x], settings=Settings(seed=0))
    assert report.fit is not None
    assert report.fit.losses[0][1]["unexplained variance"] < 10.0


def test_raw_parameters_at_the_top_and_below() -> None:
    x = torch.randn(2, 5, 6)

    def raw() -> Function:
        return Function(lambda m, x: torch.softmax(F.linear(x, m.w), -1), w=nn.Parameter(torch.randn(6, 6)))

    for model in (Many(inner=raw()), raw()):
        report = Mlpify().apply(surgeon.trace(model, x), inputs=x)
        assert len(report.matched) == 1


# --- fused projections ------------------------------------------------------------------------------------------------


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v)


def sliced(m: Any, x: Tensor) -> Tensor:
    y = m.qkv(x)
    return attend(y[..., :16], y[..., 16:32], y[..., 32:])


def narrowed(m: Any, x: Tensor) -> Tensor:
    y = m.qkv(x)
    return attend(*(y.narrow(-1, start, 16) for start in (0, 16, 32)))


def selected(m: Any, x: Tensor) -> Tensor:
    y = m.qkv(x).view(*x.shape[:2], 3, 2, 8)
    return attend(y[:, :, 0], y[:, :, 1], y[:, :, 2])


def grouped(m: Any, x: Tensor) -> Tensor:
    """Two heads of queries share one of keys and values."""
    q, k, v = m.qkv(x).split([16, 8, 8], -1)
    return attend(q.unflatten(-1, (2, 8)).transpose(1, 2), k.unsqueeze(1), v.unsqueeze(1))


def partly_rotated(m: Any, x: Tensor) -> Tensor:
    """What becomes of the parts is none of the question."""
    q, k, v = (part.unflatten(-1, (2, 8)) for part in m.qkv(x).tensor_split(3, -1))
    turned = torch.cat([-q[..., 2:4], q[..., :2], q[..., 4:]], -1)
    return attend(turned * q, k, v)


def keys_and_values(m: Any, x: Tensor) -> Tensor:
    return attend(m.q(x), *m.kv(x).chunk(2, -1))


class Timm(nn.Module):
    """Attention as in timm's VisionTransformer."""

    def __init__(self, heads: int = 2) -> None:
        super().__init__()
        self.qkv, self.proj, self.heads = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH), heads

    def forward(self, x: Tensor) -> Tensor:
        batch, length, width = x.shape
        qkv = self.qkv(x).reshape(batch, length, 3, self.heads, width // self.heads).permute(2, 0, 3, 1, 4)
        q, k, v = qkv.unbind(0)
        return self.proj(attend(q, k, v).transpose(1, 2).reshape(batch, length, width))


class Torch(nn.Module):
    """nn.MultiheadAttention, whose parameters have no modules of their own."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(WIDTH, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.attention(x, x, x, need_weights=False)[0].tanh() * x


FUSED = {
    "chunk": Function(lambda m, x: attend(*m.qkv(x).chunk(3, -1)), qkv=(16, 48)),
    "split": Function(lambda m, x: attend(*m.qkv(x).split(16, dim=2)), qkv=(16, 48, False)),
    "unbind": Function(lambda m, x: attend(*m.qkv(x).unflatten(-1, (3, 16)).unbind(-2)), qkv=(16, 48)),
    "narrowed": Function(narrowed, qkv=(16, 48)),
    "sliced": Function(sliced, qkv=(16, 48)),
    "selected": Function(selected, qkv=(16, 48)),
    "rotated": Function(partly_rotated, qkv=(16, 48)),
    "grouped": Function(grouped, qkv=(16, 32)),
    "two": Function(keys_and_values, q=(16, 16), kv=(16, 32)),
    "timm": Function(lambda m, x: m.attn(x).softmax(-1), attn=Timm()),
    "torch": Torch(),
}
LAYERS = {"two": "two.kv", "timm": "timm.attn.qkv", "torch": "torch.attention"}
PARTS = {"grouped": (16, 8, 8), "two": (16, 16)}


@pytest.fixture(scope="module")
def fused() -> Callable[[], tuple[surgeon.TracedGraph, Tensor]]:
    """The graph of all models of `FUSED` side by side, and inputs for it."""
    torch.manual_seed(0)
    x = torch.randn(8, 6, WIDTH)
    graph = surgeon.trace(Many(**FUSED).eval(), x)

    def make() -> tuple[surgeon.TracedGraph, Tensor]:
        return surgeon.graph.fork(graph), x

    return make


def test_fused_projections_get_an_mlp_for_each_part(fused: Any) -> None:
    graph, _ = fused()
    report = Mlpify().apply(graph)
    changes = {site.path: site for site in report.sites}
    ffns = {ffn.path: ffn for ffn in find_ffns(graph)[0]}
    for name in FUSED:
        path = LAYERS.get(name, f"{name}.qkv")
        widths = PARTS.get(name, (16, 16, 16))
        letters = "qkv" if len(widths) == 3 else "01"
        for letter, width in zip(letters, widths, strict=True):
            ffn = ffns.pop(f"{path}.projection_mlp_{letter}")
            assert (ffn.d_in, ffn.hidden, ffn.d_out) == (16, Mlpify().hidden_width(16, width), width)
        assert changes[path].made == path
        assert changes[path].parameters[1] == pytest.approx(changes[path].parameters[0], rel=0.1)
    assert changes["chunk.qkv"].after == "3 MLPs 16→8→16 relu"
    assert changes["grouped.qkv"].after == "3 MLPs 16→8→16, 16→5→8, 16→5→8 relu"
    assert set(ffns) == {f"{path}.projection_mlp" for path in ("two.q", "timm.attn.proj", "torch.attention.out_proj")}
    assert not [note for note in report.notes if "one MLP" in note]


def test_every_part_imitates_its_own_rows(fused: Any) -> None:
    graph, x = fused()
    want = graph(x)
    # So wide that the linear map fits in.
    Mlpify(cost_factor=5.0, alpha=0.0, steps=1, lr=1e-9).apply(graph, data=[x])
    got = graph(x)
    for name in FUSED:
        assert torch.allclose(got[name], want[name], atol=1e-4), name


def test_fused_projections_can_be_left_whole(fused: Any) -> None:
    graph, _ = fused()
    report = Mlpify(split_fused=False).apply(graph)
    assert {site.path: site.after for site in report.sites}["chunk.qkv"] == "MLP 16→13→48 relu"
    assert all(ffn.path.endswith(".projection_mlp") for ffn in find_ffns(graph)[0])
    assert not [note for note in report.notes if "one MLP" in note]


def test_a_residual_goes_to_every_part(fused: Any) -> None:
    graph, x = fused()
    want = graph(x)
    report = Mlpify(kind="residual", cost_factor=5.0, alpha=0.0, steps=1, lr=1e-9).apply(graph, data=[x])
    assert report.rejected == [
        ("grouped.qkv", "a residual needs an output as wide as the input, and this is 16→8"),
    ]
    assert {site.path: site.after for site in report.sites}["chunk.qkv"] == "3 MLPs 16→41→16 relu + input"
    assert torch.allclose(graph(x)["timm"], want["timm"], atol=1e-4)


def gated(m: Any, x: Tensor) -> Tensor:
    q, k, v, gate = m.qkv(x).chunk(4, -1)
    return attend(q, k, v) * gate.sigmoid()


def overlapping(m: Any, x: Tensor) -> Tensor:
    y = m.qkv(x)
    return attend(y[..., :16], y[..., 8:24], y[..., 32:])


def called_twice(m: Any, x: Tensor) -> Tensor:
    q, k, v = m.qkv(x).split([8, 8, 32], -1)
    return attend(*m.qkv(x.sin()).chunk(3, -1)).sum(-1, keepdim=True) * attend(q, k, v)


INTERLEAVED = "the outputs are interleaved, not stored one part after the other"
WHOLE: dict[str, tuple[nn.Module, str | None]] = {
    "heads": (
        Function(lambda m, x: attend(*m.qkv(x).unflatten(-1, (2, 24)).transpose(1, 2).chunk(3, -1)), qkv=(16, 48)),
        INTERLEAVED,
    ),
    "alternating": (
        Function(lambda m, x: attend(*m.qkv(x).unflatten(-1, (16, 3)).unbind(-1)), qkv=(16, 48)),
        INTERLEAVED,
    ),
    "four": (Function(gated, qkv=(16, 64)), "the outputs are cut into 4 parts"),
    "overlapping": (
        Function(overlapping, qkv=(16, 48)), "the parts that the outputs are cut into overlap or leave some out",
    ),
    "twice": (Function(called_twice, qkv=(16, 48)), "its calls cut the outputs in different ways"),
    "clamped": (Function(lambda m, x: attend(*m.qkv(x).clamp(-1, 1).chunk(3, -1)), qkv=(16, 48)), None),
    "halves": (Function(lambda m, x: attend(*m.qkv(x).chunk(2, -1), x), qkv=(16, 16)), None),
}  # fmt: skip


def test_what_is_not_cut_into_ranges_gets_one_mlp() -> None:
    x = torch.randn(3, 5, WIDTH)
    graph = surgeon.trace(Many(**{name: model for name, (model, _) in WHOLE.items()}).eval(), x)
    report = Mlpify().apply(graph, inputs=x)
    assert report.matched == [f"{name}.qkv" for name in WHOLE]
    assert {ffn.path for ffn in find_ffns(graph)[0]} == {f"{name}.qkv.projection_mlp" for name in WHOLE}
    reasons: dict[str, list[str]] = {}
    for name, (_, reason) in WHOLE.items():
        if reason is not None:
            reasons.setdefault(reason, []).append(name)
    more = {1: "", 2: " and 1 more"}
    assert list(report.notes) == [
        f"{names[0]}.qkv{more[len(names)]}: one MLP for the whole layer, as {reason}."
        for reason, names in reasons.items()
    ]


def test_a_use_that_cannot_be_followed_has_a_reason(fused: Any) -> None:
    graph, _ = fused()
    cut = next(node for node in graph.graph.nodes if node.target is aten.chunk.default)
    cut.update_arg(2, 7)
    assert re.match(r"how the outputs are used could not be followed \(.*\)$", str(fused_parts(cut.args[0])))


# --- on the way to experts --------------------------------------------------------------------------------------------


class VisionTransformer(nn.Module):
    """As in timm: [B, 3, 16, 16] → [B, 3]."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, WIDTH, 8, 8)
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.attn, self.mlp = Timm(), Plain()
        self.head = nn.Linear(WIDTH, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x).flatten(2).transpose(1, 2)
        x = x + self.attn(self.norm1(x))
        x = x + self.mlp(self.norm2(x))
        return self.head(x.mean(1))


def start_of_chain(name: str, traces: Any) -> tuple[surgeon.TracedGraph, Any, list[Any], list[str]]:
    """(graph, inputs, data, the layers that mlpify replaces in one block)."""
    if name == "timm":
        images = torch.randn(4, 3, 16, 16)
        parts = ["attn.qkv.projection_mlp_q", "attn.qkv.projection_mlp_k", "attn.qkv.projection_mlp_v"]
        graph = surgeon.trace(VisionTransformer().eval(), images)
        return graph, images, [(images, torch.arange(4) % CLASSES)], [*parts, "attn.proj.projection_mlp"]
    inputs = traces.inputs(name)
    if name == "gpt2":
        attention = "transformer.h.0.attn"
        parts = [f"{attention}.c_attn.projection_mlp_{part}" for part in "qkv"]
        return traces(name), inputs, [inputs | {"labels": inputs["input_ids"]}], [
            *parts, f"{attention}.c_proj.projection_mlp",
        ]  # fmt: skip
    attention = "bert.encoder.layer.0.attention"
    layers = [f"{attention}.self.{part}" for part in ("query", "key", "value")] + [f"{attention}.output.dense"]
    data = [(inputs, torch.arange(3) % CLASSES)]
    return traces(name), inputs, data, [f"{layer}.projection_mlp" for layer in layers]


@pytest.mark.parametrize("name", ["bert", "gpt2", "timm"])
def test_the_whole_way_to_lowered_experts(traces: Any, name: str) -> None:
    graph, inputs, data, projections = start_of_chain(name, traces)
    surgery = surgeon.Pipeline([
        Mlpify(steps=2, dropout=0.1), Sparsify(steps=2), Moeify(experts=4, router_width=8, steps=2),
    ]).run(graph, inputs=inputs, data=data)  # fmt: skip
    made, sparse, moe = surgery.reports
    assert set(projections) <= set(sparse.matched)
    assert set(projections) <= set(moe.matched)
    assert len(moe.matched) > len(sparse.matched) - len(projections)
    assert made.fit is not None
    taps = [node.target for node in surgery.graph.graph.nodes if node.op == "call_module"]
    assert {f"{path}.moe" for path in projections} <= set(taps)
    dense = run(surgery.graph.eval(), *as_args_kwargs(inputs))
    lowered = surgeon.graph.fork(surgery.graph)
    low = Lower().apply(lowered, inputs=inputs)
    assert len(low.matched) == len(moe.matched)
    assert relative_error(run(lowered, *as_args_kwargs(inputs)), dense) < 1e-5


def test_replacements_become_experts(traces: Any) -> None:
    graph, inputs = traces("stack:relu"), vectors()
    Mlpify(steps=1).apply(graph, inputs=inputs, data=labelled_vectors(1))
    sites = {site.path for site in find_ffns(graph)[0]}
    assert len(sites) == 2 + 2
    moe = Moeify(experts=4).apply(graph, inputs=inputs)
    assert len(moe.matched) == 4
    low = Lower().apply(graph, inputs=inputs)
    assert len(low.matched) == 4
