"""Whole plain-torch models: their inputs and outputs, number formats, modes, and torch.nn's own layers."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from . import layers
from .body import DOWN, HIDDEN, OUTPUTS, SITES, TOKENS, UP, WIDTH, Block, Body, Stack, randomize, sequence
from .case import Case, Registry
from .layers import HEADS, PAIR, Language, attention, gelu_ffn, relu_ffn, rows, swiglu_ffn, tokens

CASES = Registry("surroundings")
model = partial(layers.model, CASES)

# Inputs and outputs ---------------------------------------------------------------------------------------------------


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


# Number formats, modes and regions ------------------------------------------------------------------------------------


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


@model(
    "2", "5", count=2, activation="relu", inputs=lambda b: (torch.randn(b, WIDTH),), note="batch norms around the FFNs"
)
def batch_norm_around() -> nn.Module:
    return nn.Sequential(
        nn.Linear(WIDTH, WIDTH), nn.BatchNorm1d(WIDTH), relu_ffn(), nn.BatchNorm1d(WIDTH), nn.Identity(), relu_ffn()
    )  # fmt: skip


@model("ffn", count=1, activation="relu", note="the batch norm uses the batch's statistics in evaluation too")
def batch_norm_without_running_statistics() -> nn.Module:
    norm = lambda: nn.BatchNorm1d(WIDTH, track_running_stats=False)  # noqa: E731
    return Body(lambda m, x: m.ffn(m.norm(x.mT).mT), norm=norm, ffn=relu_ffn)


@model(
    "ffn", count=1, activation="relu", note="weights are standardised by a batch norm that is always in training mode"
)
def convolution_with_standardized_weight() -> nn.Module:
    def forward(m: Any, x: Tensor) -> Tensor:
        w = m.conv.weight
        standard = F.batch_norm(w.flatten(1).unsqueeze(0), None, None, training=True, momentum=0.0).view_as(w)
        return m.ffn(F.conv1d(x.mT, standard, m.conv.bias).mT)

    return Body(forward, conv=lambda: nn.Conv1d(WIDTH, WIDTH, 3, padding=1), ffn=relu_ffn)


@model("ffn", count=1, activation="relu")
def instance_norm() -> nn.Module:
    return Body(lambda m, x: m.ffn(m.norm(x.mT).mT), norm=lambda: nn.InstanceNorm1d(WIDTH, affine=True), ffn=relu_ffn)


@model("ffn", count=1, activation="relu", inputs=lambda b: (torch.randn(b, 3, 16, 16),))
def convolutional_stem() -> nn.Module:
    def forward(m: Any, x: Tensor) -> Tensor:
        x = F.max_pool2d(F.relu(m.norm(m.conv(x))), 2).flatten(2).mT
        return m.head(x + m.ffn(x)).mean(1)

    return Body(
        forward,
        conv=lambda: nn.Conv2d(3, WIDTH, 3),
        norm=lambda: nn.BatchNorm2d(WIDTH),
        ffn=relu_ffn,
        head=(WIDTH, OUTPUTS),
    )


@model("ffn", count=1, activation="relu")
def recurrent_stem() -> nn.Module:
    return Body(
        lambda m, x: m.ffn(m.lstm(x)[0]),
        lstm=lambda: nn.LSTM(WIDTH, WIDTH, 2, batch_first=True, dropout=0.1),
        ffn=relu_ffn,
    )


@model("ffn", count=1, activation="relu")
def complex_numbers_around() -> nn.Module:
    def forward(m: Any, x: Tensor) -> Tensor:
        z = torch.view_as_complex(x.unflatten(-1, (-1, 2)))
        turned = torch.view_as_real(z * torch.polar(torch.ones_like(z.real), z.real)).flatten(2)
        return m.ffn(turned + torch.fft.fft(x, dim=1).real)

    return Body(forward, ffn=relu_ffn)


@model("ffn", count=1, activation="relu", note="a plain tensor attribute, neither parameter nor buffer")
def tensor_attribute() -> nn.Module:
    body = Body(lambda m, x: m.ffn(x * m.compute_scale), ffn=relu_ffn)
    object.__setattr__(body, "compute_scale", torch.rand(WIDTH))
    return body


# torch.nn's own layers and wrappers -----------------------------------------------------------------------------------


def _encoder(**options: Any) -> nn.Module:
    layer = nn.TransformerEncoderLayer(WIDTH, HEADS, HIDDEN, **{"batch_first": True, **options})
    return nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)


ENCODERS: dict[str, tuple[str, dict[str, Any]]] = {
    "relu": ("relu", {}),
    "gelu": ("gelu", {"activation": "gelu"}),
    "norm_first": ("relu", {"norm_first": True}),
    "norm_first_gelu_no_bias": ("gelu", {"norm_first": True, "activation": F.gelu, "bias": False}),
    "silu": ("silu", {"activation": F.silu}),
    "batch_second": ("relu", {"batch_first": False}),
}
for _kind, (_activation, _options) in ENCODERS.items():
    CASES.add(
        Case(
            name=f"torch_encoder_{_kind}",
            build=lambda options=_options: randomize(_encoder(**options)).eval(),  # type: ignore[misc]
            inputs=sequence,
            required=("layers.0", "layers.1"),
            activation=_activation,
        )
    )


@model("layers.0", "layers.1", activation="relu", inputs=lambda b: {
    "src": torch.randn(b, TOKENS, WIDTH), "src_key_padding_mask": torch.arange(TOKENS).expand(b, -1) >= 4,
})  # fmt: skip
def torch_encoder_padded() -> nn.Module:
    return _encoder()


@model(
    "layers.0",
    "layers.1",
    activation="relu",
    inputs=lambda b: (torch.randn(b, TOKENS, WIDTH), torch.randn(b, 3, WIDTH)),
)
def torch_decoder() -> nn.Module:
    return nn.TransformerDecoder(nn.TransformerDecoderLayer(WIDTH, HEADS, HIDDEN, batch_first=True), 2)


@model(count=4, activation="gelu", inputs=lambda b: (torch.randn(b, TOKENS, WIDTH), torch.randn(b, 3, WIDTH)))
def torch_transformer() -> nn.Module:
    return nn.Transformer(WIDTH, HEADS, 2, 2, HIDDEN, activation="gelu", batch_first=True)


@model("ffn", count=1, activation="relu")
def torch_multihead_attention() -> nn.Module:
    def forward(m: Any, x: Tensor) -> Tensor:
        attended, weights = m.attn(x, x, x, need_weights=True)
        return m.ffn(x + attended) + weights.mean()

    return Body(forward, attn=lambda: nn.MultiheadAttention(WIDTH, HEADS, batch_first=True), ffn=relu_ffn)


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


@model(
    "expert.0", "expert.1", count=2, activation="silu", gated=True, note="a dense mixture: experts are FFNs, all run"
)
def dense_mixture() -> nn.Module:
    def forward(m: Any, x: Tensor) -> Tensor:
        share = torch.softmax(m.router(x), dim=-1)
        return sum(expert(x) * share[..., i : i + 1] for i, expert in enumerate(m.expert))

    root = Body(forward, router=(WIDTH, 2))
    root.add_module("expert", nn.ModuleList([swiglu_ffn(), swiglu_ffn()]))
    return root


@model("mix.0", "mix.1", count=2, activation="relu2", note="RWKV's channel mixing: relu² inside a sigmoid gate")
def channel_mixing() -> nn.Module:
    def mix() -> nn.Module:
        def forward(m: Any, x: Tensor) -> Tensor:
            shifted = F.pad(x, (0, 0, 1, -1))
            k, r = x * m.mk + shifted * (1 - m.mk), x * m.mr + shifted * (1 - m.mr)
            return x + torch.sigmoid(m.r(r)) * m.down(torch.square(F.relu(m.up(k))))

        scale = lambda: nn.Parameter(torch.rand(WIDTH))  # noqa: E731
        return Body(forward, **PAIR, r=(WIDTH, WIDTH), mk=scale, mr=scale)

    root = Body(lambda m, x: m.mix[1](m.mix[0](x)))
    root.add_module("mix", nn.ModuleList([mix(), mix()]))
    return root


@model(count=0, inputs=rows)
def one_linear_only() -> nn.Module:
    return nn.Linear(WIDTH, OUTPUTS)


@model(count=0, inputs=rows)
def no_linear() -> nn.Module:
    return nn.Sequential(nn.LayerNorm(WIDTH), nn.ReLU())


@model(count=0, inputs=rows, note="a BERT pooler with its classifier")
def pooler_and_classifier() -> nn.Module:
    return nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh(), nn.Dropout(0.1), nn.Linear(WIDTH, OUTPUTS))


@model(count=0, note="one dense linear for each side of an attention")
def attention_only() -> nn.Module:
    return Stack(Block(attn=attention()), Block(attn=attention()))


@model("ffn", count=1, untraceable="what it runs depends on the values of the input")
def data_dependent_branch() -> nn.Module:
    return Body(lambda m, x: m.ffn(x) if x.sum() > 0 else x, ffn=relu_ffn)


CASES.mark_quick(
    [
        "output_dict",
        "keyword_only_inputs",
        "none_as_input",
        "bfloat16",
        "float16",
        "checkpointed",
        "batch_norm_around",
        "torch_encoder_relu",
        "torch_decoder",
        "pooler_and_classifier",
    ]
)
