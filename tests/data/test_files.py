"""Every kind of file: how its rows are ordered, limited and divided, and what cannot be read."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch

from surgeon.data.batch import Batch
from surgeon.data.data import Data
from surgeon.data.files import load_data
from surgeon.errors import DataError, UsageError

from .tables import PAD, WORDS, rows, texts, write_lines


@pytest.mark.parametrize("suffix", ["jsonl", "json", "csv", "tsv", "parquet", "saved", "folder"])
def test_kinds_of_files(
    tmp_path: Path, tokenizer: Any, config: Any, suffix: str, capfd: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / f"data.{suffix}"
    table = datasets.Dataset.from_list(rows(20))
    match suffix:
        case "jsonl":
            write_lines(path, rows(20))
        case "json":
            path.write_text(json.dumps(rows(20)))
        case "csv" | "tsv":
            mark = {"csv": ",", "tsv": "\t"}[suffix]
            path.write_text(f"text{mark}label\n" + "".join(f"{r['text']}{mark}{r['label']}\n" for r in rows(20)))
        case "parquet":
            table.to_parquet(path)
        case "saved":
            table.save_to_disk(path)
        case "folder":
            path.mkdir()
            write_lines(path / "train.jsonl", rows(20))
    capfd.readouterr()
    before = sorted(file.name for file in path.rglob("*"))
    data = load_data(str(path), tokenizer=tokenizer, config=config, batch_size=4)
    assert data.task == "sequence-classification"
    assert "18 samples to train on, 2 to evaluate on" in data.description
    batches = list(data.train)
    assert [batch.size for batch in batches] == [4, 4, 4, 4, 2]
    assert len(data.train) == 5
    seen = sorted(
        tuple(row) for batch in [*batches, *data.eval] for row in zip(ids(batch), batch.labels.tolist(), strict=True)
    )
    assert seen == sorted((" ".join(["[CLS]", row["text"], "[SEP]"]), row["label"]) for row in rows(20))
    assert sorted(file.name for file in path.rglob("*")) == before
    assert capfd.readouterr() == ("", "")


def ids(batch: Batch) -> list[str]:
    return [" ".join(WORDS[i] for i in row if i != PAD) for row in batch.kwargs["input_ids"].tolist()]


def test_order_depends_on_seed_and_epoch_alone(tmp_path: Path, tokenizer: Any, config: Any) -> None:
    path = write_lines(tmp_path / "a.jsonl", rows(20))

    def load(seed: int) -> Data:
        return load_data(path, tokenizer=tokenizer, config=config, seed=seed)

    first, state = load(0), torch.random.get_rng_state()
    epochs = [texts(first.train) for _ in range(2)]
    assert torch.equal(torch.random.get_rng_state(), state)
    assert epochs[0] != epochs[1]
    torch.manual_seed(1)
    second = load(0)
    assert [texts(second.train) for _ in range(2)] == epochs
    assert texts(first.eval) == texts(first.eval) == texts(second.eval)
    assert texts(load(1).train) != epochs[0]
    assert first.fingerprint == second.fingerprint != load(1).fingerprint


def test_fingerprint_follows_the_contents_and_the_options(tmp_path: Path, tokenizer: Any, config: Any) -> None:
    path = write_lines(tmp_path / "a.jsonl", rows(9))
    first = load_data(path, tokenizer=tokenizer, config=config).fingerprint
    shutil.copy(path, tmp_path / "b.jsonl")
    assert load_data(str(tmp_path / "b.jsonl"), tokenizer=tokenizer, config=config).fingerprint == first
    for change in ({"batch_size": 4}, {"max_length": 9}, {"limit": 5}, {"eval_fraction": 0.5}, {"label": "label"}):
        assert load_data(path, tokenizer=tokenizer, config=config, **change).fingerprint != first
    write_lines(tmp_path / "a.jsonl", rows(10))
    assert load_data(path, tokenizer=tokenizer, config=config).fingerprint != first


def test_limit_takes_random_rows(tmp_path: Path, tokenizer: Any, config: Any) -> None:
    ordered = sorted(rows(60), key=lambda row: row["label"])
    path = write_lines(tmp_path / "a.jsonl", ordered)
    data = load_data(path, tokenizer=tokenizer, config=config, limit=30, eval_fraction=0, batch_size=30)
    (batch,) = data.train
    assert batch.size == 30
    assert batch.labels.unique().numel() == 3


def test_splits(tmp_path: Path, tokenizer: Any, config: Any) -> None:
    for name, count in (("train", 6), ("validation", 4), ("test", 3)):
        write_lines(tmp_path / f"{name}.jsonl", rows(count))
    data = load_data(str(tmp_path), tokenizer=tokenizer, config=config)
    assert sum(batch.size for batch in data.train) == 6
    assert sum(batch.size for batch in data.eval) == 4
    (tmp_path / "train.jsonl").unlink()
    with pytest.raises(DataError, match=r"has the splits .*, but none is named 'train'"):
        load_data(str(tmp_path), tokenizer=tokenizer, config=config)


def test_one_sample_cannot_be_divided(
    tmp_path: Path, tokenizer: Any, config: Any, caplog: pytest.LogCaptureFixture
) -> None:
    path = write_lines(tmp_path / "a.jsonl", rows(1))
    assert load_data(path, tokenizer=tokenizer, config=config).eval is None
    assert "too little data to hold out a part" in caplog.text
    held = load_data(write_lines(tmp_path / "b.jsonl", rows(4)), tokenizer=tokenizer, config=config).eval
    assert held is not None
    assert [batch.size for batch in held] == [1]  # a tenth of four rows, but at least one


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", "", r"a.jsonl is empty"),
        ("a.jsonl", "{{{", r"a.jsonl cannot be read"),
        ("a.csv", "text,label\n", r"a.csv cannot be read: it has no rows"),
        ("a.parquet", "junk", r"a.parquet cannot be read"),
        ("a.xlsx", "junk", r"a.xlsx: cannot read .xlsx files. Known: .json"),
    ],
)
def test_damaged_files(tmp_path: Path, tokenizer: Any, config: Any, name: str, content: str, message: str) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(DataError, match=message):
        load_data(str(tmp_path / name), tokenizer=tokenizer, config=config)


def test_folders_that_cannot_be_read(tmp_path: Path, tokenizer: Any, config: Any) -> None:
    with pytest.raises(DataError, match="is an empty folder"):
        load_data(str(tmp_path), tokenizer=tokenizer, config=config)
    (tmp_path / "notes.xyz").write_text("x")
    with pytest.raises(DataError, match="cannot be read"):
        load_data(str(tmp_path), tokenizer=tokenizer, config=config)
    with pytest.raises(DataError, match=r"No file or folder 'missing.csv'.*Data is not downloaded"):
        load_data("missing.csv", tokenizer=tokenizer, config=config)


def test_options_out_of_range(tmp_path: Path) -> None:
    for name, wrong in {"batch_size": 0, "max_length": 1, "eval_fraction": 1.0, "limit": 0}.items():
        with pytest.raises(UsageError, match=f"^{name} is {wrong}, but must be at least ") as error:
            load_data(str(tmp_path), **{name: wrong})
        assert error.value.in_command.startswith(f"--{name.replace('_', '-')} is {wrong}, but must be at least ")


def test_task_must_be_known(tmp_path: Path, config: Any) -> None:
    path = write_lines(tmp_path / "a.jsonl", rows(2))
    with pytest.raises(UsageError, match=r"the task is unknown. Give task=, one of causal-lm"):
        load_data(path)
    with pytest.raises(UsageError, match="files cannot be read for the task 'poetry'"):
        load_data(path, config=config, task="poetry")
