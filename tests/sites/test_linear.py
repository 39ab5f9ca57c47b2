"""Linear layers, however they are spelled: found, and what is found computes what the graph computes."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

import surgeon
from surgeon.graph.agreement import call_reproducibly
from surgeon.graph.capture import Capture
from surgeon.graph.traced import TracedGraph
from surgeon.sites.linear import Linear, find_linears
from tests.small_models import Function, Many

D, H = 6, 4


def w(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.randn(*shape))


FOUND: dict[str, Callable[[], nn.Module]] = {
    "module": lambda: nn.Linear(D, H),
    "module_without_bias": lambda: nn.Linear(D, H, bias=False),
    "conv1d": lambda: Conv1D(H, D),
    "matmul": lambda: Function(lambda m, x: x @ m.w, w=w(D, H)),
    "matmul_add": lambda: Function(lambda m, x: x @ m.w + m.b, w=w(D, H), b=w(H)),
    "add_matmul": lambda: Function(lambda m, x: m.b + torch.matmul(x, m.w), w=w(D, H), b=w(H)),
    "matmul_add_inplace": lambda: Function(lambda m, x: (x @ m.w).add_(m.b), w=w(D, H), b=w(H)),
    "matmul_add_row": lambda: Function(lambda m, x: x @ m.w + m.b, w=w(D, H), b=w(1, 1, H)),
    "t": lambda: Function(lambda m, x: x @ m.w.t(), w=w(H, D)),
    "T": lambda: Function(lambda m, x: x @ m.w.T, w=w(H, D)),
    "mT": lambda: Function(lambda m, x: x @ m.w.mT, w=w(H, D)),
    "transpose": lambda: Function(lambda m, x: x @ m.w.transpose(0, 1), w=w(H, D)),
    "transpose_negative": lambda: Function(lambda m, x: x @ m.w.transpose(-1, -2), w=w(H, D)),
    "permute": lambda: Function(lambda m, x: x @ m.w.permute(1, 0), w=w(H, D)),
    "swapaxes": lambda: Function(lambda m, x: x @ m.w.swapaxes(0, 1), w=w(H, D)),
    "transposed_twice": lambda: Function(lambda m, x: F.linear(x, m.w.t().t()), w=w(H, D)),
    "contiguous": lambda: Function(lambda m, x: x @ m.w.t().contiguous(), w=w(H, D)),
    "linear_transposed": lambda: Function(lambda m, x: F.linear(x, m.w.t(), m.b), w=w(D, H), b=w(H)),
    "linear_then_add": lambda: Function(lambda m, x: F.linear(x, m.w) + m.b, w=w(H, D), b=w(H)),
    "addmm": lambda: Function(
        lambda m, x: torch.addmm(m.b, x.flatten(0, 1), m.w).view(*x.shape[:-1], H), w=w(D, H), b=w(H)
    ),
    "mm": lambda: Function(lambda m, x: torch.mm(x.reshape(-1, D), m.w).reshape(*x.shape[:2], H), w=w(D, H)),
    "mm_add": lambda: Function(
        lambda m, x: (torch.mm(x.reshape(-1, D), m.w) + m.b).reshape(*x.shape[:2], H), w=w(D, H), b=w(H)
    ),
    "einsum": lambda: Function(lambda m, x: torch.einsum("btd,df->btf", x, m.w), w=w(D, H)),
    "einsum_ellipsis": lambda: Function(lambda m, x: torch.einsum("...d,df->...f", x, m.w), w=w(D, H)),
    "einsum_out_in": lambda: Function(lambda m, x: torch.einsum("bld,hd->blh", x, m.w), w=w(H, D)),
    "einsum_weight_first": lambda: Function(lambda m, x: torch.einsum("fd, btd -> btf", m.w, x), w=w(H, D)),
    "einsum_add": lambda: Function(lambda m, x: torch.einsum("btd,df->btf", x, m.w) + m.b, w=w(D, H), b=w(H)),
    "mm_of_activated_rows": lambda: Function(lambda m, x: torch.mm(F.relu(x[:, 0]), m.w), w=w(D, H)),
    "on_rows": lambda: Function(lambda m, x: m.fc(x[:, 0]), fc=(D, H)),
    "buffer": lambda: Function(lambda m, x: F.linear(x, m.w), w=torch.randn(H, D)),
    "einsum_weight_with_dots": lambda: Function(lambda m, x: torch.einsum("btd,...d->bt...", x, m.w), w=w(H, D)),
    "flat_add": lambda: Function(lambda m, x: (torch.mm(x.flatten(0, 1), m.w) + m.b).sum(0), w=w(D, H), b=w(H)),
    "flat": lambda: Function(lambda m, x: torch.mm(x.flatten(0, 1), m.w).sum(0), w=w(D, H)),
}
HAS_BIAS = {
    "module", "conv1d", "matmul_add", "add_matmul", "matmul_add_inplace", "matmul_add_row", "linear_transposed",
    "linear_then_add", "addmm", "mm_add", "einsum_add", "on_rows",
}  # fmt: skip
# What looks like a linear layer, and the reason given; None if it is silently none.
OTHERS: dict[str, tuple[Callable[[], nn.Module], str | None]] = {
    "scaled_addmm": (
        lambda: Function(lambda m, x: torch.addmm(m.b, x.flatten(0, 1), m.w, alpha=2), w=w(D, H), b=w(H)), None,
    ),
    "computed_weight": (lambda: Function(lambda m, x: F.linear(x, m.w * 2), w=w(H, D)), "weight is computed"),
    "computed_bias": (
        lambda: Function(lambda m, x: F.linear(x, m.w, m.b.exp()), w=w(H, D), b=w(H)), "bias is not a parameter",
    ),
    "bias_for_each_token": (
        lambda: Function(lambda m, x: torch.addmm(m.b, x[0], m.w), w=w(D, H), b=w(5, H)), "one number for each output",
    ),
    "two_activations": (lambda: Function(lambda m, x: x @ x.transpose(1, 2)), None),
    "weight_of_three_dimensions": (lambda: Function(lambda m, x: torch.matmul(x, m.w), w=w(1, D, H)), None),
    "einsum_per_token": (lambda: Function(lambda m, x: torch.einsum("btd,td->bt", x, m.w), w=w(5, D)), None),
    "einsum_elementwise": (lambda: Function(lambda m, x: torch.einsum("btd,d->btd", x, m.w), w=w(D)), None),
    "einsum_over_tokens": (lambda: Function(lambda m, x: torch.einsum("btd,tf->bdf", x, m.w), w=w(5, H)), None),
    "einsum_without_sum": (lambda: Function(lambda m, x: torch.einsum("btd,df->btdf", x, m.w), w=w(D, H)), None),
}  # fmt: skip


@pytest.fixture(scope="module")
def graph() -> TracedGraph:
    torch.manual_seed(0)
    parts = {name: make() for name, make in FOUND.items()} | {name: make() for name, (make, _) in OTHERS.items()}
    return surgeon.trace(Many(**parts), X)


X = torch.randn(3, 5, D, generator=torch.Generator().manual_seed(0))


def linear_of(graph: TracedGraph, name: str) -> Linear:
    return next(linear for linear in find_linears(graph)[0] if linear.path.partition(".")[0] == name)


@pytest.mark.parametrize("name", FOUND)
def test_found_and_computes_the_same(graph: TracedGraph, name: str) -> None:
    linear = linear_of(graph, name)
    assert (linear.in_features, linear.out_features) == (D, H)
    assert (linear.bias is not None) == (name in HAS_BIAS)
    _, values = call_reproducibly(Capture(graph, [linear.input.name, linear.output.name]), (X,), {})
    x, y = values[linear.input.name], values[linear.output.name]
    assert torch.allclose(F.linear(x, linear.weight_rows(graph), linear.bias_vector(graph)), y, atol=1e-5)
    assert linear.core in linear.nodes
    assert linear.output in linear.nodes
    assert x.shape[:-1] == y.shape[:-1]


@pytest.mark.parametrize(
    "name", [name for name in FOUND if name not in ("on_rows", "flat", "flat_add", "mm_of_activated_rows")]
)
def test_reaches_from_tokens_to_tokens(graph: TracedGraph, name: str) -> None:
    linear = linear_of(graph, name)
    assert linear.input.op == "placeholder"
    assert any(linear.output in node.all_input_nodes for node in graph.graph.nodes if node.op == "output")


@pytest.mark.parametrize("name", OTHERS)
def test_others_are_none(graph: TracedGraph, name: str) -> None:
    linears, opaque = find_linears(graph)
    assert name not in {linear.path.partition(".")[0] for linear in linears}
    why = OTHERS[name][1]
    found = [one.why for one in opaque if one.path.partition(".")[0] == name]
    assert len(found) == (why is not None)
    if why is not None:
        assert why in found[0]


@pytest.mark.parametrize(
    ("what", "compute"),
    [
        ("scaled", lambda m, x: torch.add(x @ m.w, m.b, alpha=2)),
        ("of_each_token", lambda m, x: x @ m.w + m.position),
        ("of_each_of_four_tokens", lambda m, x: x[:, :H] @ m.w + m.column),
        ("used_twice", lambda m, x: (y := x @ m.w) + m.b + y),
        ("a_number", lambda m, x: x @ m.w + 1.0),
    ],
)
def test_other_additions_are_no_bias(what: str, compute: Callable[..., Tensor]) -> None:
    graph = surgeon.trace(Function(compute, w=w(D, H), b=w(H), position=w(5, H), column=w(H, 1)), X)
    (linear,), _ = find_linears(graph)
    assert linear.bias is None
    _, values = call_reproducibly(Capture(graph, [linear.output.name]), (X,), {})
    found = values[linear.output.name]
    assert torch.allclose(found, (X @ graph.get_parameter("w"))[:, : found.shape[1]], atol=1e-5)


def test_path_of_a_raw_parameter_at_the_top_is_its_name() -> None:
    graph = surgeon.trace(Function(lambda m, x: x @ m.kernel, kernel=w(D, H)), X)
    (linear,), _ = find_linears(graph)
    assert linear.path == "kernel"


def test_finding_fixes_no_size(graph: TracedGraph) -> None:
    find_linears(graph)
    for batch in (1, 4):
        assert graph(torch.randn(batch, 5, D))["module"].shape == (batch, 5, H)


def test_in_topological_order(graph: TracedGraph) -> None:
    order = list(graph.graph.nodes)
    places = [order.index(linear.core) for linear in find_linears(graph)[0]]
    assert places == sorted(places)
