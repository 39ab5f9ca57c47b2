"""The same transformers models used in other ways: with labels, padding, other outputs, number formats and wrappers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from .case import Inputs
from .hf_row import Row

VOCABULARY, LENGTH = 101, 8


def _with(**more: Any) -> Callable[[int], Inputs]:
    """Return token ids and a mask, together with `more`: values, or functions of the batch size."""

    def inputs(batch: int) -> Inputs:
        ids = torch.randint(3, VOCABULARY - 1, (batch, LENGTH))
        given = {name: value(batch) if callable(value) else value for name, value in more.items()}
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids), **given}

    return inputs


def _tokens(batch: int) -> Tensor:
    return torch.randint(3, VOCABULARY - 1, (batch, LENGTH))


def _classes(batch: int) -> Tensor:
    return torch.arange(batch) % 2


def _model(name: str, **settings: Any) -> Callable[[Any], nn.Module]:
    """Return a function that builds the model with the attention implementation or the dtype given."""

    def make(config: Any) -> nn.Module:
        dtype = settings.get("dtype", torch.float32)
        config._attn_implementation = settings.get("attention", config._attn_implementation)
        for key, value in settings.get("fields", {}).items():
            setattr(config, key, value)
        model: nn.Module = getattr(transformers, name)(config)
        if settings.get("checkpointing"):
            model.gradient_checkpointing_enable()
        return model.to(dtype)

    return make


class Wrapped(nn.Module):
    """A user's own head over a pretrained body, called with positional arguments."""

    def __init__(self, body: nn.Module, width: int) -> None:
        super().__init__()
        self.body = body
        self.head = nn.Sequential(nn.Dropout(0.1), nn.Linear(width, 3))

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        hidden = self.body(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        weights = attention_mask.unsqueeze(-1)
        return self.head((hidden * weights).sum(1) / weights.sum(1))


def _positional(batch: int) -> Inputs:
    ids = _tokens(batch)
    return (ids, torch.ones_like(ids))


def _row(name: str, model: str, count: int, activation: str | None, gated: bool = False, **fields: Any) -> Row:
    return Row(model, count, activation, gated, name=name, **fields)


BERT, GPT2, LLAMA, T5 = (
    "BertForSequenceClassification",
    "GPT2LMHeadModel",
    "LlamaForCausalLM",
    "T5ForConditionalGeneration",
)
ROWS: tuple[Row, ...] = (
    _row("bert-ids-only", BERT, 2, "gelu", inputs="ids", quick=True),
    _row("bert-padded", BERT, 2, "gelu", inputs="padded", quick=True),
    _row("bert-labels", BERT, 2, "gelu", inputs=_with(labels=_classes), quick=True),
    _row("bert-token-types", BERT, 2, "gelu", inputs=_with(token_type_ids=lambda b: torch.zeros(b, LENGTH,
        dtype=torch.long))),
    _row("bert-position-ids", BERT, 2, "gelu", inputs=_with(position_ids=lambda b: torch.arange(LENGTH).expand(b,
        -1).contiguous())),
    _row("bert-hidden-states", BERT, 2, "gelu", inputs=_with(output_hidden_states=True), quick=True),
    _row("bert-hidden-states-by-config", BERT, 2, "gelu", make=_model(BERT, fields={"output_hidden_states": True})),
    _row("bert-attentions", BERT, 2, "gelu", inputs=_with(output_attentions=True), make=_model(BERT,
        attention="eager")),
    _row("bert-tuple-output", BERT, 2, "gelu", inputs=_with(return_dict=False), quick=True),
    _row("bert-eager-attention", BERT, 2, "gelu", make=_model(BERT, attention="eager")),
    _row("bert-embeddings-as-input", BERT, 2, "gelu", inputs=lambda b: {"inputs_embeds": torch.randn(b, LENGTH, 32)}),
    _row("bert-checkpointing", BERT, 2, "gelu", make=_model(BERT, checkpointing=True)),
    _row("bert-chunked-ffn", BERT, 2, "gelu", config={"chunk_size_feed_forward": 4}, alternatives=(4,),
        note="the FFN runs on pieces of the sequence"),
    _row("bert-relu", BERT, 2, "relu", config={"hidden_act": "relu"}, quick=True),
    _row("bert-silu", BERT, 2, "silu", config={"hidden_act": "silu"}),
    _row("bert-gelu-new", BERT, 2, "gelu_tanh", config={"hidden_act": "gelu_new"}),
    _row("bert-bfloat16", BERT, 2, "gelu", make=_model(BERT, dtype=torch.bfloat16), tolerance=5e-2),
    _row("bert-float64", BERT, 2, "gelu", make=_model(BERT, dtype=torch.float64)),
    _row("bert-decoder-with-cross-attention", "BertModel", 2, "gelu", config={"is_decoder": True,
        "add_cross_attention": True},
         inputs=_with(encoder_hidden_states=lambda b: torch.randn(b, 5, 32))),
    _row("bert-wrapped", "BertModel", 2, "gelu", inputs=_positional,
        make=lambda config: Wrapped(transformers.BertModel(config), 32), quick=True),
    _row("albert-two-groups", "AlbertForMaskedLM", 2, None, config={"num_hidden_groups": 2, "num_hidden_layers": 4},
        alternatives=(4,)),
    _row("gpt2-labels", GPT2, 2, "gelu_tanh", inputs=lambda b: {"input_ids": (ids := _tokens(b)), "labels": ids},
        quick=True),
    _row("gpt2-cache", GPT2, 2, "gelu_tanh", inputs=_with(use_cache=True)),
    _row("gpt2-untied", GPT2, 2, "gelu_tanh", config={"tie_word_embeddings": False}),
    _row("gpt2-relu", GPT2, 2, "relu", config={"activation_function": "relu"}),
    _row("gpt2-cross-attention", GPT2, 2, "gelu_tanh", config={"add_cross_attention": True},
         inputs=_with(encoder_hidden_states=lambda b: torch.randn(b, 5, 32))),
    _row("llama-labels", LLAMA, 2, "silu", True, inputs=_with(labels=_tokens)),
    _row("llama-no-cache", LLAMA, 2, "silu", True, inputs=_with(use_cache=False)),
    _row("llama-padded", LLAMA, 2, "silu", True, inputs="padded"),
    _row("llama-last-logits", LLAMA, 2, "silu", True, inputs=_with(logits_to_keep=1)),
    _row("llama-eager-attention", LLAMA, 2, "silu", True, make=_model(LLAMA, attention="eager")),
    _row("llama-bfloat16", LLAMA, 2, "silu", True, make=_model(LLAMA, dtype=torch.bfloat16), tolerance=5e-2,
        quick=True),
    _row("llama-float16", LLAMA, 2, "silu", True, make=_model(LLAMA, dtype=torch.float16), tolerance=1e-2),
    _row("llama-biased-ffn", LLAMA, 2, "silu", True, config={"mlp_bias": True, "attention_bias": True}),
    _row("llama-relu", LLAMA, 2, "relu", True, config={"hidden_act": "relu"}),
    _row("llama-tied", LLAMA, 2, "silu", True, config={"tie_word_embeddings": True}),
    _row("llama-checkpointing", LLAMA, 2, "silu", True, make=_model(LLAMA, checkpointing=True)),
    _row("t5-labels", T5, 4, "relu", config={"decoder_start_token_id": 0}, inputs=lambda b: {"input_ids": _tokens(b),
        "labels": _tokens(b)}),
    _row("t5-gated", T5, 4, "gelu_tanh", True, inputs="seq2seq", config={"feed_forward_proj": "gated-gelu"},
        quick=True),
    _row("t5-gated-silu", T5, 4, "silu", True, inputs="seq2seq", config={"feed_forward_proj": "gated-silu"}),
    _row("bart-labels", "BartForConditionalGeneration", 4, "gelu", inputs=lambda b: {"input_ids": _tokens(b),
        "labels": _tokens(b)}),
    _row("vit-labels", "ViTForImageClassification", 2, "gelu",
         inputs=lambda b: {"pixel_values": torch.randn(b, 3, 32, 32), "labels": _classes(b)}),
    _row("vit-positional", "ViTForImageClassification", 2, "gelu", inputs=lambda b: (torch.randn(b, 3, 32, 32),)),
    _row("clip-loss", "CLIPModel", 4, "quick_gelu", fixed_batch=True, config={"projection_dim": 16}, inputs=lambda b: {
        "input_ids": _tokens(b), "pixel_values": torch.randn(b, 3, 32, 32), "return_loss": True,
    }),
    _row("encoder-decoder-of-berts", "EncoderDecoderModel", 4, "gelu", inputs="seq2seq", config={
        side: {
            "model_type": "bert", "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
                "intermediate_size": 64,
            "vocab_size": VOCABULARY, "max_position_embeddings": 64,
            **({"is_decoder": True, "add_cross_attention": True} if side == "decoder" else {}),
        }
        for side in ("encoder", "decoder")
    }),
    _row("vision-encoder-decoder", "VisionEncoderDecoderModel", 4, None, config={
        "encoder": {
            "model_type": "vit", "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
                "intermediate_size": 64,
            "image_size": 32, "patch_size": 8,
        },
        "decoder": {
            "model_type": "gpt2", "n_embd": 32, "n_layer": 2, "n_head": 4, "vocab_size": VOCABULARY, "n_positions": 64,
            "add_cross_attention": True,
        },
    }, inputs=lambda b: {"pixel_values": torch.randn(b, 3, 32, 32), "decoder_input_ids": _tokens(b)}),
)  # fmt: skip
