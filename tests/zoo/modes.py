"""Whole plain-torch models: number formats, regions of the forward pass, hooks, buffers, wrappers."""

from __future__ import annotations

import copy
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from . import layers
from .body import DOWN, OUTPUTS, SITES, TOKENS, UP, WIDTH, Block, Body, Stack, sequence
from .case import Registry
from .layers import PAIR, attention, gelu_ffn, relu_ffn, swiglu_ffn

CASES = Registry("mode")
model = partial(layers.model, CASES)


# Number formats -------------------------------------------------------------------------------------------------------


@model(
    *SITES,
    activation="gelu",
    half=torch.float64,
    inputs=lambda b: (torch.randn(b, TOKENS, WIDTH, dtype=torch.float64),),
)
def float64() -> nn.Module:
    return Stack(Block(attn=attention(), ffn=gelu_ffn()), Block(ffn=gelu_ffn()))


@model(
    *SITES, activation="silu", gated=True, half=torch.bfloat16, tolerance=5e-2,
    inputs=lambda b: (torch.randn(b, TOKENS, WIDTH, dtype=torch.bfloat16),),
)  # fmt: skip
def bfloat16() -> nn.Module:
    return Stack(Block(attn=attention(), ffn=swiglu_ffn()), Block(ffn=swiglu_ffn()))


@model(
    *SITES, activation="gelu", half=torch.float16, tolerance=1e-2,
    inputs=lambda b: (torch.randn(b, TOKENS, WIDTH, dtype=torch.float16),),
)  # fmt: skip
def float16() -> nn.Module:
    return Stack(Block(ffn=gelu_ffn()), Block(ffn=gelu_ffn()))


@model(*SITES, activation="gelu", tolerance=5e-2, note="the FFN in bfloat16, the rest in float32")
def mixed_number_formats() -> nn.Module:
    def ffn() -> nn.Module:
        body = Body(lambda m, x: m.down(F.gelu(m.up(x.bfloat16()))).float(), **PAIR)
        return body.to(torch.bfloat16)

    return Stack(Block(ffn=ffn()), Block(ffn=ffn()))


@model(
    *SITES, activation="gelu", tolerance=5e-2, half=torch.bfloat16,
    inputs=lambda b: (torch.randn(b, TOKENS, WIDTH, dtype=torch.bfloat16),),
    note="the activation in float32, the rest in bfloat16",
)  # fmt: skip
def activation_in_float32() -> nn.Module:
    def ffn() -> nn.Module:
        return Body(lambda m, x: m.down(F.gelu(m.up(x).float()).to(x.dtype)), **PAIR)

    return Stack(Block(ffn=ffn()), Block(ffn=ffn()))


@model(exact=False, tolerance=5e-2, note="a region of lower precision; may be refused")
def autocast() -> nn.Module:
    def ffn() -> nn.Module:
        def forward(m: Any, x: Tensor) -> Tensor:
            with torch.autocast("cpu", dtype=torch.bfloat16):
                return m.down(F.gelu(m.up(x))).float()

        return Body(forward, **PAIR)

    return Stack(Block(ffn=ffn()), Block(ffn=ffn()))


@model(*SITES, activation="gelu", note="an autocast region that is switched off")
def autocast_disabled() -> nn.Module:
    def ffn() -> nn.Module:
        def forward(m: Any, x: Tensor) -> Tensor:
            with torch.autocast("cpu", enabled=False):
                return m.down(F.gelu(m.up(x)))

        return Body(forward, **PAIR)

    return Stack(Block(ffn=ffn()), Block(ffn=ffn()))


@model(
    "ffn", activation="gelu", exact=False, note="a frozen backbone without gradients, whose FFNs may be found as well"
)
def no_grad_backbone() -> nn.Module:
    def forward(m: Any, x: Tensor) -> Tensor:
        with torch.no_grad():
            x = m.backbone(x)
        return m.head(m.ffn(x))

    parts: dict[str, Any] = {"backbone": lambda: Block(ffn=gelu_ffn()), "ffn": gelu_ffn, "head": (WIDTH, OUTPUTS)}
    return Body(forward, **parts)


@model(*SITES, activation="gelu", note="every block runs without gradients")
def no_grad_everywhere() -> nn.Module:
    stack = Stack(Block(ffn=gelu_ffn()), Block(ffn=gelu_ffn()))
    stack.forward = torch.no_grad()(stack.forward)  # type: ignore[method-assign]
    return stack


@model(*SITES, activation="gelu")
def detached_input() -> nn.Module:
    def ffn() -> nn.Module:
        return Body(lambda m, x: m.down(F.gelu(m.up(x.detach()))), **PAIR)

    return Stack(Block(ffn=ffn()), Block(ffn=ffn()))


@model(*SITES, activation="gelu")
def checkpointed() -> nn.Module:
    def ffn() -> nn.Module:
        return Body(lambda m, x: checkpoint(m.inner, x, use_reentrant=False), inner=gelu_ffn)

    return Stack(Block(ffn=ffn()), Block(ffn=ffn()))


@model(*SITES, activation="gelu", note="checkpointed only in training, the older way")
def checkpointed_reentrant() -> nn.Module:
    def ffn() -> nn.Module:
        def forward(m: Any, x: Tensor) -> Tensor:
            return checkpoint(m.inner, x, use_reentrant=True) if m.training and x.requires_grad else m.inner(x)

        return Body(forward, inner=gelu_ffn)

    return Stack(Block(ffn=ffn()), Block(ffn=ffn()))


@model(*SITES, activation="gelu")
def frozen() -> nn.Module:
    return Stack(Block(ffn=gelu_ffn()), Block(ffn=gelu_ffn())).requires_grad_(False)


@model(*SITES, activation="gelu", note="a hook doubles what the FFN returns")
def hook_on_output() -> nn.Module:
    ffn = gelu_ffn()
    ffn.register_forward_hook(lambda module, args, output: 2 * output)
    return Stack(Block(ffn=ffn), Block(ffn=gelu_ffn()))


@model(*SITES, activation=None, note="a hook halves the hidden values")
def hook_on_hidden() -> nn.Module:
    def ffn() -> nn.Module:
        inner = Body(lambda m, x: m.down(m.act(m.up(x))), **PAIR, act=nn.GELU)
        inner.act.register_forward_hook(lambda module, args, output: 0.5 * output)
        return inner

    return Stack(Block(ffn=ffn()), Block(ffn=ffn()))


@model(
    "stack.blocks.0.ffn",
    "stack.blocks.1.ffn",
    activation="gelu",
    note="buffers: one saved, one not, one that counts calls",
)
def buffers() -> nn.Module:
    class Counting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stack = Stack(Block(ffn=gelu_ffn()), Block(ffn=gelu_ffn()))
            self.register_buffer("calls", torch.zeros((), dtype=torch.long))
            self.register_buffer("shift", torch.randn(WIDTH), persistent=False)
            self.register_buffer("average", torch.zeros(WIDTH))

        def forward(self, x: Tensor) -> Tensor:
            if self.training:
                self.calls += 1
                self.average.mul_(0.9).add_(0.1 * x.detach().mean((0, 1)))
            return self.stack(x + self.shift - self.average)

    return Counting()


@model("ffn", count=1, activation="relu", note="a plain tensor attribute, neither parameter nor buffer")
def tensor_attribute() -> nn.Module:
    body = Body(lambda m, x: m.ffn(x * m.compute_scale), ffn=relu_ffn)
    object.__setattr__(body, "compute_scale", torch.rand(WIDTH))
    return body


# Wrappers -------------------------------------------------------------------------------------------------------------


@model(*SITES, activation="gelu", note="the model is a torch.fx graph of modules")
def symbolically_traced() -> nn.Module:
    class Ffn(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.act, self.down = nn.Linear(*UP), nn.GELU(), nn.Linear(*DOWN)

        def forward(self, x: Tensor) -> Tensor:
            return self.down(self.act(self.up(x)))

    return torch.fx.symbolic_trace(Stack(Block(ffn=Ffn()), Block(ffn=Ffn())))


@model(exact=False, note="the model is an exported program's module")
def exported() -> nn.Module:
    stack = Stack(Block(ffn=relu_ffn()), Block(ffn=relu_ffn())).eval()
    free = {0: torch.export.Dim.AUTO}
    program = torch.export.export(stack, sequence(2), dynamic_shapes=(free,), strict=False)
    return _AlwaysEval(program.module(check_guards=False))


class _AlwaysEval(nn.Module):
    """Hide that exported modules refuse `eval()`."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def train(self, mode: bool = True) -> _AlwaysEval:
        return self

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x)


@model(*SITES, activation="relu", note="submodules are compiled")
def compiled_submodule() -> nn.Module:
    return Stack(Block(ffn=torch.compile(relu_ffn(), backend="eager")), Block(ffn=relu_ffn()))


@model(*SITES, activation="relu", note="the model was deep-copied after sharing an activation")
def deep_copied() -> nn.Module:
    return copy.deepcopy(Stack(Block(ffn=relu_ffn()), Block(ffn=relu_ffn())))


CASES.mark_quick(["bfloat16", "float16", "checkpointed"])
