"""Multiply-adds of single ops, against numbers counted by hand, and the names of ops that have no formula."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import surgeon
from surgeon.measure.meter import measure
from surgeon.measure.multiply_adds import Counter
from surgeon.passes import Moeify
from tests.small_models import Function

B, T, D = 2, 5, 8
X = torch.randn(B, T, D, generator=torch.Generator().manual_seed(0))
A, V = X[0], X[0, 0]  # [T, D], [D]
ENDS = torch.tensor([1, 5], dtype=torch.int32)
HALF = X[0].bfloat16()


def counted(call: Callable[[], Any]) -> tuple[int, tuple[str, ...]]:
    with torch.no_grad(), Counter() as counter:
        call()
    return counter.multiply_adds, counter.uncounted


def recurrent(kind: type[nn.Module], **options: Any) -> Callable[[], Any]:
    layer = kind(D, 6, batch_first=True, **options)
    return lambda: layer(X)


@pytest.mark.parametrize(
    ("call", "expected"),
    [
        (lambda: A @ V, T * D),
        (lambda: torch.addmv(A[:, 0], A, V), T * D),
        (lambda: V @ V, D),
        (lambda: torch.vdot(V, V), D),
        (lambda: torch.addr(A, A[:, 0], V), T * D),
        (lambda: torch.addbmm(torch.zeros(T, T), X, X.mT), B * T * D * T),
        (lambda: torch.baddbmm(torch.zeros(B, T, T), X, X.mT), B * T * D * T),
        (lambda: torch.einsum("btd,sd->bts", X, A), B * T * D * T),
        (lambda: F.grouped_mm(HALF, torch.zeros(2, D, 16).bfloat16(), offs=ENDS), T * D * 16),
        (lambda: F.grouped_mm(torch.zeros(2, 3, D).bfloat16(), HALF.mT[:, [0] * 5 + [1] * 3], offs=ENDS), 3 * D * 8),
        (lambda: F.grouped_mm(torch.zeros(16, 8).bfloat16().mT.contiguous(), torch.zeros(16, 8).bfloat16(),
                              offs=torch.tensor([8, 16], dtype=torch.int32)), 8 * 16 * 8),
        (lambda: F.grouped_mm(X.bfloat16(), torch.zeros(B, D, 16).bfloat16()), B * T * D * 16),
        (recurrent(nn.LSTM), B * T * 4 * 6 * (D + 6)),
        (recurrent(nn.LSTM, bidirectional=True, num_layers=2), B * T * 2 * 4 * 6 * ((D + 6) + (2 * 6 + 6))),
        (recurrent(nn.GRU), B * T * 3 * 6 * (D + 6)),
        (recurrent(nn.RNN), B * T * 6 * (D + 6)),
        (lambda: F.bilinear(X, X, torch.zeros(3, D, D)), B * T * 3 * D * D),
        (lambda: torch.conv_tbc(X, torch.zeros(2, D, 4), torch.zeros(4)), (B - 1) * T * 2 * D * 4),
        (lambda: F.conv1d(X, torch.zeros(4, T, 3)), B * (D - 2) * 4 * T * 3),
        (lambda: torch.cdist(X, X), B * T * T * D),
        (lambda: torch.cdist(torch.zeros(30, D), torch.zeros(30, D)), 30 * 30 * D),
        (lambda: F.pdist(A), T * (T - 1) // 2 * D),
        (lambda: torch._int_mm(torch.ones(4, 16).char(), torch.ones(16, 8).char()), 4 * 16 * 8),
        (lambda: F.scaled_dot_product_attention(X[:, None], X[:, None], X[:, None]), 2 * B * T * T * D),
        (lambda: F.scaled_dot_product_attention(
            torch.zeros(B, 4, T, D), torch.zeros(B, 2, T, D), torch.zeros(B, 2, T, D), enable_gqa=True
        ), 2 * B * 4 * T * T * D),
        (lambda: F.gelu(X).softmax(-1).sum() + F.layer_norm(X, (D,)).mean() + F.interpolate(X, 3).norm(), 0),
    ],
)  # fmt: skip
def test_counted_by_hand(call: Callable[[], Any], expected: int) -> None:
    assert counted(call) == (expected, ())


def test_the_formula_of_cudnn_is_that_of_the_layers() -> None:
    """Without a GPU the op only runs on meta tensors; here the formula gets its arguments."""
    from surgeon.measure.multiply_adds import _FORMULAS

    layer = nn.LSTM(D, 6, 2, bidirectional=True)
    weights = [tuple(weight.shape) for weight in layer.parameters()]
    expected, _ = counted(lambda: layer(X))
    assert _FORMULAS["aten::_cudnn_rnn"](tuple(X.shape), weights, 4, None, out_shape=None) == 2 * expected


@torch.library.custom_op("test_multiply_adds::mystery", mutates_args=())
def mystery(x: Tensor) -> Tensor:
    return x @ x.mT


@mystery.register_fake
def _(x: Tensor) -> Tensor:
    return x.new_empty(*x.shape[:-1], x.shape[-2])


@pytest.mark.parametrize(
    ("call", "name"),
    [
        (lambda: torch.fft.rfft(X), "aten::_fft_r2c"),
        (lambda: torch.linalg.inv(X[..., :T]), "aten::linalg_inv_ex"),
        (lambda: torch.linalg.svd(X), "aten::_linalg_svd"),
        (lambda: torch.matrix_exp(A[:, :T]), "aten::linalg_matrix_exp"),
        (lambda: mystery(X), "test_multiply_adds::mystery"),
    ],
)
def test_what_has_no_formula_is_named_once(call: Callable[[], Any], name: str) -> None:
    assert counted(lambda: (call(), call())) == (0, (name,))


def test_the_cost_of_a_graph_names_what_it_leaves_out() -> None:
    graph = surgeon.trace(Function(lambda m, x: mystery(m.up(x)), up=(D, 4)), X)
    cost, _ = measure(graph, (X,), {})
    assert (cost.multiply_adds, cost.uncounted) == (B * T * D * 4, ("test_multiply_adds::mystery",))
    assert cost.notes == ("The multiply-adds leave out test_multiply_adds::mystery: there is no formula.",)


def test_a_layer_that_is_one_op_in_evaluation_is_counted_as_its_parts() -> None:
    layer = nn.TransformerEncoderLayer(D, 2, 16, batch_first=True).eval()
    before = torch.backends.mha.get_fastpath_enabled()
    cost, _ = measure(layer, (X,), {})
    assert torch.backends.mha.get_fastpath_enabled() == before
    assert (cost.multiply_adds, cost.uncounted) == (B * T * (4 * D * D + 2 * T * D + 2 * D * 16), ())


def test_a_diff_says_what_its_numbers_leave_out() -> None:
    model = Function(lambda m, x: torch.fft.rfft(m.down(F.relu(m.up(x)))).abs(), up=(D, 16), down=(16, D)).eval()
    surgery = surgeon.Pipeline([Moeify(experts=4)]).run(model, inputs=X)
    assert "The multiply-adds leave out aten::_fft_r2c: there is no formula." in str(surgery.diff())
