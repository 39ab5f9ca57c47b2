"""mlpify: queries, keys and values that one layer computes get an MLP each."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import surgeon
from surgeon.graph.traced import aten
from surgeon.passes import Mlpify
from surgeon.sites.qkv import fused_parts
from surgeon.sites.search import find_ffns
from tests.passes.reports import reasons
from tests.small_models import WIDTH, Function, Many

from .projections import Timm, attend


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
        return surgeon.graph.traced.fork(graph), x

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
        made = tuple(f"{path}.projection_mlp_{letter}" for letter in letters)
        for part, width in zip(made, widths, strict=True):
            ffn = ffns.pop(part)
            assert ffn.is_projection
            assert (ffn.d_in, ffn.hidden, ffn.d_out) == (16, Mlpify().hidden_width(16, width), width)
        assert changes[path].made == made
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
    assert reasons(report) == [
        ("grouped.qkv", "a residual needs an output as wide as the input, but this is 16→8"),
    ]
    assert {site.path: site.after for site in report.sites}["chunk.qkv"] == "3 MLPs 16→40→16 relu + input"
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


INTERLEAVED = "the parts of the output are interleaved instead of one after the other"
WHOLE: dict[str, tuple[nn.Module, str | None]] = {
    "heads": (
        Function(lambda m, x: attend(*m.qkv(x).unflatten(-1, (2, 24)).transpose(1, 2).chunk(3, -1)), qkv=(16, 48)),
        INTERLEAVED,
    ),
    "alternating": (
        Function(lambda m, x: attend(*m.qkv(x).unflatten(-1, (16, 3)).unbind(-1)), qkv=(16, 48)),
        INTERLEAVED,
    ),
    "four": (Function(gated, qkv=(16, 64)), "the outputs are split into 4 parts"),
    "overlapping": (
        Function(overlapping, qkv=(16, 48)), "the parts of the output overlap or do not cover all of it",
    ),
    "twice": (Function(called_twice, qkv=(16, 48)), "its calls split the outputs in different ways"),
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
        f"{names[0]}.qkv{more[len(names)]}: one MLP replaces the whole layer, because {reason}."
        for reason, names in reasons.items()
    ]


def test_a_use_that_cannot_be_followed_has_a_reason(fused: Any) -> None:
    graph, _ = fused()
    cut = next(node for node in graph.graph.nodes if node.target is aten.chunk.default)
    cut.update_arg(2, 7)
    assert re.match(r"the ops that split the outputs cannot be followed \(.*\)$", str(fused_parts(cut.args[0])))
