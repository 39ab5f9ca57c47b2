"""What stands on the shelf of the command-line tests: small models, data and a tokenizer, written to disk."""

from __future__ import annotations

import csv
import random
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers

NETS = """
import os
from pathlib import Path

import torch
from torch import nn

class Block(nn.Module):
    def __init__(self, act):
        super().__init__()
        self.norm = nn.LayerNorm(16)
        self.mlp = nn.Sequential(nn.Linear(16, 64), act(), nn.Dropout(0.1), nn.Linear(64, 16))

    def forward(self, x):
        return x + self.mlp(self.norm(x))

class Net(nn.Module):
    def __init__(self, act):
        super().__init__()
        self.query = nn.Linear(16, 16)
        self.blocks = nn.Sequential(Block(act), Block(act))
        self.pooler, self.head = nn.Linear(16, 16), nn.Linear(16, 3)

    def forward(self, x):
        return self.head(torch.tanh(self.pooler(self.blocks(self.query(x)).mean(1))))

class Branches(nn.Module):
    def forward(self, x):
        return x + 1 if x.sum() > 0 else x - 1

def gelu():
    torch.manual_seed(0)
    return Net(nn.GELU)

def relu():
    torch.manual_seed(0)
    return Net(nn.ReLU)

def linear():
    return nn.Sequential(nn.Linear(16, 16), nn.LayerNorm(16))

def branches():
    return Branches()

def inputs():
    return torch.randn(2, 5, 16, generator=torch.Generator().manual_seed(0))

class Interrupted(list):
    # Stands in for a user who presses Ctrl-C, in the pass through the data whose number stands in a file.
    begun = 0

    def __iter__(self):
        self.begun += 1
        for index, batch in enumerate(super().__iter__()):
            if index == 4 and Path("interrupt").exists() and int(Path("interrupt").read_text()) == self.begun:
                raise KeyboardInterrupt
            yield batch

def data():
    generator = torch.Generator().manual_seed(0)
    return Interrupted(
        (torch.randn(8, 5, 16, generator=generator), torch.randint(0, 3, (8,), generator=generator)) for _ in range(6)
    )

def split():
    from surgeon import Data
    batches = list(data())
    return Data(batches[:4], batches[4:])
"""


def write_bert(place: Path) -> None:
    """A tiny BERT with a tokenizer, and reviews for it to tell apart."""
    import transformers

    torch.manual_seed(0)
    config = transformers.BertConfig(
        num_hidden_layers=2, num_attention_heads=2, hidden_size=16, intermediate_size=32, vocab_size=40, num_labels=2,
        max_position_embeddings=32,
    )  # fmt: skip
    transformers.BertForSequenceClassification(config).save_pretrained(place / "bert")
    good, bad, rest = ["good", "fine", "great"], ["bad", "poor", "dull"], ["the", "film", "was", "a", "plot", "very"]
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *good, *bad, *rest]
    raw = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="[UNK]"))
    raw.pre_tokenizer = pre_tokenizers.Whitespace()
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=raw, pad_token="[PAD]", unk_token="[UNK]", mask_token="[MASK]"
    ).save_pretrained(place / "bert")
    choose = random.Random(0)
    with (place / "reviews.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["text", "label"])
        for _ in range(40):
            label = choose.randint(0, 1)
            line = [*choose.choices(rest, k=choose.randint(3, 8)), choose.choice(good if label else bad)]
            writer.writerow([" ".join(line), label])
