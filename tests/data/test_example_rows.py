"""Example inputs out of the data: which rows, and that reading them changes nothing."""

from __future__ import annotations

from typing import Any

import datasets
import pytest
import torch
import transformers as hf
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import surgeon
from surgeon.data.data import Data
from surgeon.data.example_rows import example_rows, read_ahead
from surgeon.data.files import Loader
from surgeon.graph.calls import argument_names
from surgeon.passes import Moeify
from surgeon.surgery.pipeline import Pipeline
from tests.small_models import stack, vectors


def test_two_rows_with_most_and_least_padding() -> None:
    mask = (torch.arange(5) < torch.tensor([[3], [5], [4], [2]])).long()
    shared = torch.ones(5, 5)
    args, kwargs = example_rows(Data([{"input_ids": mask * 7, "attention_mask": mask, "bias": shared}]))
    assert args == ()
    assert kwargs["attention_mask"].sum(1).tolist() == [5, 2]
    assert kwargs["input_ids"].sum(1).tolist() == [35, 14]
    assert kwargs["bias"] is shared
    args, kwargs = example_rows(Data([((torch.arange(3), torch.arange(3) + 1), torch.arange(3))]))
    assert [value.tolist() for value in args] == [[0, 1], [1, 2]]
    assert kwargs == {}
    assert example_rows(Data([torch.ones(1, 2)]))[0][0].shape == (1, 2)


def loaders() -> list[Any]:
    rows = TensorDataset(torch.arange(40.0))
    own = torch.Generator().manual_seed(0)
    table = datasets.Dataset.from_dict({"x": list(range(40))})
    return [
        DataLoader(rows, 4, shuffle=True),
        DataLoader(rows, 4, shuffle=True, generator=own),
        Loader(table, hf.default_data_collator, 4, 0, shuffle=True),
    ]


@pytest.mark.parametrize("kind", [0, 1, 2])
def test_what_is_read_later_does_not_change(kind: int) -> None:
    def epochs(*, looked: bool) -> list[list[float]]:
        torch.manual_seed(0)
        data = Data(loaders()[kind])
        if looked:
            assert len(read_ahead(data, 3)) == 3
        return [next(iter((*batch.args, *batch.kwargs.values()))).tolist() for _ in range(2) for batch in data.train]

    assert epochs(looked=True) == epochs(looked=False)


def test_reading_ahead_ends_at_batches_bytes_or_data() -> None:
    data = Data([torch.ones(4, 2) * place for place in range(5)])  # 32 bytes each
    assert [int(batch.args[0][0, 0]) for batch in read_ahead(data, 3)] == [0, 1, 2]
    assert [len(read_ahead(data, 9, size)) for size in (1, 32, 33, 64, 65)] == [1, 1, 2, 2, 3]
    assert len(read_ahead(data, 9)) == 5


def test_a_pipeline_is_traced_with_the_data_where_no_inputs_are_given() -> None:
    surgery = Pipeline([Moeify(experts=4, steps=1)]).run(stack("relu"), data=[vectors(6)])
    assert surgery.inputs[1]["x"].shape == (2, *vectors()["x"].shape[1:])
    assert surgery.graph(**vectors(5)).shape[0] == 5


def test_a_loader_of_a_tokenised_dataset_brings_all_its_inputs(tokenizer: Any, config: Any) -> None:
    """Token types too, which are no example inputs by default."""

    def encoded(row: dict[str, Any]) -> Any:
        return tokenizer(row["a"], row["b"], return_token_type_ids=True)

    rows = {"a": ["a b", "c"] * 4, "b": ["d", "e a b"] * 4, "label": [0, 1] * 4}
    table = datasets.Dataset.from_dict(rows).map(encoded, remove_columns=["a", "b"])
    loader = DataLoader(table, batch_size=4, collate_fn=hf.DataCollatorWithPadding(tokenizer))
    torch.manual_seed(0)
    model: nn.Module = hf.BertForSequenceClassification(config).eval()
    surgery = Pipeline([Moeify(experts=4, steps=1)]).run(model, data=loader)
    assert set(argument_names(surgery.graph)) == {"input_ids", "attention_mask", "token_type_ids"}
    surgeon.set_tau(surgery.graph, 0.0)
    batch: dict[str, Tensor] = dict(next(iter(loader)))
    batch.pop("labels")
    with torch.no_grad():
        torch.testing.assert_close(surgery.graph.eval()(**batch).logits, model(**batch).logits, rtol=1e-4, atol=1e-5)
