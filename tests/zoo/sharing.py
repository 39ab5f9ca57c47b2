"""Whole plain-torch models: FFNs that share parameters, are one module, or run more than once."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from . import layers
from .body import OUTPUTS, SITES, TOKENS, WIDTH, Block, Body, Stack, sequence
from .case import Registry
from .layers import Language, attention, gelu_ffn, relu_ffn, swiglu_ffn, tokens

CASES = Registry("sharing")
model = partial(layers.model, CASES)


@model("shared.ffn", count=1, alternatives=(3,), activation="gelu", note="ALBERT: one block run three times")
def block_repeated() -> nn.Module:
    def forward(m: Any, x: Tensor) -> Tensor:
        for _ in range(3):
            x = m.shared(x)
        return m.head(m.norm(x))

    shared = Block(attn=attention(), ffn=gelu_ffn())
    return Body(forward, shared=lambda: shared, norm=lambda: nn.LayerNorm(WIDTH), head=(WIDTH, OUTPUTS))


@model(count=1, alternatives=(2,), activation="gelu")
def ffn_module_shared_by_blocks() -> nn.Module:
    ffn = gelu_ffn()
    return Stack(Block(attn=attention(), ffn=ffn), Block(attn=attention(), ffn=ffn))


@model(count=1, alternatives=(2,), activation="gelu", note="two modules hold the same parameters")
def parameters_shared_by_blocks() -> nn.Module:
    first, second = gelu_ffn(), gelu_ffn()
    for name in ("up", "down"):
        getattr(second, name).weight = getattr(first, name).weight
        getattr(second, name).bias = getattr(first, name).bias
    return Stack(Block(ffn=first), Block(ffn=second))


@model(count=1, alternatives=(0, 2), activation="gelu", exact=False, note="weights shared, biases not")
def weights_shared_biases_not() -> nn.Module:
    first, second = gelu_ffn(), gelu_ffn()
    for name in ("up", "down"):
        getattr(second, name).weight = getattr(first, name).weight
    return Stack(Block(ffn=first), Block(ffn=second))


@model(count=1, alternatives=(0, 2), exact=False, note="the same weights with two activations")
def weights_shared_activations_not() -> nn.Module:
    first, second = gelu_ffn(), relu_ffn()
    second.up, second.down = first.up, first.down
    return Stack(Block(ffn=first), Block(ffn=second))


@model(count=1, alternatives=(0, 2), exact=False, note="only the first linear is shared")
def first_linear_shared_across_blocks() -> nn.Module:
    first, second = relu_ffn(), relu_ffn()
    second.up = first.up
    return Stack(Block(ffn=first), Block(ffn=second))


@model(
    "encoder.ffn",
    count=1,
    alternatives=(2,),
    activation="gelu",
    inputs=lambda b: (*sequence(b), torch.randn(b, 3, WIDTH)),
)
def siamese() -> nn.Module:
    encoder = Block(attn=attention(), ffn=gelu_ffn())
    return Body(lambda m, a, b: m.encoder(a).mean(1) - m.encoder(b).mean(1), encoder=lambda: encoder)


@model("ffn", count=1, alternatives=(TOKENS,), activation="relu", note="called for each token of a Python loop")
def called_for_each_token() -> nn.Module:
    body = lambda m, x: torch.stack([m.ffn(x[:, t]) for t in range(TOKENS)], dim=1)  # noqa: E731
    return Body(body, ffn=relu_ffn)


@model("ffn", count=1, alternatives=(2,), activation="relu", note="called for each half of the tokens")
def called_in_chunks() -> nn.Module:
    body = lambda m, x: m.head(torch.cat([m.ffn(part) for part in x.split([2, 3], dim=1)], 1))  # noqa: E731
    return Body(body, ffn=relu_ffn, head=(WIDTH, OUTPUTS))


@model("ffn", count=1, alternatives=(2,), activation="relu", note="its own output is its next input")
def called_on_its_own_output() -> nn.Module:
    return Body(
        lambda m, x: m.head(m.norm(m.ffn(m.ffn(x)))),
        ffn=relu_ffn,
        norm=lambda: nn.LayerNorm(WIDTH),
        head=(WIDTH, OUTPUTS),
    )


@model(*SITES, activation="gelu", inputs=tokens)
def language_model_tied() -> nn.Module:
    return Language(gelu_ffn, tied=True)


@model(*SITES, activation="silu", gated=True, inputs=tokens)
def language_model_untied() -> nn.Module:
    return Language(swiglu_ffn, tied=False)


CASES.mark_quick(["block_repeated", "called_on_its_own_output", "weights_shared_biases_not", "language_model_tied"])
