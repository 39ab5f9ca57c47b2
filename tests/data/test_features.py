"""Features of every other task: texts to texts, tags of words, answers, and data to imitate on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
import transformers as hf
from torch import Tensor

from surgeon.data.files import load_data
from surgeon.data.losses import evaluate
from surgeon.errors import DataError, UsageError
from surgeon.models.tasks import TASKS

from .tables import CLS, MASK, PAD, SEP, WORDS, rows, write_lines

T5 = {"d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 1, "num_heads": 2, "vocab_size": 10}


def seq2seq(**more: Any) -> Any:
    settings = {**T5, "decoder_start_token_id": PAD, "pad_token_id": PAD, **more}
    return hf.T5Config(**settings, architectures=["T5ForConditionalGeneration"])


def table(path: Path, content: list[dict[str, Any]]) -> str:
    return write_lines(path / "a.jsonl", content)


def only(path: str, **options: Any) -> Any:
    """The one batch of a small file."""
    (batch,) = load_data(path, eval_fraction=0, **options).train
    return batch


# --- texts to texts ---------------------------------------------------------------------------------------------------


def test_texts_become_labels_and_what_the_decoder_reads(tmp_path: Path, tokenizer: Any) -> None:
    path = table(tmp_path, [{"text": "a b c", "target": "d"}, {"text": "a", "target": "d e"}])
    batch = only(path, tokenizer=tokenizer, config=seq2seq())
    assert batch.kwargs["input_ids"].shape == (2, 5)
    order = batch.labels[:, 2].argsort()
    assert batch.labels[order].tolist() == [[CLS, 8, SEP, -100], [CLS, 8, 9, SEP]]
    assert batch.kwargs["decoder_input_ids"][order].tolist() == [[PAD, CLS, 8, SEP], [PAD, CLS, 8, 9]]
    model = hf.T5ForConditionalGeneration(seq2seq()).eval()
    loss = model(**batch.kwargs, labels=batch.labels).loss.detach()
    data = load_data(path, tokenizer=tokenizer, config=seq2seq(), eval_fraction=0)
    torch.testing.assert_close(data.loss(model(**batch.kwargs), batch), loss)
    quality = evaluate(model, [batch], data.task)
    assert (quality.name, quality.items, quality.samples) == ("loss per token", 7, 2)
    assert quality.value == pytest.approx(float(loss), rel=1e-5)


def test_columns_of_texts_to_texts_can_be_named(tmp_path: Path, tokenizer: Any) -> None:
    path = table(tmp_path, [{"en": "a b", "de": "c"}])
    batch = only(path, tokenizer=tokenizer, config=seq2seq(), text="en", label="de")
    assert batch.labels.tolist() == [[CLS, 7, SEP]]
    with pytest.raises(DataError, match=r"has no label column\. Its columns: en, de"):
        load_data(path, tokenizer=tokenizer, config=seq2seq(), text="en")


def test_to_imitate_without_targets_the_decoder_reads_the_text(tmp_path: Path, tokenizer: Any) -> None:
    batch = only(table(tmp_path, [{"text": "a b"}]), tokenizer=tokenizer, config=seq2seq(), task="imitate")
    assert batch.labels is None
    assert batch.kwargs["decoder_input_ids"].tolist() == [[PAD, CLS, 5, 6]]


# --- tags -------------------------------------------------------------------------------------------------------------


@pytest.fixture
def tagger(config: Any) -> Any:
    config.architectures = ["BertForTokenClassification"]
    config.id2label, config.label2id = {0: "O", 1: "PER", 2: "LOC"}, {"O": 0, "PER": 1, "LOC": 2}
    return config


@pytest.mark.parametrize("form", ["lists", "texts", "numbers", "declared"])
def test_the_first_token_of_a_word_has_its_tag(tmp_path: Path, tokenizer: Any, tagger: Any, form: str) -> None:
    words, tags = [["a", "b-c"], ["d"]], [["LOC", "PER"], ["O"]]
    content = [{"tokens": some, "ner_tags": others} for some, others in zip(words, tags, strict=True)]
    path = tmp_path / "a.jsonl"
    if form == "texts":
        content = [{name: " ".join(cell) for name, cell in row.items()} for row in content]
    elif form == "numbers":
        content = [{**row, "ner_tags": [tagger.label2id[tag] for tag in row["ner_tags"]]} for row in content]
    write_lines(path, content)
    if form == "declared":  # in another order than the model's
        names = datasets.ClassLabel(names=["PER", "O", "LOC"])
        features = datasets.Features(
            {"tokens": datasets.List(datasets.Value("string")), "ner_tags": datasets.List(names)}
        )
        path = tmp_path / "saved"
        datasets.Dataset.from_list(content, features=features).save_to_disk(path)
    batch = only(str(path), tokenizer=tokenizer, config=tagger)
    long = int(batch.kwargs["attention_mask"].sum(1).argmax())
    # "b-c" is three tokens.
    assert batch.labels[long].tolist() == [-100, 2, 1, -100, -100, -100]
    assert batch.labels[1 - long].tolist() == [-100, 0, -100, -100, -100, -100]
    quality = evaluate(hf.BertForTokenClassification(tagger), [batch], "token-classification")
    assert (quality.name, quality.unit, quality.items, quality.samples) == ("accuracy", "tokens", 3, 2)


def test_tags_that_do_not_fit(tmp_path: Path, tokenizer: Any, tagger: Any) -> None:
    for content, message in (
        ([{"tokens": ["a"], "tags": ["O", "O"]}], "row 0: 1 words have 2 tags"),
        ([{"tokens": ["a"], "tags": ["DATE"]}], "the model has no class 'DATE'"),
        ([{"tokens": [], "tags": []}], r"row 0: column 'tags' holds no words or tags, but \[\]"),
        ([{"tokens": ["a"]}], "has no label column"),
    ):
        with pytest.raises(DataError, match=message):
            load_data(table(tmp_path, content), tokenizer=tokenizer, config=tagger)
    batch = only(table(tmp_path, [{"tokens": ["a"]}]), tokenizer=tokenizer, config=tagger, task="imitate")
    assert batch.labels is None


# --- answers ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def reader(config: Any) -> Any:
    config.architectures, config.num_labels = ["BertForQuestionAnswering"], 2
    return config


def test_answers_become_their_first_and_last_token(tmp_path: Path, tokenizer: Any, reader: Any) -> None:
    content = [
        {"question": "a", "context": "b c d e", "answers": {"text": ["c d"], "answer_start": [2]}},
        {"question": "a", "context": "c c", "answers": {"text": ["c"], "answer_start": [2]}},
        {"question": "a", "context": "b c d", "answers": {"text": [], "answer_start": []}},
    ]
    path = table(tmp_path, content)
    batch = only(path, tokenizer=tokenizer, config=reader)
    found = {
        tuple(ids): ends for ids, ends in zip(batch.kwargs["input_ids"].tolist(), batch.labels.tolist(), strict=True)
    }
    assert found == {
        (CLS, 5, SEP, 6, 7, 8, 9, SEP): [4, 5],
        (CLS, 5, SEP, 7, 7, SEP, PAD, PAD): [4, 4],
        (CLS, 5, SEP, 6, 7, 8, SEP, PAD): [-100, -100],
    }
    model = hf.BertForQuestionAnswering(reader).eval()
    kept = batch.labels[:, 0] >= 0
    ends = {"start_positions": batch.labels[kept, 0], "end_positions": batch.labels[kept, 1]}
    loss = model(**{name: value[kept] for name, value in batch.kwargs.items()}, **ends).loss
    data = load_data(path, tokenizer=tokenizer, config=reader, eval_fraction=0)
    torch.testing.assert_close(data.loss(model(**batch.kwargs), batch), loss)
    quality = evaluate(model, [batch], data.task)
    assert (quality.name, quality.items, quality.samples) == ("exact match", 2, 2)


def test_both_ends_must_match() -> None:
    labels = torch.tensor([[0, 1], [0, 1], [1, 1]])
    start, end = (torch.eye(2)[place] for place in ([0, 0, 0], [1, 0, 1]))
    from surgeon.data.batch import Batch
    from surgeon.data.losses import QualityMeter

    meter = QualityMeter("question-answering")
    meter.add({"start_logits": start, "end_logits": end}, Batch((start,), {}, labels))
    assert meter.result().value == pytest.approx(1 / 3)


def test_answers_as_texts_and_answers_that_are_cut_off(tmp_path: Path, tokenizer: Any, reader: Any) -> None:
    content = [{"q": "a", "c": "b c d e", "a": "e"}, {"q": "a", "c": "e", "a": "e"}]
    options = {"tokenizer": tokenizer, "config": reader, "text": "q,c", "label": "a"}
    batch = only(table(tmp_path, content), max_length=6, **options)
    assert sorted(batch.labels.tolist()) == [[-100, -100], [3, 3]]
    with pytest.raises(DataError, match="row 0: the answer 'z' does not stand in its context"):
        load_data(table(tmp_path, [{"q": "a", "c": "b", "a": "z"}]), **options)
    with pytest.raises(UsageError, match="question-answering reads two columns"):
        load_data(table(tmp_path, content), tokenizer=tokenizer, config=reader, text="q")
    batch = only(table(tmp_path, content), tokenizer=tokenizer, config=reader, text="q,c", task="imitate")
    assert batch.labels is None


# --- to imitate -------------------------------------------------------------------------------------------------------


def test_models_without_a_head_need_no_labels(tmp_path: Path, tokenizer: Any, config: Any) -> None:
    config.architectures = ["BertModel"]
    data = load_data(table(tmp_path, rows(10)), tokenizer=tokenizer, config=config)
    assert (data.task, data.loss) == ("feature-extraction", None)
    assert {batch.labels for batch in data.train} == {None}


def test_labels_are_read_where_there_are_any(
    tmp_path: Path, tokenizer: Any, config: Any, caplog: pytest.LogCaptureFixture
) -> None:
    options = {"tokenizer": tokenizer, "config": config, "task": "imitate"}
    assert only(table(tmp_path, [{"text": "a", "label": 2}]), **options).labels.tolist() == [2]
    assert only(table(tmp_path, [{"text": "a"}]), **options).labels is None
    assert not caplog.records
    assert only(table(tmp_path, [{"text": "a", "label": 7}]), **options).labels is None
    assert "The labels are left out, since imitation needs none" in caplog.text
    with pytest.raises(DataError, match="label 7 is class 7, out of range"):
        load_data(table(tmp_path, [{"text": "a", "label": 7}]), label="label", **options)


def test_a_language_model_is_imitated_on_what_it_reads(tmp_path: Path, tokenizer: Any, config: Any) -> None:
    config.architectures = ["BertForMaskedLM"]
    path = table(tmp_path, [{"text": "a b c d e"}] * 20)
    batch = only(path, tokenizer=tokenizer, config=config, task="imitate", batch_size=20)
    assert bool((batch.kwargs["input_ids"] == MASK).any())
    assert batch.labels is not None
    config.architectures = ["BertLMHeadModel"]
    data = load_data(path, tokenizer=tokenizer, config=config, task="imitate", max_length=4, eval_fraction=0)
    assert "30 chunks of text to train on" in data.description


def test_every_task_with_a_head_can_be_read() -> None:
    from surgeon.data.features import READABLE

    assert set(READABLE) == set(TASKS) - {"classification"}
    assert len(WORDS) == 10


def test_batches_of_answers_and_of_one_label() -> None:
    from surgeon.data.batch import Batch

    ids, ends = torch.ones(2, 3, dtype=torch.long), torch.tensor([0, 1])
    batch = Batch.from_any({"input_ids": ids, "start_positions": ends, "end_positions": ends + 1})
    assert list(batch.kwargs) == ["input_ids"]
    assert isinstance(batch.labels, Tensor)
    assert batch.labels.tolist() == [[0, 1], [1, 2]]
    assert Batch.from_any({"input_ids": ids, "label": ends}).labels is ends
