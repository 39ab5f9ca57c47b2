"""Whole plain-torch models: what their FFNs are called, and the containers that hold them."""

from __future__ import annotations

from collections import OrderedDict
from functools import partial
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from . import layers
from .body import DOWN, HIDDEN, OUTPUTS, UP, WIDTH, Block, Body, Stack, weight
from .case import Registry
from .layers import PAIR, gelu_ffn

CASES = Registry("naming")
model = partial(layers.model, CASES)


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
    root.add_module("class", nn.Sequential(residual_ffn(), residual_ffn()))
    return root


def residual_ffn() -> nn.Module:
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
    return Body(body, moe=residual_ffn, moe_1=residual_ffn, head=(WIDTH, OUTPUTS))


@model("experts.0.moe", "experts.0.router", count=2, activation="gelu")
def names_of_rewritten_modules_nested() -> nn.Module:
    inner = Body(lambda m, x: m.router(x + m.moe(x)), moe=residual_ffn, router=residual_ffn)
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
