"""Batches of every form, and data read from every kind of file, for every task."""

import json
import math
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
import transformers as hf
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from surgeon.data import Batch, Batches, Data, load_data
from surgeon.errors import DataError, UsageError
from surgeon.losses import evaluate

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "b", "c", "d", "e"]
PAD, CLS, SEP, MASK = 0, 2, 3, 4


@pytest.fixture
def tokenizer() -> Any:
    raw = Tokenizer(models.WordLevel({word: index for index, word in enumerate(WORDS)}, unk_token="[UNK]"))
    raw.pre_tokenizer = pre_tokenizers.Whitespace()
    raw.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", CLS), ("[SEP]", SEP)]
    )
    specials = {f"{name}_token": f"[{name.upper()}]" for name in ("pad", "unk", "cls", "sep", "mask")}
    return hf.PreTrainedTokenizerFast(tokenizer_object=raw, **specials, eos_token="[SEP]")


@pytest.fixture
def config() -> Any:
    return hf.BertConfig(
        num_hidden_layers=1,
        num_attention_heads=2,
        hidden_size=16,
        intermediate_size=32,
        vocab_size=len(WORDS),
        max_position_embeddings=32,
        num_labels=3,
        architectures=["BertForSequenceClassification"],
    )


def write_lines(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def rows(count: int) -> list[dict[str, Any]]:
    return [{"text": " ".join("abcde"[: 1 + index % 5]), "label": index % 3} for index in range(count)]


def texts(batches: Any) -> list[list[list[int]]]:
    return [batch.kwargs["input_ids"].tolist() for batch in batches]


# --- batches


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
        ({"labels": torch.ones(1)}, "A batch holds no input"),
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


# --- data from Python


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
        ((x for x in [torch.ones(1)]), "is a generator, which can be read once"),
        (iter([torch.ones(1)]), "is a list_iterator, which can be read once"),
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


# --- text classification


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


def test_padding_is_masked_and_long_texts_are_cut(tmp_path: Path, tokenizer: Any, config: Any) -> None:
    path = write_lines(tmp_path / "a.jsonl", [{"text": "a", "label": 0}, {"text": "a b c d e", "label": 1}])
    data = load_data(path, tokenizer=tokenizer, config=config, max_length=5, eval_fraction=0)
    (batch,) = data.train
    assert data.eval is None
    assert sorted(batch.kwargs["input_ids"].tolist()) == [[CLS, 5, SEP, PAD, PAD], [CLS, 5, 6, 7, SEP]]
    assert torch.equal(batch.kwargs["attention_mask"], (batch.kwargs["input_ids"] != PAD).long())


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


def test_fingerprint_follows_the_contents(tmp_path: Path, tokenizer: Any, config: Any) -> None:
    path = write_lines(tmp_path / "a.jsonl", rows(9))
    first = load_data(path, tokenizer=tokenizer, config=config).fingerprint
    shutil.copy(path, tmp_path / "b.jsonl")
    assert load_data(str(tmp_path / "b.jsonl"), tokenizer=tokenizer, config=config).fingerprint == first
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
    with pytest.raises(DataError, match=r"has the splits .*, and none is named 'train'"):
        load_data(str(tmp_path), tokenizer=tokenizer, config=config)


def test_pairs_of_texts(tmp_path: Path, tokenizer: Any, config: Any) -> None:
    path = write_lines(tmp_path / "a.jsonl", [{"premise": "a", "hypothesis": "b c", "gold": 2}] * 2)
    data = load_data(path, tokenizer=tokenizer, config=config, text="premise,hypothesis", label="gold", eval_fraction=0)
    (batch,) = data.train
    assert batch.kwargs["input_ids"].tolist() == [[CLS, 5, SEP, 6, 7, SEP]] * 2
    assert batch.labels.tolist() == [2, 2]


def test_rows_without_text_are_left_out_and_said(
    tmp_path: Path, tokenizer: Any, config: Any, caplog: pytest.LogCaptureFixture
) -> None:
    path = write_lines(tmp_path / "a.jsonl", [*rows(3), {"text": " ", "label": 1}, {"text": None, "label": 1}])
    data = load_data(path, tokenizer=tokenizer, config=config, eval_fraction=0)
    assert sum(batch.size for batch in data.train) == 3
    assert "2 of 5 rows have no text and are left out" in caplog.text


def test_one_sample_cannot_be_divided(
    tmp_path: Path, tokenizer: Any, config: Any, caplog: pytest.LogCaptureFixture
) -> None:
    path = write_lines(tmp_path / "a.jsonl", rows(1))
    assert load_data(path, tokenizer=tokenizer, config=config).eval is None
    assert "too little data to hold some out" in caplog.text


def label_data(tmp_path: Path, labels: list[Any], tokenizer: Any, config: Any) -> list[int]:
    path = write_lines(tmp_path / "a.jsonl", [{"text": "a", "label": label} for label in labels])
    data = load_data(path, tokenizer=tokenizer, config=config, eval_fraction=0)
    return sorted(label for batch in data.train for label in batch.labels.tolist())


def test_label_forms(tmp_path: Path, tokenizer: Any, config: Any) -> None:
    assert label_data(tmp_path, ["x", "y", "z", "x"], tokenizer, config) == [0, 0, 1, 2]
    assert label_data(tmp_path, [1.0, 2.0], tokenizer, config) == [1, 2]
    assert label_data(tmp_path, [True, False], tokenizer, config) == [0, 1]
    config.id2label = {0: "z", 1: "y", 2: "x"}
    config.label2id = {"z": 0, "y": 1, "x": 2}
    assert label_data(tmp_path, ["x", "y"], tokenizer, config) == [1, 2]
    with pytest.raises(DataError, match=r"the model has no class 'w'; it has 'z', 'y', 'x'\."):
        label_data(tmp_path, ["x", "w"], tokenizer, config)


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ([0, 3], r"row 1: label 3 is class 3, out of range: 0 to 2"),
        ([0, -1], r"row 1: label -1 is class -1, out of range"),
        ([0.0, 0.5], r"row 1: label 0.5 is not a class. Regression is not supported"),
        ([0.0, math.nan], r"row 1: label nan is not finite"),
        ([0, None], r"row 1: label None: the row has no label"),
        ([[0], [1]], r"row 0: label \[0\] is a list, not a class"),
        (["a", "b", "c", "d"], r"row 3: label 'd' is class 3, out of range"),
    ],
)
def test_wrong_labels(tmp_path: Path, tokenizer: Any, config: Any, labels: list[Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        label_data(tmp_path, labels, tokenizer, config)


def test_missing_columns(tmp_path: Path, tokenizer: Any, config: Any) -> None:
    path = write_lines(tmp_path / "a.jsonl", [{"words": "a", "kind": 0}])
    with pytest.raises(DataError, match=r"has no text column. It has: words, kind. Name the text column"):
        load_data(path, tokenizer=tokenizer, config=config)
    with pytest.raises(DataError, match=r"has no label column. It has: words, kind. Name the label column"):
        load_data(path, tokenizer=tokenizer, config=config, text="words")
    with pytest.raises(DataError, match=r"has no column 'sort'. It has: words, kind"):
        load_data(path, tokenizer=tokenizer, config=config, text="words", label="sort")
    with pytest.raises(DataError, match=r"row 0: column 'kind' holds int, not text"):
        load_data(path, tokenizer=tokenizer, config=config, text="kind", label="kind")


def test_tokenizer_troubles(tmp_path: Path, tokenizer: Any, config: Any) -> None:
    path = write_lines(tmp_path / "a.jsonl", rows(5))
    with pytest.raises(UsageError, match="the model has no tokenizer"):
        load_data(path, config=config)
    config.vocab_size = 6
    with pytest.raises(UsageError, match=r"the model has 6 embeddings: they do not belong together"):
        list(load_data(path, tokenizer=tokenizer, config=config).train)
    config.vocab_size = 10
    tokenizer.pad_token = None
    with pytest.raises(UsageError, match="no padding token, and the texts differ in length"):
        list(load_data(path, tokenizer=tokenizer, config=config).train)
    same = write_lines(tmp_path / "b.jsonl", rows(1) * 4)
    assert [batch.size for batch in load_data(same, tokenizer=tokenizer, config=config, eval_fraction=0).train] == [4]


# --- files that cannot be read


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", "", r"a.jsonl is empty"),
        ("a.jsonl", "{{{", r"a.jsonl cannot be read"),
        ("a.csv", "text,label\n", r"a.csv cannot be read: it holds no rows"),
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
    for wrong in ({"batch_size": 0}, {"max_length": 1}, {"eval_fraction": 1.0}, {"limit": 0}):
        with pytest.raises(UsageError, match="Cannot read data with"):
            load_data(str(tmp_path), **wrong)


def test_task_must_be_known(tmp_path: Path, config: Any) -> None:
    path = write_lines(tmp_path / "a.jsonl", rows(2))
    with pytest.raises(UsageError, match=r"which task is this data for\? Give one of causal-lm"):
        load_data(path)
    with pytest.raises(UsageError, match="which task is this data for\\? Not 'poetry'"):
        load_data(path, config=config, task="poetry")


# --- language models


def test_causal_text_is_joined_and_cut(tmp_path: Path, tokenizer: Any) -> None:
    (tmp_path / "a.txt").write_text("a b c\n\nd e\na a a\n")
    data = load_data(str(tmp_path / "a.txt"), tokenizer=tokenizer, task="causal-lm", max_length=4, eval_fraction=0)
    (batch,) = data.train
    assert sorted(batch.kwargs["input_ids"].tolist()) == [[5, 6, 7, SEP], [8, 9, SEP, 5]]  # a rest of three is dropped
    assert torch.equal(batch.labels, batch.kwargs["input_ids"])
    assert torch.equal(batch.kwargs["attention_mask"], torch.ones(2, 4, dtype=torch.long))
    assert "2 chunks of text to train on" in data.description
    assert torch.isfinite(data.loss(torch.zeros(2, 4, 10), batch))


def test_causal_text_shorter_than_a_chunk(tmp_path: Path, tokenizer: Any) -> None:
    (tmp_path / "a.txt").write_text("a b")
    (batch,) = load_data(str(tmp_path / "a.txt"), tokenizer=tokenizer, task="causal-lm", eval_fraction=0).train
    assert batch.kwargs["input_ids"].tolist() == [[5, 6, SEP]]


def test_causal_limit_keeps_the_first_rows(tmp_path: Path, tokenizer: Any) -> None:
    (tmp_path / "a.txt").write_text("a\nb\nc\nd\n")
    path = str(tmp_path / "a.txt")
    data = load_data(path, tokenizer=tokenizer, task="causal-lm", max_length=2, limit=3, eval_fraction=0)
    assert sorted(row[0] for rows in texts(data.train) for row in rows) == [5, 6, 7]


def test_causal_data_held_out(tmp_path: Path, tokenizer: Any) -> None:
    (tmp_path / "a.txt").write_text("a b c d e\n" * 20)
    data = load_data(str(tmp_path / "a.txt"), tokenizer=tokenizer, task="causal-lm", max_length=6, eval_fraction=0.25)
    assert sum(batch.size for batch in data.train) == 15
    model = hf.GPT2LMHeadModel(
        hf.GPT2Config(n_layer=1, n_head=2, n_embd=8, vocab_size=10, n_positions=8, bos_token_id=2, eos_token_id=3)
    )
    assert evaluate(model, data.eval, data.task).items == 5 * 5


def test_masked_text(tmp_path: Path, tokenizer: Any, config: Any) -> None:
    path = write_lines(tmp_path / "a.jsonl", rows(200))
    data = load_data(path, tokenizer=tokenizer, config=config, task="masked-lm", batch_size=50)
    first, second = (list(data.train) for _ in range(2))
    drawn = total = 0
    for batch in first:
        ids, labels = batch.kwargs["input_ids"], batch.labels
        chosen = labels != -100
        ordinary = (ids != PAD) & (ids != CLS) & (ids != SEP)
        drawn, total = drawn + int(chosen.sum()), total + int(ordinary.sum())
        assert not bool((labels[chosen] < 5).any())  # special tokens are never predicted
        assert bool((ids[chosen] == MASK).any())
        assert torch.equal(batch.kwargs["attention_mask"] == 0, ids == PAD)
    assert 0.08 < drawn / total < 0.25
    assert texts(first) != texts(second)
    assert texts(data.eval) == texts(data.eval)


def test_masked_text_needs_a_mask_token(tmp_path: Path, tokenizer: Any, config: Any) -> None:
    tokenizer.mask_token = None
    with pytest.raises(UsageError, match="needs a tokenizer with a mask token"):
        load_data(write_lines(tmp_path / "a.jsonl", rows(2)), tokenizer=tokenizer, config=config, task="masked-lm")


# --- images


@pytest.fixture
def images(tmp_path: Path) -> Path:
    for number, name in enumerate(("cat", "dog")):
        (tmp_path / "images" / name).mkdir(parents=True)
        for index in range(3):
            color = (255 * number, 85 * index, 0)
            Image.new("RGB", (12, 9), color).save(tmp_path / "images" / name / f"{index}.png")
    return tmp_path / "images"


def vit(**changes: Any) -> Any:
    settings = {"image_size": 8, "num_labels": 2, "architectures": ["ViTForImageClassification"]}
    return hf.ViTConfig(**settings | changes)


def test_image_folder(images: Path) -> None:
    data = load_data(str(images), config=vit(), eval_fraction=0)
    (batch,) = data.train
    pixels = batch.kwargs["pixel_values"]
    assert pixels.shape == (6, 3, 8, 8)
    assert data.task == "image-classification"
    assert torch.equal(pixels[:, 0, 0, 0].long(), batch.labels)  # dogs are red
    assert torch.allclose(pixels[:, 1, 0, 0].sort().values, torch.tensor([0, 0, 1, 1, 2, 2]) / 3)


def test_image_classes_are_the_models(images: Path) -> None:
    config = vit(id2label={0: "dog", 1: "cat"}, label2id={"dog": 0, "cat": 1})
    (batch,) = load_data(str(images), config=config, eval_fraction=0).train
    assert torch.equal(1 - batch.kwargs["pixel_values"][:, 0, 0, 0].long(), batch.labels)


def test_images_in_grey_and_of_another_shape(images: Path) -> None:
    (batch,) = load_data(str(images), config=vit(num_channels=1, image_size=[6, 10]), eval_fraction=0).train
    assert batch.kwargs["pixel_values"].shape == (6, 1, 6, 10)


def test_images_through_a_processor(images: Path) -> None:
    processor = hf.ViTImageProcessor(size={"height": 4, "width": 4})
    (batch,) = load_data(str(images), config=vit(), processor=processor, eval_fraction=0).train
    assert batch.kwargs["pixel_values"].shape == (6, 3, 4, 4)
    assert batch.kwargs["pixel_values"].min() == -1


def test_images_that_cannot_be_used(images: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="needs an image processor, or a config with an image_size"):
        load_data(str(images), task="image-classification")
    path = write_lines(tmp_path / "a.jsonl", [{"image": "cat.png", "label": 0}])
    with pytest.raises(DataError, match=r"column 'image' holds str, not images \(row 0\)"):
        list(load_data(path, config=vit(), eval_fraction=0).train)
    (images / "cat" / "0.png").write_bytes(b"\x89PNG junk")
    with pytest.raises(DataError, match="the image of row 0 cannot be read"):
        list(load_data(str(images), config=vit(), eval_fraction=0).train)


# --- functions


@pytest.fixture
def functions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    (tmp_path / "my_data.py").write_text(
        "import datasets, torch\n"
        "from surgeon.data import Data\n"
        "def batches(): return [(torch.ones(2, 3), torch.tensor([0, 1]))]\n"
        "def data(): return Data(batches(), eval=batches(), description='mine')\n"
        "def table(): return datasets.Dataset.from_dict({'text': ['a', 'b'] * 5, 'label': [0, 1] * 5})\n"
        "def tables(): return datasets.DatasetDict(train=table(), test=table())\n"
        "def stream(): return table().to_iterable_dataset()\n"
        "def generator(): yield 1\n"
        "def broken(): raise ValueError('no luck')\n"
    )
    monkeypatch.chdir(tmp_path)
    yield
    sys.modules.pop("my_data", None)


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
        ("stream", "my_data:stream streams its dataset"),
        ("generator", "is a generator, which can be read once"),
        ("broken", "my_data:broken raised ValueError: no luck"),
        ("missing", "has no 'missing'"),
    ],
)
def test_functions_that_fail(functions: None, name: str, message: str) -> None:
    with pytest.raises(DataError, match=message):
        load_data(f"my_data:{name}")


def test_data_trains_a_model(tmp_path: Path, tokenizer: Any, config: Any) -> None:
    path = write_lines(tmp_path / "a.jsonl", [{"text": "abc"[index % 3], "label": index % 3} for index in range(60)])
    data = load_data(path, tokenizer=tokenizer, config=config)
    torch.manual_seed(0)
    model: nn.Module = hf.BertForSequenceClassification(config)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    assert data.loss is not None
    losses = []
    for _ in range(40):
        for batch in data.train:
            loss = data.loss(model(*batch.args, **batch.kwargs), batch)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
    assert losses[-1] < losses[0] / 2
    result = evaluate(model, data.eval, data.task)
    assert (result.value, result.items) == (1.0, 6)
