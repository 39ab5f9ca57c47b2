"""What kind of computation a node is, in words for the user."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import surgeon
from surgeon.graph.ops import barrier, is_copy, is_pointwise, op_name
from tests.small_models import Function

X = torch.randn(2, 5, 6, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    ("compute", "name", "pointwise", "words"),
    [
        (torch.tanh, "tanh", True, None),
        (lambda x: x * 2.0, "mul", True, None),
        (lambda x: F.dropout(x, 0.5), "dropout", False, None),
        (lambda x: x.transpose(1, 2), "transpose", False, None),
        (lambda x: x.softmax(-1), "softmax", False, "a softmax"),
        (lambda x: F.layer_norm(x, (6,)), "layer_norm", False, "a normalisation"),
        (lambda x: x.mean(-1), "mean", False, "a mean"),
        (lambda x: torch.cat([x, x], -1), "cat", False, "a concatenation"),
        (lambda x: x.roll(1, 1), "roll", False, "a shift"),
    ],
)
def test_kinds_of_ops(compute: Callable[[Tensor], Tensor], name: str, pointwise: bool, words: str | None) -> None:
    graph = surgeon.trace(Function(lambda m, x: compute(x)), X)
    (node,) = (node for node in graph.graph.nodes if node.op == "call_function" and op_name(node) == name)
    assert is_pointwise(node) is pointwise
    assert barrier(node) == words


@pytest.mark.parametrize(("dtype", "copy"), [(torch.float64, True), (torch.int64, False)])
def test_a_conversion_to_another_kind_of_number_is_no_copy(dtype: torch.dtype, copy: bool) -> None:
    graph = surgeon.trace(Function(lambda m, x: x.to(dtype) * 2), X)
    (node,) = (node for node in graph.graph.nodes if op_name(node) in ("to", "_to_copy"))
    assert is_copy(node) is copy
    assert barrier(node) == (None if copy else "a conversion to another number type")
