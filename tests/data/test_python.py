"""Data that is given in Python: loaders, lists, and functions that return them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import datasets
import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from surgeon.data.batch import Batch, Batches
from surgeon.data.data import Data
from surgeon.data.files import load_data
from surgeon.errors import DataError, UsageError


def test_data_of_a_loader_can_be_read_again() -> None:
    loader = DataLoader(TensorDataset(torch.arange(6.0).view(3, 2), torch.tensor([0, 1, 2])), batch_size=2)
    data = Data.of(loader, task="classification")
    assert len(data.train) == 2
    for _ in range(2):
        assert [batch.size for batch in data.train] == [2, 1]
    batch = next(iter(data.train))
    assert torch.isfinite(data.loss(torch.zeros(2, 3), batch))
    assert data.fingerprint == "python:torch.utils.data.dataloader.DataLoader"


def test_data_of_data() -> None:
    data = Data([torch.ones(1)], description="mine", task="classification")
    assert Data.of(data) is data
    other = Data.of(data, task="causal-lm")
    assert (other.task, other.description) == ("causal-lm", "mine")
    assert other.loss is not data.loss
    assert Data.of(data, task="classification").loss is data.loss

    def loss(outputs: Any, batch: Batch) -> Tensor:
        return outputs.sum()

    assert Data.of(data, loss=loss).loss is loss
    assert Data.of([torch.ones(1)]).loss is None


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ((x for x in [torch.ones(1)]), "is a generator, which can be read only once"),
        (iter([torch.ones(1)]), "is a list_iterator, which can be read only once"),
        (TensorDataset(torch.ones(1)), r"is a TensorDataset of single samples. Wrap it: DataLoader"),
        (datasets.Dataset.from_dict({"x": [1]}), r"is a Dataset of single samples"),
        ({"x": torch.ones(1)}, "is a dict, not a list of batches"),
        (torch.ones(1), "is a Tensor, not a list of batches"),
        ("data.csv", "is a str, not a list of batches"),
        (3, "is a int, not a list of batches"),
    ],
)
def test_what_is_no_data(source: Any, message: str) -> None:
    with pytest.raises(DataError, match=message):
        Data.of(source)
    with pytest.raises(DataError, match=message):
        Data([torch.ones(1)], eval=source)


def test_data_that_runs_dry() -> None:
    class Once:
        def __init__(self) -> None:
            self.items = [torch.ones(1)]

        def __iter__(self) -> Iterator[Tensor]:
            while self.items:
                yield self.items.pop()

    batches = Batches(Once())
    assert len(list(batches)) == 1
    with pytest.raises(DataError, match="The data gave no batch"):
        list(batches)
    with pytest.raises(TypeError, match="Once has no length"):
        len(batches)


def test_unknown_task_of_data() -> None:
    with pytest.raises(UsageError, match="No task 'poetry'"):
        Data.of([torch.ones(1)], task="poetry")


@pytest.fixture
def functions(write_module: Callable[[str, str], None]) -> None:
    write_module(
        "my_data",
        "import datasets, torch\n"
        "from surgeon import Data\n"
        "def batches(): return [(torch.ones(2, 3), torch.tensor([0, 1]))]\n"
        "def data(): return Data(batches(), eval=batches(), description='mine')\n"
        "def table(): return datasets.Dataset.from_dict({'text': ['a', 'b'] * 5, 'label': [0, 1] * 5})\n"
        "def tables(): return datasets.DatasetDict(train=table(), test=table())\n"
        "def stream(): return table().to_iterable_dataset()\n"
        "def generator(): yield 1\n"
        "def broken(): raise ValueError('no luck')\n",
    )


def test_data_from_functions(functions: None, tokenizer: Any, config: Any) -> None:
    data = load_data("my_data:batches", task="classification")
    assert next(iter(data.train)).size == 2
    assert data.fingerprint == "python:my_data:batches"
    assert data.loss is not None
    data = load_data("my_data.py:data")
    assert data.description == "my_data.py:data: mine"
    assert data.eval is not None
    assert "9 samples to train on, 1 to" in load_data("my_data:table", tokenizer=tokenizer, config=config).description
    assert (
        "10 samples to train on, 10 to" in load_data("my_data:tables", tokenizer=tokenizer, config=config).description
    )


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("stream", "my_data:stream returns a streaming dataset"),
        ("generator", "is a generator, which can be read only once"),
        ("broken", "my_data:broken raised ValueError: no luck"),
        ("missing", "has no 'missing'"),
    ],
)
def test_functions_that_fail(functions: None, name: str, message: str) -> None:
    with pytest.raises(DataError, match=message):
        load_data(f"my_data:{name}")
