"""Small models for the tests: hand-written ones, and one of each kind of Hugging Face model, with random weights."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from surgeon.testing.models import (  # noqa: F401  (the tests take them from here)
    CLASSES,
    HIDDEN,
    WIDTH,
    Fused,
    Gated,
    Inputs,
    Plain,
    Stack,
    StackLayer,
    feed_forward,
    labelled_vectors,
    stack,
    vectors,
)

VOCABULARY = 50


# --- models -----------------------------------------------------------------------------------------------------------


class Attention(nn.Module):
    """Self-attention with four linear layers and two heads."""

    def __init__(self, dropout: float) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(WIDTH, WIDTH) for _ in range(4))
        self.dropout = dropout

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        q, k, v = (part(x).unflatten(-1, (2, -1)).transpose(1, 2) for part in (self.q, self.k, self.v))
        allowed = None if mask is None else mask[:, None, None, :].bool()
        p = self.dropout if self.training else 0.0
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=allowed, dropout_p=p)
        return self.o(y.transpose(1, 2).flatten(-2))


class Block(nn.Module):
    """Pre-norm: x + attention, then x + feed-forward."""

    def __init__(self, ffn: nn.Module, dropout: float) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.attention = Attention(dropout)
        self.ffn = ffn

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        x = x + self.attention(self.norm1(x), mask)
        return x + self.ffn(self.norm2(x))


class Classifier(nn.Module):
    """A transformer that classifies token sequences: ids [B, T] → logits [B, 3]; padding takes no part."""

    def __init__(self, *ffns: nn.Module, dropout: float = 0.1) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, WIDTH)
        self.blocks = nn.ModuleList(Block(ffn, dropout) for ffn in ffns)
        self.norm = nn.LayerNorm(WIDTH)
        self.head = nn.Linear(WIDTH, CLASSES)

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        x = self.embedding(input_ids)
        for block in self.blocks:
            x = block(x, attention_mask)
        x = self.norm(x)
        if attention_mask is None:
            return self.head(x.mean(1))
        weight = attention_mask.unsqueeze(-1).to(x.dtype)
        return self.head((x * weight).sum(1) / weight.sum(1))


class Wrapped(nn.Module):
    """One module behind a layer norm, in front of nothing: x [B, T, d] → [B, T, d_out]."""

    def __init__(self, ffn: nn.Module, width: int = WIDTH) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.ffn = ffn

    def forward(self, x: Tensor) -> Tensor:
        return self.ffn(self.norm(x))


class Function(nn.Module):
    """A module made of parts and a function of (module, x)."""

    def __init__(self, compute: Callable[..., Any], **parts: Any) -> None:
        super().__init__()
        self.compute = compute
        for name, part in parts.items():
            if isinstance(part, Tensor) and not isinstance(part, nn.Parameter):
                self.register_buffer(name, part)
            else:
                setattr(self, name, nn.Linear(*part) if isinstance(part, tuple) else part)

    def forward(self, x: Tensor) -> Any:
        return self.compute(self, x)


def classifier(kind: str = "gelu", layers: int = 2, dropout: float = 0.1) -> Classifier:
    """A `Classifier` whose feed-forward layers are of one kind, or one and the same ("shared"), in evaluation mode."""
    torch.manual_seed(0)
    if kind == "shared":
        return Classifier(*[feed_forward("relu", dropout)] * layers, dropout=dropout).eval()
    return Classifier(*(feed_forward(kind, dropout) for _ in range(layers)), dropout=dropout).eval()


def tokens(batch: int = 3, length: int = 7, *, padded: bool = True, seed: int = 0) -> Inputs:
    """Ids and mask; from the second row on one, two, three, ... tokens are padding if `padded`."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(1, VOCABULARY, (batch, length), generator=generator)
    mask = torch.ones_like(ids)
    if padded:
        for row in range(1, batch):
            mask[row, length - min(row, length - 2) :] = 0
    return {"input_ids": ids * mask, "attention_mask": mask}


def labelled(batches: int = 4, batch: int = 8, length: int = 7, seed: int = 0) -> list[tuple[Inputs, Tensor]]:
    """A task a small classifier can learn: which of three groups the first token belongs to."""
    made = (tokens(batch, length, seed=seed * 1000 + number) for number in range(batches))
    return [(inputs, inputs["input_ids"][:, 0] % CLASSES) for inputs in made]


# --- Hugging Face -----------------------------------------------------------------------------------------------------

_TEXT = {
    "vocab_size": VOCABULARY,
    "hidden_size": WIDTH,
    "intermediate_size": HIDDEN,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_labels": CLASSES,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def hugging_face(name: str) -> tuple[nn.Module, Inputs]:
    """A tiny model of the family and inputs for it, in evaluation mode."""
    import transformers as t

    torch.manual_seed(0)
    text = tokens()
    match name:
        case "gpt2":
            config = t.GPT2Config(
                vocab_size=VOCABULARY, n_embd=WIDTH, n_layer=2, n_head=2, n_positions=32, n_inner=HIDDEN,
                bos_token_id=1, eos_token_id=2, pad_token_id=0,
            )  # fmt: skip
            return t.GPT2LMHeadModel(config).eval(), text
        case "bert":
            config = t.BertConfig(**_TEXT, max_position_embeddings=32)
            return t.BertForSequenceClassification(config).eval(), text
        case "albert":
            config = t.AlbertConfig(
                **_TEXT, max_position_embeddings=32, embedding_size=8, hidden_dropout_prob=0.1, hidden_act="gelu_new"
            )
            return t.AlbertForSequenceClassification(config).eval(), text
        case "llama":
            return t.LlamaForCausalLM(t.LlamaConfig(**_TEXT, max_position_embeddings=32)).eval(), text
        case "phi3":
            return t.Phi3ForCausalLM(t.Phi3Config(**_TEXT, max_position_embeddings=32)).eval(), text
        case "t5":
            config = t.T5Config(
                vocab_size=VOCABULARY, d_model=WIDTH, d_ff=HIDDEN, d_kv=8, num_layers=1, num_heads=2,
                decoder_start_token_id=0, pad_token_id=0, eos_token_id=2,
            )  # fmt: skip
            return t.T5ForConditionalGeneration(config).eval(), {**text, "decoder_input_ids": text["input_ids"][:, :5]}
        case "vit":
            config = t.ViTConfig(
                hidden_size=WIDTH, intermediate_size=HIDDEN, num_hidden_layers=2, num_attention_heads=2, image_size=16,
                patch_size=8, num_labels=CLASSES, hidden_dropout_prob=0.1,
            )  # fmt: skip
            return t.ViTForImageClassification(config).eval(), {"pixel_values": torch.randn(3, 3, 16, 16)}
    raise KeyError(name)


HUGGING_FACE = ("gpt2", "bert", "albert", "llama", "phi3", "t5", "vit")


# --- many at once -----------------------------------------------------------------------------------------------------


class Many(nn.Module):
    """Independent modules side by side, so that one trace serves many cases: x [B, T, d] → {name: output}."""

    def __init__(self, **parts: nn.Module) -> None:
        super().__init__()
        for name, part in parts.items():
            self.add_module(name, part)

    def forward(self, x: Tensor) -> dict[str, Any]:
        return {name: part(x) for name, part in self.named_children()}


def correlated_vectors(seed: int = 0, batches: int = 40) -> list[dict[str, Tensor]]:
    """Inputs of a `Stack` that are correlated and off zero, as those of real layers are."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(WIDTH, WIDTH, generator=torch.Generator().manual_seed(5)) / WIDTH**0.5
    return [{"x": torch.randn(8, 5, WIDTH, generator=generator) @ mix + 0.5} for _ in range(batches)]
