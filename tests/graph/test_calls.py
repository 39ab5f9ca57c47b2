"""How a graph is called: inputs in any form, and in the order of its placeholders."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers as hf
from torch import Tensor, nn

import surgeon
from surgeon.errors import UsageError
from surgeon.graph.calls import as_args_kwargs, flat_inputs

X = torch.randn(3, 4, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("form", ["names", "positions", "both", "other_order"])
def test_flat_inputs(form: str) -> None:
    class Two(nn.Module):
        def forward(self, a: Tensor, b: Tensor) -> Tensor:
            return a - b

    graph = surgeon.trace(Two(), {"a": X, "b": X + 1})
    args, kwargs = {
        "names": ((), {"a": X, "b": X + 1}),
        "positions": ((X, X + 1), {}),
        "both": ((X,), {"b": X + 1}),
        "other_order": ((), {"b": X + 1, "a": X}),
    }[form]
    first, second = flat_inputs(graph, args, kwargs)
    assert torch.equal(first, X)
    assert torch.equal(second, X + 1)


@pytest.mark.parametrize(
    ("args", "kwargs"), [((), {"a": X}), ((), {"a": X, "b": X, "c": X}), ((X,), {"a": X, "b": X}), ((X, X, X), {})]
)
def test_flat_inputs_refuses_other_arguments(args: Any, kwargs: Any) -> None:
    class Two(nn.Module):
        def forward(self, a: Tensor, b: Tensor) -> Tensor:
            return a - b

    graph = surgeon.trace(Two(), (X, X))
    with pytest.raises(TypeError):
        flat_inputs(graph, args, kwargs)


def test_as_args_kwargs() -> None:
    x = torch.ones(1)
    assert as_args_kwargs(x) == ((x,), {})
    assert as_args_kwargs((x, x)) == ((x, x), {})
    assert as_args_kwargs([x]) == ((x,), {})
    assert as_args_kwargs(()) == ((), {})
    assert as_args_kwargs({"a": x}) == ((), {"a": x})
    assert as_args_kwargs(((x,), {"a": x})) == ((x,), {"a": x})
    assert as_args_kwargs((x, {"a": x})) == ((x, {"a": x}), {})
    assert as_args_kwargs(hf.BatchEncoding({"a": x})) == ((), {"a": x})
    with pytest.raises(UsageError, match="example inputs are of type int"):
        as_args_kwargs(3)
