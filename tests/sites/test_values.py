"""Which values of attention are found, which rows and columns are a head's, and why others are refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import surgeon
from surgeon.passes import Rotate
from surgeon.sites.values import ValueHeads, find_value_heads
from tests.small_models import WIDTH, Function

HEADS = 4
X = torch.randn(2, 5, WIDTH, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def split(x: Tensor, heads: int = HEADS) -> Tensor:
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)


def joined(x: Tensor) -> Tensor:
    return x.transpose(1, 2).flatten(2)


def attention(m: Any, x: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(split(m.q(x)), split(m.k(x)), v)


def written_out(m: Any, x: Tensor) -> Tensor:
    weights = torch.softmax(split(m.q(x)) @ split(m.k(x)).transpose(-1, -2) / 2, -1)
    return m.out(joined(F.dropout(weights, 0.1, m.training) @ split(m.v(x))))  # type: ignore[no-any-return]


def repeated(m: Any, x: Tensor) -> Tensor:
    v = split(m.shared(x), 2)[:, :, None].expand(-1, -1, 2, -1, -1).flatten(1, 2)
    return m.out(joined(attention(m, x, v)))  # type: ignore[no-any-return]


def interleaved(m: Any, x: Tensor) -> Tensor:
    q, k, v = m.qkv(x).unflatten(-1, (HEADS, 3, -1)).transpose(1, 2).unbind(3)
    return m.out(joined(F.scaled_dot_product_attention(q, k, v)))  # type: ignore[no-any-return]


def grouped(m: Any, x: Tensor) -> Tensor:
    k, v = split(m.shared_k(x), 2), split(m.shared(x), 2)
    return m.out(joined(F.scaled_dot_product_attention(split(m.q(x)), k, v, enable_gqa=True)))  # type: ignore[no-any-return]


FOUND = {
    "plain": (lambda m, x: m.out(joined(attention(m, x, split(m.v(x))))), 4, 1),
    "written out": (written_out, 4, 1),
    "repeated": (repeated, 2, 2),
    "grouped": (grouped, 2, 2),
    "interleaved": (interleaved, 4, 1),
}
REFUSED = {
    "activated": (
        lambda m, x: m.out(joined(attention(m, x, torch.tanh(split(m.v(x)))))), "values-are-mixed", "tanh"
    ),
    "returned": (
        lambda m, x: (m.out(joined(attention(m, x, v := split(m.v(x))))), v), "values-are-read", "the model's output"
    ),
    "keys are values": (
        lambda m, x: m.out(joined(F.scaled_dot_product_attention(split(m.q(x)), v := split(m.v(x)), v))),
        "values-are-read", "scaled_dot_product_attention",
    ),
    "heads are read twice": (
        lambda m, x: m.out(y := joined(attention(m, x, split(m.v(x))))) + torch.tanh(y), "values-are-read", "tanh"
    ),
    "one head": (
        lambda m, x: m.narrow(joined(attention(m, x, split(m.v(x))))[..., :4]), "values-are-mixed", "all heads"
    ),
    "shared weight": (
        lambda m, x: m.out(joined(attention(m, x, split(m.v(x))))) + m.v(x), "weight-is-shared", "'v'"
    ),
}  # fmt: skip


def model(compute: Any) -> nn.Module:
    torch.manual_seed(0)
    wide = (WIDTH, WIDTH)
    return (
        Function(
            compute, q=wide, k=wide, v=wide, out=wide, qkv=(WIDTH, 3 * WIDTH), narrow=(4, WIDTH),
            shared=(WIDTH, WIDTH // 2), shared_k=(WIDTH, WIDTH // 2),
        ).double().eval()
    )  # fmt: skip


@pytest.mark.parametrize("name", FOUND)
def test_values_are_found_and_turned_exactly(name: str) -> None:
    compute, heads, repeats = FOUND[name]
    made = model(compute)
    graph = surgeon.trace(made, X)
    (site,), refused = find_value_heads(graph)
    assert isinstance(site, ValueHeads)
    assert refused == []
    assert site.columns.shape == (heads, repeats, WIDTH // HEADS)
    assert site.rows.shape == (heads, WIDTH // HEADS)
    report = Rotate().apply(graph, inputs=X, data=[torch.randn_like(X) for _ in range(4)])
    assert report.matched == ["out"]
    before = made.state_dict()
    changed = {name for name, tensor in graph.state_dict().items() if not torch.equal(tensor, before[name])}
    value = site.value.path
    assert changed == {"out.weight", f"{value}.weight", f"{value}.bias"}
    assert (graph(X) - made(X)).abs().max() < 1e-13


@pytest.mark.parametrize("name", REFUSED)
def test_others_are_refused_with_the_reason(name: str) -> None:
    compute, code, words = REFUSED[name]
    found, refused = find_value_heads(surgeon.trace(model(compute), X))
    assert found == []
    assert [one.code for one in refused] == [code]
    assert words in refused[0].reason


def test_each_head_gets_its_principal_components() -> None:
    (site,), _ = find_value_heads(surgeon.trace(model(FOUND["repeated"][0]), X))
    x = torch.randn(50, WIDTH, dtype=torch.float64)
    moments = site.moments(x)
    parts = x[:, site.columns[1]]  # [N, 2, h]
    assert torch.allclose(moments[1], parts.flatten(0, 1).T @ parts.flatten(0, 1) / 50)
