"""A tiny GPT-2 with a tokenizer on disk, a saved surgery of it, and the surgery exported. No test changes them."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers

from surgeon.jobs.export import export_surgery
from surgeon.models.source import load_model
from surgeon.passes import Lower, Moeify
from surgeon.surgery.origin import Origin
from surgeon.surgery.pipeline import Pipeline
from tests.models.tiny import GPT2

WORDS = ["<end>", "<pad>", "the", "film", "was", "good", "bad", "plot", "a", "very"]
CARD = "---\nlicense: mit\nlanguage: en\n---\n# Tiny\n"


@dataclass(frozen=True)
class Shelf:
    """Directories: of the dense model, of the saved surgery, and of the exported model."""

    dense: Path
    surgery: Path
    exported: Path

    def model(self, kind: str = "exported", **options: Any) -> Any:
        return transformers.AutoModelForCausalLM.from_pretrained(getattr(self, kind), **options)


@pytest.fixture(scope="session")
def shelf(tmp_path_factory: pytest.TempPathFactory) -> Shelf:
    place = tmp_path_factory.mktemp("pretrained")
    made = Shelf(place / "gpt2", place / "surgery", place / "exported")
    torch.manual_seed(0)
    config = transformers.GPT2Config(**{**GPT2, "vocab_size": len(WORDS)})
    model = transformers.GPT2LMHeadModel(config).eval()
    model.generation_config.pad_token_id = 1
    raw = Tokenizer(models.WordLevel({word: index for index, word in enumerate(WORDS)}, unk_token="<pad>"))
    raw.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=raw, pad_token="<pad>", eos_token="<end>")
    model.save_pretrained(made.dense)
    tokenizer.save_pretrained(made.dense)
    (made.dense / "README.md").write_text(CARD)

    source = load_model(made.dense)
    assert isinstance(source.model, torch.nn.Module)
    origin = Origin.of(source.model, path=str(made.dense), kind="hf", sha256=source.sha256, tokenizer=source.tokenizer)
    ids = torch.tensor([[2, 3, 4, 5], [2, 7, 4, 6]])
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    surgery = Pipeline([Moeify(experts=4), Lower()]).run(source.model, inputs=inputs, origin=origin)
    surgery.save(made.surgery)
    stage: Any = lambda _: nullcontext()  # noqa: E731
    export_surgery(made.surgery, made.exported, base=None, overwrite=False, max_shard_size="5GB", stage=stage)
    return made
