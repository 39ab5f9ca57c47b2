"""Whole plain-torch models: what they take and what they return."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from . import layers
from .body import SITES, TOKENS, WIDTH, Block, Body, Stack, randomize, sequence
from .case import Case, Registry
from .layers import Language, gelu_ffn, relu_ffn, swiglu_ffn, tokens

CASES = Registry("interface")
model = partial(layers.model, CASES)


class Output(NamedTuple):
    """A named tuple as an output."""

    scores: Tensor
    hidden: Tensor


@dataclass
class Result:
    """A dataclass as an output."""

    scores: Tensor
    hidden: Tensor | None = None


torch.export.register_dataclass(Result, serialized_type_name="tests.zoo.Result")

OUTPUT_KINDS: dict[str, Callable[[Tensor, Tensor], Any]] = {
    "tuple": lambda y, x: (y, x),
    "list": lambda y, x: [y, x],
    "dict": lambda y, x: {"scores": y, "hidden": x},
    "nested": lambda y, x: {"scores": (y, [x]), "none": None},
    "named_tuple": Output,
    "dataclass": Result,
    "dataclass_with_none": Result,
    "input_as_output": lambda y, x: (y, x),
    "constant_as_output": lambda y, x: (y, torch.ones(2), 3, "text", None),
    "parameter_free": lambda y, x: (y.argmax(-1), y > 0, y),
}


def _with_output(kind: str, make: Callable[..., Any]) -> None:
    def forward(m: Any, x: Tensor) -> Any:
        y = m.stack(x)
        if kind == "dataclass_with_none":
            return make(y)
        return make(y, x if kind == "input_as_output" else y.relu())

    def build() -> nn.Module:
        stack = Stack(Block(ffn=relu_ffn()), Block(ffn=relu_ffn()))
        return randomize(Body(forward, stack=lambda: stack)).eval()

    required = tuple(f"stack.{site}" for site in SITES)
    CASES.add(Case(name=f"output_{kind}", build=build, inputs=sequence, required=required, activation="relu"))


for _kind, _make in OUTPUT_KINDS.items():
    _with_output(_kind, _make)


@model(*SITES, activation="gelu", inputs=lambda b: {"ids": tokens(b)["ids"], "mask": None})  # type: ignore[call-overload]
def none_as_input() -> nn.Module:
    return Language(gelu_ffn, tied=False)


@model(*SITES, activation="gelu", inputs=lambda b: {**tokens(b), "mask": torch.ones(b, TOKENS)})  # type: ignore[dict-item]
def mask_as_input() -> nn.Module:
    return Language(gelu_ffn, tied=False)


class _KeywordOnly(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.ffn, self.other = relu_ffn(), swiglu_ffn()

    def forward(self, *, x: Tensor, scale: float = 1.0, flip: bool = False, mode: str = "sum") -> Tensor:
        y = self.ffn(x) * scale + self.other(x.flip(1) if flip else x)
        return y.sum(1) if mode == "sum" else y


@model("ffn", "other", inputs=lambda b: {"x": torch.randn(b, TOKENS, WIDTH)})
def keyword_only_inputs() -> nn.Module:
    return _KeywordOnly()


@model(
    "ffn", "other", inputs=lambda b: {"x": torch.randn(b, TOKENS, WIDTH), "scale": 0.5, "flip": True, "mode": "none"}
)
def numbers_flags_and_strings_as_inputs() -> nn.Module:
    return _KeywordOnly()


@model("ffn", count=1, activation="relu", inputs=lambda b: ([torch.randn(b, WIDTH), {"a": torch.randn(b, WIDTH)}],))
def nested_inputs() -> nn.Module:
    return Body(lambda m, xs: m.ffn(xs[0] + xs[1]["a"]), ffn=relu_ffn)


@model("ffn", count=1, activation="relu", inputs=lambda b: (torch.randn(b, WIDTH), torch.randn(b, WIDTH), None))
def positional_none_input() -> nn.Module:
    return Body(lambda m, x, y, z: m.ffn(x - y) if z is None else z, ffn=relu_ffn)


class _Variadic(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.ffn = relu_ffn()

    def forward(self, *xs: Tensor, **more: Tensor) -> Tensor:
        return self.ffn(sum(xs)) + sum(more.values())


@model("ffn", count=1, activation="relu", inputs=lambda b: (torch.randn(b, WIDTH), torch.randn(b, WIDTH)))
def variadic_inputs() -> nn.Module:
    return _Variadic()


@model("ffn", count=1, activation="relu", inputs=lambda b: {"a": torch.randn(b, WIDTH), "b": torch.randn(b, WIDTH)})
def variadic_keyword_inputs() -> nn.Module:
    body = lambda m, **xs: m.ffn(xs["a"] * xs["b"])  # noqa: E731
    return Body(body, ffn=relu_ffn)


@model("ffn", count=1, activation="relu", inputs=lambda b: (torch.randn(b, WIDTH), torch.randn(4, WIDTH)))
def second_input_without_batch() -> nn.Module:
    return Body(lambda m, x, memory: m.ffn(torch.softmax(x @ memory.T, -1) @ memory), ffn=relu_ffn)


@model("ffn", count=1, activation="relu", inputs=lambda b: (torch.randn(TOKENS, b, WIDTH),))
def batch_second() -> nn.Module:
    return Body(lambda m, x: m.ffn(x).mean(0), ffn=relu_ffn)


@model(
    "ffn", count=1, activation="relu", inputs=lambda b: (torch.randint(0, 9, (b, TOKENS)), torch.rand(b, TOKENS) > 0.3)
)
def boolean_mask_input() -> nn.Module:
    def forward(m: Any, ids: Tensor, keep: Tensor) -> Tensor:
        return m.ffn(m.embed(ids).masked_fill(~keep.unsqueeze(-1), 0.0))

    return Body(forward, embed=lambda: nn.Embedding(9, WIDTH), ffn=relu_ffn)


CASES.mark_quick(["output_dict", "keyword_only_inputs", "none_as_input"])
