"""Texts of like length go together, and nothing is lost, repeated or ordered by it otherwise."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from surgeon.data.batch import Batch
from surgeon.data.files import Loader, load_data

from .tables import PAD, write_lines


class Words:
    """A sampler of words: what tells batches apart is which words they hold, and what was drawn for them."""

    def __init__(self, *, measured: bool = True) -> None:
        self.measured = measured

    def collate(self, samples: Any, generator: torch.Generator) -> Batch:
        return Batch((list(samples), float(torch.rand((), generator=generator))), {})

    def lengths(self, samples: Any) -> list[int] | None:
        return [len(word) for word in samples] if self.measured else None


def words(count: int, longest: int = 40) -> list[str]:
    """Distinct words of random lengths, the lengths in no order."""
    lengths = torch.randint(4, longest, (count,), generator=torch.Generator().manual_seed(0)).tolist()
    return [f"{index:04}".ljust(length, "x") for index, length in enumerate(lengths)]


def loader(samples: list[str], *, size: int = 8, seed: int = 0, shuffle: bool = True, measured: bool = True) -> Any:
    return Loader(samples, Words(measured=measured), size, seed, shuffle=shuffle)  # type: ignore[arg-type]


def drawn(one: Loader) -> list[list[str]]:
    return [batch.args[0] for batch in one]


@pytest.mark.parametrize("shuffle", [True, False])
@pytest.mark.parametrize("count", [1, 7, 8, 9, 400, 401, 1003])
def test_every_sample_comes_once_an_epoch(count: int, shuffle: bool) -> None:
    samples = words(count)
    one = loader(samples, shuffle=shuffle)
    for _ in range(2):
        batches = drawn(one)
        assert sorted(word for batch in batches for word in batch) == sorted(samples)
        assert len(batches) == len(one) == -(-count // 8)
        assert sorted(map(len, batches), reverse=True)[: len(batches) - 1] == [8] * (len(batches) - 1)


@pytest.mark.parametrize("shuffle", [True, False])
def test_words_of_like_length_go_together(shuffle: bool) -> None:
    samples = words(800)

    def padded(one: Loader) -> float:
        batches = drawn(one)
        spent = sum(len(batch) * max(map(len, batch)) for batch in batches)
        return spent / sum(map(len, samples)) - 1

    together = padded(loader(samples, shuffle=shuffle))
    assert together < 0.05 < 0.4 < padded(loader(samples, shuffle=shuffle, measured=False))


def test_batches_are_not_ordered_by_length() -> None:
    """Sorted batches would train on the long texts first."""
    longest = torch.tensor([float(max(map(len, batch))) for batch in drawn(loader(words(400)))])
    place = torch.arange(50.0)
    correlation = torch.corrcoef(torch.stack([place, longest]))[0, 1]
    assert abs(float(correlation)) < 0.4


def test_company_and_order_change_from_epoch_to_epoch() -> None:
    one = loader(words(400))
    first, second = drawn(one), drawn(one)
    assert first != second
    assert {frozenset(batch) for batch in first} != {frozenset(batch) for batch in second}


def test_same_seed_same_batches_and_draws() -> None:
    samples = words(100)
    one, same, other = loader(samples), loader(samples), loader(samples, seed=1)
    epochs = [[batch.args for batch in one] for _ in range(2)]
    assert [[batch.args for batch in same] for _ in range(2)] == epochs
    assert [batch.args for batch in other] != epochs[0]


def test_a_pass_that_was_cut_short_leaves_the_next_epochs_alone() -> None:
    """What a resumed fit relies on: the batches of an epoch follow from its number."""
    samples = words(100)
    whole, cut = loader(samples), loader(samples)
    epochs = [drawn(whole) for _ in range(3)]
    assert next(iter(cut)).args[0] == epochs[0][0]
    assert [drawn(cut), drawn(cut)] == epochs[1:]


def test_without_shuffling_every_pass_is_the_same() -> None:
    one = loader(words(100), shuffle=False)
    assert drawn(one) == drawn(one)


def test_samples_of_one_length_keep_their_plain_order() -> None:
    samples = [f"{index:04}" for index in range(40)]
    assert drawn(loader(samples, shuffle=False)) == [samples[start : start + 8] for start in range(0, 40, 8)]


@pytest.mark.parametrize("task", ["sequence-classification", "masked-lm"])
def test_texts_are_grouped_and_padding_is_rare(tmp_path: Path, tokenizer: Any, config: Any, task: str) -> None:
    rows = [{"text": " ".join("abcde"[index % 5] for _ in range(1 + index % 20)), "label": 0} for index in range(200)]
    path = write_lines(tmp_path / "a.jsonl", rows)
    data = load_data(path, tokenizer=tokenizer, config=config, task=task, batch_size=10, eval_fraction=0.2)

    def padding(batches: Any) -> float:
        ids: list[Tensor] = [batch.kwargs["input_ids"] for batch in batches]
        return sum(int((one == PAD).sum()) for one in ids) / sum(one.numel() for one in ids)

    assert padding(data.train) < 0.1
    assert padding(data.eval) < 0.2
