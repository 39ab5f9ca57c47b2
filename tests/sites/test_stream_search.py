"""Which residual streams are found, what belongs to them, and why others are refused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import surgeon
from surgeon.passes import Rotate
from surgeon.sites.rejection import Rejection
from surgeon.sites.stream import Stream
from surgeon.sites.stream_search import find_streams
from tests.small_models import WIDTH, Function

X = torch.randn(2, 5, WIDTH, generator=torch.Generator().manual_seed(0))
Compute = Callable[[Any, Tensor], Any]


def model(compute: Compute) -> nn.Module:
    """x goes through `embed`; `mlp` and `head` read norms."""
    torch.manual_seed(0)
    shape = (WIDTH, WIDTH)
    made = Function(
        compute, embed=shape, mlp=shape, more=shape, head=(WIDTH, 3),
        norm=nn.LayerNorm(WIDTH), last=nn.LayerNorm(WIDTH), rms=nn.RMSNorm(WIDTH), drop=nn.Dropout(0.5),
        conv=nn.Conv1d(WIDTH, WIDTH, 1), token=nn.Parameter(torch.randn(1, 1, WIDTH)),
        gain=nn.Parameter(torch.randn(WIDTH)), mask=(torch.arange(5) % 2).double(),
    )  # fmt: skip
    for part in (made.norm, made.last, made.rms):
        nn.init.normal_(part.weight, 1.0, 0.3)
    return made.double().eval()


def search(compute: Compute) -> Stream | Rejection:
    found, refused = find_streams(surgeon.trace(model(compute), X.double()))
    (one,) = [*found, *refused]
    return one


def block(m: Any, x: Tensor) -> Tensor:
    return x + torch.tanh(m.mlp(m.norm(x)))


def ends(m: Any, x: Tensor) -> Tensor:
    return m.head(m.last(x))  # type: ignore[no-any-return]


def inner(m: Any, x: Tensor) -> Tensor:
    return m.more(torch.tanh(m.norm(x) @ m.mlp.weight))  # type: ignore[no-any-return]


def layer(m: Any, x: Tensor) -> Tensor:
    """A layer that a stream can carry: its last step is a linear layer. Its first one has no bias."""
    return x + inner(m, x)


TURNED: dict[str, Compute] = {
    "plain": lambda m, x: ends(m, layer(m, m.embed(x))),
    "scaled by numbers": lambda m, x: ends(m, layer(m, m.embed(x) * 3.0) / 2),
    "scaled by a gain": lambda m, x: ends(m, (y := m.embed(x)) + m.drop(inner(m, y) * m.gain)),
    "a difference": lambda m, x: ends(m, (y := m.embed(x)) - inner(m, y)),
    "masked tokens": lambda m, x: ends(m, layer(m, m.embed(x) * m.mask[:, None])),
    "zeros": lambda m, x: ends(m, layer(m, m.embed(x).masked_fill(m.mask[:, None] > 0, 0.0))),
    "chosen tokens": lambda m, x: ends(m, layer(m, torch.where(m.mask[:, None] > 0, m.embed(x), m.token))),
    "a convolution": lambda m, x: ends(m, layer(m, m.conv(x.transpose(1, 2)).transpose(1, 2))),
    "a token in front": lambda m, x: ends(m, layer(m, torch.cat([m.token.expand(len(x), -1, -1), m.embed(x)], 1))),
    "stacked": lambda m, x: ends(m, layer(m, torch.stack([m.embed(x), m.more(x)], 0)).flatten(0, 1)),
    "in channels": lambda m, x: ends(m, layer(m, m.embed(x)).transpose(1, 2).flip(2).transpose(1, 2)),
    "in halves": lambda m, x: ends(m, torch.cat(layer(m, m.embed(x)).split([2, 3], 1), 1)),
    "of one token": lambda m, x: m.head(m.last(layer(m, m.embed(x)))[:, 0]),
    "of mean tokens": lambda m, x: m.head(m.drop(m.last(layer(m, m.embed(x))).mean(1))),
    "side by side": lambda m, x: ends(m, (y := m.embed(x)) + m.more(F.relu(m.mlp(n := m.norm(y)))) + m.more(n)),
}  # fmt: skip


@pytest.mark.parametrize("name", TURNED)
def test_what_can_be_turned_is_turned_exactly(name: str) -> None:
    made = model(TURNED[name])
    graph = surgeon.trace(made, X.double())
    found, refused = find_streams(graph)
    assert len(found) == 1, refused
    data = [torch.randn(2, 5, WIDTH, dtype=torch.float64) for _ in range(4)]
    report = Rotate().apply(graph, inputs=X.double(), data=data)
    assert report.max_error is not None
    assert report.max_error < 1e-12
    assert (graph(X.double()) - made(X.double())).abs().max() < 1e-11
    assert "layer_norm" not in str(graph.graph)


REFUSED: dict[str, tuple[Compute, str, str]] = {
    "an activation writes": (lambda m, x: ends(m, block(m, m.embed(x))), "stream-is-written", "tanh"),
    "an input writes": (lambda m, x: ends(m, layer(m, x)), "stream-is-written", "the model's input 'x'"),
    "a number is added": (lambda m, x: ends(m, layer(m, m.embed(x) + 1.0)), "stream-is-written", "add"),
    "a number for each token": (
        lambda m, x: ends(m, layer(m, m.embed(x) + m.mask[:, None])), "stream-is-written", "no number for each channel"
    ),
    "returned": (lambda m, x: (y := layer(m, m.embed(x)), ends(m, y)), "stream-is-read", "the model returns it"),
    "a norm is returned": (
        lambda m, x: (y := m.last(layer(m, m.embed(x))), m.head(y)), "stream-is-read",
        "the model returns what 'last' gives",
    ),
    "an activation reads": (lambda m, x: ends(m, layer(m, F.relu(m.embed(x) + m.token))), "stream-is-written", "relu"),
    "one channel is read": (
        lambda m, x: ends(m, y := layer(m, m.embed(x))) + y[..., :1], "stream-is-read", "slice"
    ),
    "read without a norm": (
        lambda m, x: ends(m, y := layer(m, m.embed(x))) + m.head(y), "stream-is-read",
        "'head' reads it without a LayerNorm",
    ),
    "a gain on the stream": (lambda m, x: ends(m, layer(m, m.embed(x)) * m.gain), "stream-is-read", "mul"),
    "two kinds of norms": (
        lambda m, x: ends(m, (y := m.embed(x)) + m.more(F.relu(m.mlp(m.rms(y))))), "mixed-norms",
        "LayerNorms and RMSNorms",
    ),
    "post-norm": (
        lambda m, x: m.head(m.last((y := m.norm(m.embed(x) + m.token)) + m.more(F.relu(m.mlp(y))))),
        "post-norm", "'norm'",
    ),
    "a norm behind the layer": (
        lambda m, x: ends(m, (y := m.embed(x)) + m.norm(m.more(F.relu(m.mlp(y))))), "post-norm", "'norm'"
    ),
    "a computed weight": (
        lambda m, x: ends(m, (y := m.embed(x)) + F.linear(F.relu(m.mlp(m.norm(y))), m.more.weight * m.mask[0])),
        "unreadable-linear", "its weight is computed",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_turned_is_refused_with_the_reason(name: str) -> None:
    compute, code, words = REFUSED[name]
    found = search(compute)
    assert isinstance(found, Rejection)
    assert (found.code, words in found.reason) == (code, True), found
    assert found.node


def test_a_norm_that_no_stream_goes_through_is_no_candidate() -> None:
    graph = surgeon.trace(model(lambda m, x: m.head(m.norm(m.embed(x)))), X.double())
    assert find_streams(graph) == ([], [])


def test_an_rms_norm_leaves_the_mean_and_lets_linear_layers_read() -> None:
    def compute(m: Any, x: Tensor) -> Tensor:
        y = m.embed(x)
        y = y + m.more(F.relu(m.mlp(m.rms(y))))
        return m.head(y)  # type: ignore[no-any-return]

    found = search(compute)
    assert isinstance(found, Stream)
    assert not found.centred
    assert [reader.norm is None for reader in found.readers] == [False, True]
    assert found.describe == f"stream of width {WIDTH}, 1 RMSNorm"
