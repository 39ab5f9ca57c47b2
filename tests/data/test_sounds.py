"""Sounds to classify and to write down."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
import transformers as hf

from surgeon.data.batch import Batch
from surgeon.data.files import load_data
from surgeon.data.losses import blank_of, evaluate, task_loss
from surgeon.errors import DataError, UsageError

from .tables import CLS, PAD, SEP, write_lines

RATE = 16000
W2V = {
    "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32, "vocab_size": 10,
    "conv_dim": (8, 8), "conv_stride": (5, 4), "conv_kernel": (10, 4), "num_feat_extract_layers": 2,
    "num_conv_pos_embeddings": 4, "num_conv_pos_embedding_groups": 2, "pad_token_id": PAD, "num_labels": 2,
}  # fmt: skip


def wav2vec(architecture: str) -> Any:
    return hf.Wav2Vec2Config(**W2V, architectures=[architecture])


def extractor(**options: Any) -> Any:
    return hf.Wav2Vec2FeatureExtractor(**{"return_attention_mask": True, "do_normalize": False, **options})


@pytest.fixture
def sounds(tmp_path: Path) -> Path:
    """Two folders of sounds, of which one is louder, at half the model's rate and with two channels."""
    for number, name in enumerate(("loud", "soft")):
        (tmp_path / "sounds" / name).mkdir(parents=True)
        for index in range(3):
            wave = np.full((400 + 100 * index, 2), (0.5, 0.1)[number], dtype=np.float32)
            soundfile.write(tmp_path / "sounds" / name / f"{index}.wav", wave, RATE // 2)
    return tmp_path / "sounds"


def test_folders_of_sounds_are_classes(sounds: Path) -> None:
    config = wav2vec("Wav2Vec2ForSequenceClassification")
    data = load_data(str(sounds), processor=extractor(), config=config, eval_fraction=0)
    assert data.task == "audio-classification"
    (batch,) = data.train
    values, mask = batch.kwargs["input_values"], batch.kwargs["attention_mask"]
    assert values.shape == mask.shape == (6, 1200)  # at twice the rate
    assert sorted(mask.sum(1).tolist()) == [800, 800, 1000, 1000, 1200, 1200]
    loud = values[:, 300:500].mean(1) > 0.3
    assert torch.equal(loud, batch.labels == 0)
    quality = evaluate(hf.Wav2Vec2ForSequenceClassification(config), [batch], data.task)
    assert (quality.name, quality.items) == ("accuracy", 6)


def test_classes_in_a_metadata_file(sounds: Path) -> None:
    (sounds / "metadata.csv").write_text("file_name,label\nloud/0.wav,b\nsoft/0.wav,a\n")
    config = wav2vec("Wav2Vec2ForSequenceClassification")
    (batch,) = load_data(str(sounds), processor=extractor(), config=config, eval_fraction=0).train
    assert torch.equal(batch.kwargs["input_values"][:, 400] > 0.3, batch.labels == 1)


def test_sounds_are_written_down_with_the_models_own_loss(sounds: Path, tokenizer: Any) -> None:
    path = write_lines(
        sounds.parent / "a.jsonl",
        [{"audio": "sounds/loud/0.wav", "text": "a b"}, {"audio": "sounds/soft/2.wav", "text": "c"}],
    )
    config = wav2vec("Wav2Vec2ForCTC")
    data = load_data(path, tokenizer=tokenizer, processor=extractor(), config=config, eval_fraction=0)
    (batch,) = data.train
    assert sorted(batch.labels.tolist()) == [[CLS, 5, 6, SEP], [CLS, 7, SEP, -100]]
    torch.manual_seed(0)
    model = hf.Wav2Vec2ForCTC(config).eval()
    model.config.ctc_loss_reduction = "sum"
    expected = model(**batch.kwargs, labels=batch.labels).loss / 7
    torch.testing.assert_close(data.loss(model(**batch.kwargs), batch), expected, rtol=0.02, atol=0.0)
    # Without padding the frames are counted exactly.
    whole = Batch((), {"input_values": batch.kwargs["input_values"]}, batch.labels)
    expected = model(**whole.kwargs, labels=whole.labels).loss.detach() / 7
    torch.testing.assert_close(data.loss(model(**whole.kwargs), whole), expected)
    quality = evaluate(model, [whole], "ctc", blank=blank_of(config))
    assert (quality.name, quality.items, quality.samples) == ("loss per token", 7, 2)
    assert quality.value == pytest.approx(float(expected), rel=1e-5)


def test_a_text_longer_than_its_sound_is_refused() -> None:
    loss = task_loss("ctc")
    assert loss is not None
    with pytest.raises(DataError, match="a text of 3 tokens is longer than its sound, which is 2 frames"):
        loss(torch.zeros(1, 2, 5), Batch((torch.ones(1),), {}, torch.tensor([[1, 2, 3]])))
    with pytest.raises(DataError, match="do not match logits"):
        loss(torch.zeros(1, 2), Batch((torch.ones(1),), {}, torch.tensor([[1, 2, 3]])))


def test_whisper_reads_spectra_and_shifted_texts(sounds: Path, tokenizer: Any) -> None:
    config = hf.WhisperConfig(
        d_model=16, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2, decoder_attention_heads=2,
        encoder_ffn_dim=32, decoder_ffn_dim=32, vocab_size=10, num_mel_bins=8, max_source_positions=50,
        max_target_positions=16, pad_token_id=PAD, bos_token_id=1, eos_token_id=1, decoder_start_token_id=CLS,
        architectures=["WhisperForConditionalGeneration"],
    )  # fmt: skip
    path = write_lines(sounds.parent / "a.jsonl", [{"audio": str(sounds / "loud" / "0.wav"), "text": "a b"}])
    processor = hf.WhisperFeatureExtractor(feature_size=8, chunk_length=1)
    data = load_data(path, tokenizer=tokenizer, processor=processor, config=config, eval_fraction=0)
    (batch,) = data.train
    assert data.task == "speech-seq2seq"
    assert batch.kwargs["input_features"].shape == (1, 8, 100)
    assert batch.labels.tolist() == [[5, 6, SEP]]  # the start is not predicted
    assert batch.kwargs["decoder_input_ids"].tolist() == [[CLS, 5, 6]]
    model = hf.WhisperForConditionalGeneration(config).eval()
    inputs = {"input_features": batch.kwargs["input_features"]}
    torch.testing.assert_close(data.loss(model(**batch.kwargs), batch), model(**inputs, labels=batch.labels).loss)
    path = write_lines(sounds.parent / "b.jsonl", [{"audio": "x.wav"}])
    with pytest.raises(DataError, match="has no text for the decoder to read"):
        load_data(path, tokenizer=tokenizer, processor=processor, config=config, task="imitate")


def test_numbers_are_sounds_too(tmp_path: Path, tokenizer: Any) -> None:
    path = write_lines(tmp_path / "a.jsonl", [{"audio": [0.5] * 800}, {"audio": [0.1] * 900}])
    options: dict[str, Any] = {"processor": extractor(), "config": wav2vec("Wav2Vec2Model"), "eval_fraction": 0}
    (batch,) = load_data(path, **options).train
    assert batch.kwargs["input_values"].shape == (2, 900)
    assert batch.labels is None


def test_sounds_that_cannot_be_used(sounds: Path, tmp_path: Path) -> None:
    options: dict[str, Any] = {"config": wav2vec("Wav2Vec2Model"), "eval_fraction": 0}
    (tmp_path / "bad.wav").write_bytes(b"RIFF junk")
    for cell, message in (
        ("gone.wav", r"row 0: column 'audio' names the file 'gone.wav', which does not exist"),
        ("bad.wav", r"row 0: column 'audio': the sound cannot be read"),
        ([[[1.0]]], r"row 0: column 'audio' contains list values, not sounds"),
    ):
        path = write_lines(tmp_path / "a.jsonl", [{"audio": cell}])
        with pytest.raises(DataError, match=message):
            list(load_data(path, processor=extractor(), **options).train)
    with pytest.raises(UsageError, match="is sound, but the model has no feature extractor"):
        load_data(str(sounds), config=wav2vec("Wav2Vec2ForSequenceClassification"))
