"""What a model is made for follows from its class."""

from __future__ import annotations

import pytest
import transformers
from torch import nn

from surgeon.models.tasks import HEADS, IMITATE, TASKS, task_of


@pytest.mark.parametrize(
    ("architecture", "task"),
    [
        ("GPT2LMHeadModel", "causal-lm"),
        ("LlamaForCausalLM", "causal-lm"),
        ("BertForMaskedLM", "masked-lm"),
        ("BertForSequenceClassification", "sequence-classification"),
        ("ViTForImageClassification", "image-classification"),
        ("BertForTokenClassification", "token-classification"),
        ("BertForQuestionAnswering", "question-answering"),
        ("T5ForConditionalGeneration", "seq2seq-lm"),
        ("MarianMTModel", "seq2seq-lm"),
        ("WhisperForConditionalGeneration", "speech-seq2seq"),
        ("Wav2Vec2ForCTC", "ctc"),
        ("ParakeetForCTC", "ctc"),
        ("Wav2Vec2ForSequenceClassification", "audio-classification"),
        ("ASTForAudioClassification", "audio-classification"),
        ("BertModel", "feature-extraction"),
        ("T5EncoderModel", "feature-extraction"),
        ("LlavaForConditionalGeneration", None),
    ],
)
def test_task_of_a_config(architecture: str, task: str | None) -> None:
    assert task_of(transformers.BertConfig(architectures=[architecture])) == task


def test_task_of_a_model_is_that_of_its_class() -> None:
    config = transformers.GPT2Config(n_layer=1, n_head=1, n_embd=4, vocab_size=7, n_positions=8)
    assert config.architectures is None
    assert task_of(transformers.GPT2LMHeadModel._from_config(config)) == "causal-lm"


def test_every_head_is_a_class_of_transformers() -> None:
    assert all(hasattr(transformers, head) for head in HEADS.values())
    assert [task for task, known in TASKS.items() if known.auto_class is None] == ["classification", IMITATE]


def test_other_modules_have_none() -> None:
    assert task_of(nn.Linear(3, 4)) is None
