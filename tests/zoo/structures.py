"""Whole plain-torch models: where FFNs sit, what they are called, and what they share."""

from __future__ import annotations

from collections import OrderedDict
from functools import partial
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import layers
from .body import DOWN, HIDDEN, OUTPUTS, SITES, TOKENS, UP, WIDTH, Block, Body, Stack, sequence, weight
from .case import Registry
from .layers import PAIR, SWIGLU, Language, attention, gelu_ffn, images, relu_ffn, rows, swiglu_ffn, tokens

CASES = Registry("structure")
model = partial(layers.model, CASES)

# Where the FFN sits ---------------------------------------------------------------------------------------------------


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


@model("0", count=1, activation="relu", inputs=rows, note="25 neurons do not divide by 4 experts")
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


# Names and containers -------------------------------------------------------------------------------------------------


@model("zoo-keeper.7 of 9", "zoo-keeper.été", count=2, activation="gelu")
def awkward_names() -> nn.Module:
    children = nn.ModuleDict({"7 of 9": gelu_ffn(), "été": gelu_ffn()})
    root = Body(
        lambda m, x: m.head(x + sum(f(m.norm(x)) for f in getattr(m, "zoo-keeper").values())), head=(WIDTH, OUTPUTS)
    )
    root.add_module("norm", nn.LayerNorm(WIDTH))
    root.add_module("zoo-keeper", children)
    return root


@model("class.0", "class.1", count=2, activation="gelu", untraceable="torch.fx cannot write a name that is a keyword")
def keyword_names() -> nn.Module:
    root = Body(lambda m, x: m.head(m._modules["class"](x)), head=(WIDTH, OUTPUTS))
    root.add_module("class", nn.Sequential(relu_like(), relu_like()))
    return root


def relu_like() -> nn.Module:
    """Return a residual GELU FFN with its own norm."""
    return Body(lambda m, x: x + m.down(F.gelu(m.up(m.norm(x)))), **PAIR, norm=lambda: nn.LayerNorm(WIDTH))


@model("blocks.0.ffn", "blocks.1.ffn", activation="gelu")
def names_of_graph_internals() -> nn.Module:
    def ffn() -> nn.Module:
        body = lambda m, x: getattr(m, "output")(F.gelu(getattr(m, "placeholder")(x)))  # noqa: B009, E731
        return Body(body, placeholder=UP, output=DOWN)

    return Stack(Block(ffn=ffn()), Block(ffn=ffn()))


@model("moe", "moe_1", count=2, activation="gelu", note="names that a rewrite may want for itself")
def names_of_rewritten_modules() -> nn.Module:
    body = lambda m, x: m.head(m.moe_1(x + m.moe(x)))  # noqa: E731
    return Body(body, moe=relu_like, moe_1=relu_like, head=(WIDTH, OUTPUTS))


@model("experts.0.moe", "experts.0.router", count=2, activation="gelu")
def names_of_rewritten_modules_nested() -> nn.Module:
    inner = Body(lambda m, x: m.router(x + m.moe(x)), moe=relu_like, router=relu_like)
    root = Body(lambda m, x: m.head(m.experts[0](x)), head=(WIDTH, OUTPUTS))
    root.add_module("experts", nn.ModuleList([inner]))
    return root


@model("layers.first.mlp", "layers.second.mlp", count=2, activation="relu")
def ordered_dict_of_layers() -> nn.Module:
    def mlp() -> nn.Module:
        parts = OrderedDict(fc1=nn.Linear(*UP), act=nn.ReLU(), drop=nn.Dropout(0.1), fc2=nn.Linear(*DOWN))
        return nn.Sequential(OrderedDict(norm=nn.LayerNorm(WIDTH), mlp=nn.Sequential(parts)))

    layers = nn.Sequential(OrderedDict(first=mlp(), second=mlp()))
    return Body(lambda m, x: m.head(m.layers(x)), layers=lambda: layers, head=(WIDTH, OUTPUTS))


@model("up.0", "up.1", count=2, activation="gelu", note="first and second linears in lists of their own", exact=False)
def linears_in_parallel_lists() -> nn.Module:
    def forward(m: Any, x: Tensor) -> Tensor:
        for up, down, norm in zip(m.up, m.down, m.norm, strict=True):
            x = x + down(F.gelu(up(norm(x))))
        return x

    lists = {"up": UP, "down": DOWN}
    root = Body(forward, norm=lambda: nn.ModuleList(nn.LayerNorm(WIDTH) for _ in range(2)))
    for name, shape in lists.items():
        root.add_module(name, nn.ModuleList(nn.Linear(*shape) for _ in range(2)))
    return root


@model("0", "1", count=2, activation="gelu")
def activation_module_shared() -> nn.Module:
    act, drop = nn.GELU(), nn.Dropout(0.1)
    layers = [nn.Sequential(nn.LayerNorm(WIDTH), nn.Linear(*UP), act, drop, nn.Linear(*DOWN)) for _ in range(2)]
    return nn.Sequential(*layers)


@model(count=2, activation="relu", note="parameters lie at the top of the model")
def parameters_at_top() -> nn.Module:
    def forward(m: Any, x: Tensor) -> Tensor:
        x = F.layer_norm(x + F.linear(F.relu(F.linear(x, m.a1, m.ab)), m.a2), (WIDTH,))
        return F.linear(F.relu(F.linear(x, m.b1)), m.b2, m.bb)

    shapes = {"a1": (HIDDEN, WIDTH), "ab": (HIDDEN,), "a2": (WIDTH, HIDDEN)}
    shapes |= {"b1": (HIDDEN, WIDTH), "b2": (WIDTH, HIDDEN), "bb": (WIDTH,)}
    return Body(forward, **{name: weight(*shape) for name, shape in shapes.items()})


# Sharing --------------------------------------------------------------------------------------------------------------


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


CASES.mark_quick(
    [
        "sequential_is_the_model",
        "mlp_of_three_linears",
        "mixer",
        "macaron",
        "two_ffns_in_one_module",
        "block_repeated",
        "called_on_its_own_output",
        "weights_shared_biases_not",
        "language_model_tied",
        "only_on_selected_tokens",
        "stochastic_depth_behind_tiny_layer_scale",
    ]
)
