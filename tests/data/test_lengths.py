"""Texts of like length go together, and nothing is lost, repeated or ordered by it otherwise."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from torch import Tensor

from surgeon.data.files import Loader, load_data

from .tables import PAD, write_lines


class Numbers:
    """Collates the numbers of words; what tells batches apart is which they are, and what was drawn for them."""

    generator: torch.Generator | None = None

    def __call__(self, rows: list[dict[str, int]]) -> dict[str, Tensor]:
        drawn = torch.rand(len(rows), generator=self.generator)
        return {"number": torch.tensor([row["number"] for row in rows]), "drawn": drawn}


def lengths(count: int, longest: int = 40) -> list[int]:
    """Random lengths, in no order."""
    return torch.randint(4, longest, (count,), generator=torch.Generator().manual_seed(0)).tolist()


def loader(words: list[int], *, seed: int = 0, shuffle: bool = True, measured: bool = True) -> Loader:
    rows = datasets.Dataset.from_dict({"number": list(range(len(words)))})
    return Loader(rows, Numbers(), 8, seed, lengths=words if measured else None, shuffle=shuffle)


def drawn(one: Loader) -> list[list[int]]:
    return [batch.kwargs["number"].tolist() for batch in one]


@pytest.mark.parametrize("shuffle", [True, False])
@pytest.mark.parametrize("count", [1, 7, 8, 9, 400, 401, 1003])
def test_every_sample_comes_once_an_epoch(count: int, shuffle: bool) -> None:
    one = loader(lengths(count), shuffle=shuffle)
    for _ in range(2):
        batches = drawn(one)
        assert sorted(number for batch in batches for number in batch) == list(range(count))
        assert len(batches) == len(one) == -(-count // 8)
        assert sorted(map(len, batches), reverse=True)[: len(batches) - 1] == [8] * (len(batches) - 1)


@pytest.mark.parametrize("shuffle", [True, False])
def test_words_of_like_length_go_together(shuffle: bool) -> None:
    words = lengths(800)

    def padded(one: Loader) -> float:
        spent = sum(len(batch) * max(words[number] for number in batch) for batch in drawn(one))
        return spent / sum(words) - 1

    together = padded(loader(words, shuffle=shuffle))
    assert together < 0.05 < 0.4 < padded(loader(words, shuffle=shuffle, measured=False))


def test_batches_are_not_ordered_by_length() -> None:
    """Sorted batches would train on the long texts first."""
    words = lengths(400)
    longest = torch.tensor([float(max(words[number] for number in batch)) for batch in drawn(loader(words))])
    place = torch.arange(50.0)
    correlation = torch.corrcoef(torch.stack([place, longest]))[0, 1]
    assert abs(float(correlation)) < 0.4


def test_company_and_order_change_from_epoch_to_epoch() -> None:
    one = loader(lengths(400))
    first, second = drawn(one), drawn(one)
    assert first != second
    assert {frozenset(batch) for batch in first} != {frozenset(batch) for batch in second}


def test_same_seed_same_batches_and_draws() -> None:
    words = lengths(100)

    def epochs(one: Loader) -> list[list[list[float]]]:
        return [[value.tolist() for batch in one for value in batch.kwargs.values()] for _ in range(2)]

    state = torch.random.get_rng_state()
    first = epochs(loader(words))
    assert epochs(loader(words)) == first
    assert epochs(loader(words, seed=1)) != first
    assert torch.equal(torch.random.get_rng_state(), state)


def test_a_pass_that_was_cut_short_leaves_the_next_epochs_alone() -> None:
    """What a resumed fit relies on: the batches of an epoch follow from its number."""
    words = lengths(100)
    whole, cut = loader(words), loader(words)
    epochs = [drawn(whole) for _ in range(3)]
    assert next(iter(cut)).kwargs["number"].tolist() == epochs[0][0]
    assert [drawn(cut), drawn(cut)] == epochs[1:]


def test_without_shuffling_every_pass_is_the_same() -> None:
    one = loader(lengths(100), shuffle=False)
    assert drawn(one) == drawn(one)
    plain = loader(lengths(40), shuffle=False, measured=False)
    assert drawn(plain) == [list(range(start, start + 8)) for start in range(0, 40, 8)]


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
