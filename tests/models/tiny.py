"""Sizes of the tiny models that are loaded, the source of one of them, and a way to damage a file."""

from __future__ import annotations

from pathlib import Path

BERT = {
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "hidden_size": 32,
    "intermediate_size": 64,
    "vocab_size": 101,
    "max_position_embeddings": 64,
}
GPT2 = {
    "n_layer": 2,
    "n_head": 4,
    "n_embd": 32,
    "vocab_size": 101,
    "n_positions": 64,
    "bos_token_id": 0,
    "eos_token_id": 0,
}

NET = """
import torch
from torch import nn

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(3, 4)

    def forward(self, x):
        return self.linear(x).relu()

def build():
    torch.manual_seed(0)
    return Net()

def number():
    return 3

def broken():
    raise RuntimeError("no luck")

constant = 3
"""


def halve(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
