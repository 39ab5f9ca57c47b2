"""Whole plain-torch models: where in them FFNs sit, and how many."""

from __future__ import annotations

from functools import partial
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import layers
from .body import DOWN, HIDDEN, OUTPUTS, SITES, TOKENS, UP, WIDTH, Block, Body, Stack, sequence, weight
from .case import Registry
from .layers import PAIR, SWIGLU, attention, gelu_ffn, images, relu_ffn, rows

CASES = Registry("structure")
model = partial(layers.model, CASES)


@model("", count=1, activation="relu")
def ffn_is_the_model() -> nn.Module:
    return relu_ffn(d_out=OUTPUTS)


@model("", count=1, activation="gelu")
def sequential_is_the_model() -> nn.Module:
    return nn.Sequential(nn.Linear(*UP), nn.GELU(), nn.Linear(HIDDEN, OUTPUTS))


@model("0", "2", "4", count=3, activation="relu", inputs=rows)
def sequential_of_ffns() -> nn.Module:
    return nn.Sequential(relu_ffn(), nn.LayerNorm(WIDTH), relu_ffn(), nn.LayerNorm(WIDTH), relu_ffn(d_out=OUTPUTS))


@model(count=1, activation="relu", inputs=rows, note="of two overlapping sites one must be chosen")
def mlp_of_three_linears() -> nn.Module:
    return nn.Sequential(nn.Linear(*UP), nn.ReLU(), nn.Linear(HIDDEN, 28), nn.ReLU(), nn.Linear(28, OUTPUTS))


@model(count=2, alternatives=(1,), activation="gelu", inputs=rows, note="of three overlapping sites two fit")
def mlp_of_four_linears() -> nn.Module:
    sizes = [WIDTH, HIDDEN, 28, 32, OUTPUTS]
    layers = [nn.Sequential(nn.GELU(), nn.Linear(a, b)) for a, b in pairwise(sizes[1:])]
    return nn.Sequential(nn.Linear(*sizes[:2]), *layers)


@model(count=1, gated=True, activation="silu", inputs=rows, note="a gated and a plain site overlap")
def gated_then_plain_overlapping() -> nn.Module:
    body = lambda m, x: m.last(F.relu(m.down(F.silu(m.gate(x)) * m.up(x))))  # noqa: E731
    return Body(body, **SWIGLU, last=(WIDTH, OUTPUTS))


@model("0", count=1, activation="relu", inputs=rows)
def hidden_narrower_than_input() -> nn.Module:
    return nn.Sequential(relu_ffn(WIDTH, 8, WIDTH), nn.LayerNorm(WIDTH))


@model("0", count=1, activation="relu", inputs=rows)
def hidden_as_wide_as_input() -> nn.Module:
    return nn.Sequential(relu_ffn(WIDTH, WIDTH, WIDTH), nn.LayerNorm(WIDTH))


@model("0", count=1, activation="relu", inputs=rows)
def one_output() -> nn.Module:
    return nn.Sequential(relu_ffn(WIDTH, HIDDEN, 1), nn.Sigmoid())


@model("0", count=1, activation="relu", inputs=lambda b: (torch.randn(b, TOKENS, 1),))
def one_input_feature() -> nn.Module:
    return nn.Sequential(relu_ffn(1, HIDDEN, WIDTH), nn.LayerNorm(WIDTH))


@model("0", count=1, activation="relu", inputs=rows, note="the last of 4 experts is filled up")
def odd_hidden_width() -> nn.Module:
    return nn.Sequential(relu_ffn(WIDTH, 25, WIDTH), nn.LayerNorm(WIDTH))


@model("0", count=1, activation="relu", inputs=lambda b: (torch.randn(WIDTH),), fixed_batch=True)
def single_vector() -> nn.Module:
    return nn.Sequential(relu_ffn(), nn.LayerNorm(WIDTH))


@model(*SITES, activation="relu", inputs=lambda b: sequence(1), fixed_batch=True)
def batch_of_one() -> nn.Module:
    return Stack(Block(ffn=relu_ffn()), Block(ffn=relu_ffn()))


@model(*SITES, activation="relu", inputs=lambda b: (torch.randn(b, 1, WIDTH),))
def sequence_of_one() -> nn.Module:
    return Stack(Block(ffn=relu_ffn()), Block(ffn=relu_ffn()))


@model(*SITES, activation="relu", inputs=images)
def channels_last_images() -> nn.Module:
    return Stack(Block(ffn=relu_ffn()), Block(ffn=relu_ffn()))


@model(*SITES, activation="relu", inputs=lambda b: (torch.randn(b, 2, 3, 2, WIDTH),))
def five_dimensions() -> nn.Module:
    return Stack(Block(ffn=relu_ffn()), Block(ffn=relu_ffn()))


@model("1", count=1, activation="gelu", inputs=lambda b: (torch.randn(b, 3, 8, 8),))
def channels_first_images() -> nn.Module:
    body = lambda m, x: x + m.down(F.gelu(m.up(x.permute(0, 2, 3, 1)))).permute(0, 3, 1, 2)  # noqa: E731
    return nn.Sequential(nn.Conv2d(3, WIDTH, 4, 4), Body(body, **PAIR), nn.AdaptiveAvgPool2d(1), nn.Flatten())


@model("blocks.0.ffn", "blocks.1.ffn", "blocks.0.mix", "blocks.1.mix", count=4, activation="gelu")
def mixer() -> nn.Module:
    def mix() -> nn.Module:
        return Body(lambda m, x: m.down(F.gelu(m.up(x.mT))).mT, up=(TOKENS, 12), down=(12, TOKENS))

    return Stack(Block(mix=mix(), ffn=gelu_ffn()), Block(mix=mix(), ffn=gelu_ffn()))


@model(*SITES, activation="gelu")
def pre_norm_transformer() -> nn.Module:
    return Stack(Block(attn=attention(), ffn=gelu_ffn()), Block(attn=attention(), ffn=gelu_ffn()))


@model(*SITES, activation="gelu")
def post_norm_transformer() -> nn.Module:
    def block() -> nn.Module:
        def forward(m: Any, x: Tensor) -> Tensor:
            x = m.norm1(x + m.attn(x))
            return m.norm2(x + m.ffn(x))

        norm = lambda: nn.LayerNorm(WIDTH)  # noqa: E731
        return Body(forward, attn=attention, ffn=gelu_ffn, norm1=norm, norm2=norm)

    return Stack(block(), block())


@model(*SITES, activation="gelu")
def parallel_attention_and_ffn() -> nn.Module:
    def block() -> nn.Module:
        body = lambda m, x: x + m.attn(h := m.norm(x)) + m.ffn(h)  # noqa: E731
        return Body(body, attn=attention, ffn=gelu_ffn, norm=lambda: nn.LayerNorm(WIDTH))

    return Stack(block(), block())


@model(exact=False, note="one projection for attention and FFN; may be refused")
def parallel_with_one_projection() -> nn.Module:
    def block() -> nn.Module:
        def forward(m: Any, x: Tensor) -> Tensor:
            q, k, v, h = m.into(m.norm(x)).split([WIDTH, WIDTH, WIDTH, HIDDEN], dim=-1)
            y = F.scaled_dot_product_attention(q, k, v)
            return x + m.out(torch.cat([y, F.gelu(h)], dim=-1))

        return Body(
            forward, into=(WIDTH, 3 * WIDTH + HIDDEN), out=(WIDTH + HIDDEN, WIDTH), norm=lambda: nn.LayerNorm(WIDTH)
        )

    return Stack(block(), block())


@model("blocks.0.first", "blocks.0.second", "blocks.1.first", "blocks.1.second", activation="silu")
def macaron() -> nn.Module:
    def block() -> nn.Module:
        def half() -> nn.Module:
            return Body(lambda m, x: 0.5 * m.down(F.silu(m.up(m.norm(x)))), **PAIR, norm=lambda: nn.LayerNorm(WIDTH))

        def forward(m: Any, x: Tensor) -> Tensor:
            x = x + m.first(x)
            x = x + m.attn(x)
            return m.norm(x + m.second(x))

        return Body(forward, first=half, second=half, attn=attention, norm=lambda: nn.LayerNorm(WIDTH))

    return Stack(block(), block())


@model("blocks.0", "blocks.0", "blocks.1", "blocks.1", count=4, activation="relu", note="the linears lie side by side")
def two_ffns_in_one_module() -> nn.Module:
    def block() -> nn.Module:
        body = lambda m, x: x + m.b(F.relu(m.a(m.n(x)))) + m.d(F.relu(m.c(m.n(x))))  # noqa: E731
        return Body(body, a=UP, b=DOWN, c=UP, d=DOWN, n=lambda: nn.LayerNorm(WIDTH))

    return Stack(block(), block())


@model(*SITES, activation="gelu")
def layer_scale() -> nn.Module:
    def ffn() -> nn.Module:
        return Body(lambda m, x: m.gamma * m.down(F.gelu(m.up(x))), **PAIR, gamma=weight(WIDTH))

    return Stack(Block(ffn=ffn()), Block(ffn=ffn()))


@model(*SITES, activation="relu")
def output_masked() -> nn.Module:
    def ffn() -> nn.Module:
        return Body(lambda m, x: m.down(F.relu(m.up(x))) * (x.sum(-1, keepdim=True) > 0), **PAIR)

    return Stack(Block(ffn=ffn()), Block(ffn=ffn()))


@model(*SITES, activation="gelu", note="whole branches are dropped at random in training")
def stochastic_depth() -> nn.Module:
    def ffn() -> nn.Module:
        def forward(m: Any, x: Tensor) -> Tensor:
            y = m.down(F.gelu(m.up(x)))
            return y * x.new_empty(x.shape[0], 1, 1).bernoulli_(0.9).div_(0.9) if m.training else y

        return Body(forward, **PAIR)

    return Stack(Block(ffn=ffn()), Block(ffn=ffn()))


@model(*SITES, activation="gelu", note="what is dropped at random is so small that outputs hardly tell")
def stochastic_depth_behind_tiny_layer_scale() -> nn.Module:
    def ffn() -> nn.Module:
        def forward(m: Any, x: Tensor) -> Tensor:
            y = 2e-5 * m.down(F.gelu(m.up(x)))
            return y * (torch.rand(x.shape[0], 1, 1) > 0.1) / 0.9 if m.training else y

        return Body(forward, **PAIR)

    return Stack(Block(ffn=ffn()), Block(ffn=ffn()))


@model(*SITES, activation="gelu", note="whole layers are skipped by a Python comparison in training")
def layer_drop() -> nn.Module:
    def block() -> nn.Module:
        def forward(m: Any, x: Tensor) -> Tensor:
            if m.training and torch.rand(()) < 0.1:
                return x
            return x + m.ffn(m.norm(x))

        return Body(forward, ffn=gelu_ffn, norm=lambda: nn.LayerNorm(WIDTH))

    return Stack(block(), block())


@model("cls", count=1, activation="relu")
def only_on_first_token() -> nn.Module:
    return Body(lambda m, x: m.head(m.cls(x[:, 0]) + x.mean(1)), cls=relu_ffn, head=(WIDTH, OUTPUTS))


@model("ffn", count=1, activation="relu", note="the number of rows depends on the values")
def only_on_selected_tokens() -> nn.Module:
    def forward(m: Any, x: Tensor) -> Tensor:
        chosen = x.sum(-1) > 0
        return m.head(torch.zeros_like(x).masked_scatter(chosen.unsqueeze(-1), m.ffn(x[chosen])))

    return Body(forward, ffn=relu_ffn, head=(WIDTH, OUTPUTS))


@model("ffn", count=1, activation="relu", note="selects no row at all")
def on_no_token() -> nn.Module:
    def forward(m: Any, x: Tensor) -> Tensor:
        chosen = x.sum(-1) > 1e6
        return m.head(x).sum(1) + m.ffn(x[chosen]).sum(0)[:OUTPUTS]

    return Body(forward, ffn=relu_ffn, head=(WIDTH, OUTPUTS))


@model("ffn", count=1, activation="relu", note="all rows of the input share their memory")
def on_an_expanded_input() -> nn.Module:
    return Body(lambda m, x: x + m.ffn(x[:, :1].expand_as(x)), ffn=relu_ffn)


@model("ffn", count=1, activation="relu", inputs=lambda b: (torch.randn(1, WIDTH),), fixed_batch=True)
def single_row_overwritten() -> nn.Module:
    def forward(m: Any, x: Tensor) -> Tensor:
        y = m.ffn(x)
        y += 1.0
        return y

    return Body(forward, ffn=relu_ffn)


@model("ffn", count=1, activation="relu", inputs=lambda b: (*sequence(b), torch.tensor([0, 3, 1])))
def on_gathered_tokens() -> nn.Module:
    return Body(lambda m, x, places: m.head(m.ffn(x.index_select(1, places))), ffn=relu_ffn, head=(WIDTH, OUTPUTS))


@model("ffn", count=1, untraceable="what it runs depends on the values of the input")
def data_dependent_branch() -> nn.Module:
    return Body(lambda m, x: m.ffn(x) if x.sum() > 0 else x, ffn=relu_ffn)


CASES.mark_quick(
    [
        "sequential_is_the_model",
        "mlp_of_three_linears",
        "mixer",
        "macaron",
        "two_ffns_in_one_module",
        "only_on_selected_tokens",
        "stochastic_depth_behind_tiny_layer_scale",
    ]
)
