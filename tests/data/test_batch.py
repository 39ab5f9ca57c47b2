"""Batches of every form, and what is no batch."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import transformers as hf
from torch import Tensor

from surgeon.data.batch import Batch, first_batches
from surgeon.errors import DataError


def test_first_batches_stop_at_the_number_of_samples() -> None:
    read: list[int] = []

    def items() -> Iterator[Tensor]:
        for number in range(4):
            read.append(number)
            yield torch.ones(2, 3)

    for samples, expected in ((1, 1), (2, 1), (3, 2), (4, 2), (99, 4)):
        read.clear()
        assert len(first_batches(items(), samples)) == len(read) == expected


def test_batch_forms() -> None:
    x, y = torch.ones(2, 3), torch.tensor([0, 1])
    forms: list[tuple[Any, tuple[int, list[str], bool]]] = [
        (x, (1, [], False)),
        ([x], (1, [], False)),
        ((x, y), (1, [], True)),
        ([x, y], (1, [], True)),
        (((x, x), y), (2, [], True)),
        ({"x": x, "labels": y}, (0, ["x"], True)),
        ({"x": x}, (0, ["x"], False)),
        (({"x": x}, y), (0, ["x"], True)),
        (hf.BatchEncoding({"x": x}), (0, ["x"], False)),
        (({"x": x}, None), (0, ["x"], False)),
    ]
    for form, expected in forms:
        batch = Batch.from_any(form)
        assert (len(batch.args), list(batch.kwargs), batch.labels is not None) == expected
        assert batch.size == 2
        assert Batch.from_any(batch) is batch


@pytest.mark.parametrize(
    ("item", "message"),
    [
        (3, "A batch is a int. Expected a dict of tensors"),
        ((), "A batch is a tuple of nothing"),
        ((torch.ones(1),) * 3, "A batch is a tuple of Tensor, Tensor, Tensor"),
        ({"x": ["a"]}, "A batch's 'x' is a list, not a tensor"),
        ((torch.ones(1), [1]), "A batch's labels is a list, not a tensor"),
        ({"labels": torch.ones(1)}, "A batch contains no input"),
    ],
)
def test_what_is_no_batch(item: Any, message: str) -> None:
    with pytest.raises(DataError, match=message):
        Batch.from_any(item)


def test_batch_moves_and_casts_inputs_only() -> None:
    batch = Batch((torch.ones(1),), {"ids": torch.ones(1, dtype=torch.long)}, torch.ones(1)).to("meta", torch.float16)
    tensors = (*batch.args, *batch.kwargs.values(), batch.labels)
    assert [tensor.dtype for tensor in tensors] == [torch.float16, torch.int64, torch.float32]
    assert {tensor.device.type for tensor in tensors} == {"meta"}
