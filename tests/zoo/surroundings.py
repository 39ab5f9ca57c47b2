"""Whole plain-torch models: what computes around the FFNs, torch.nn's own layers, and models without any FFN."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import layers
from .body import HIDDEN, OUTPUTS, TOKENS, WIDTH, Block, Body, Stack, randomize, sequence
from .case import Case, Registry
from .layers import HEADS, PAIR, attention, relu_ffn, rows, swiglu_ffn

CASES = Registry("surroundings")
model = partial(layers.model, CASES)


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


# torch.nn's own layers ----------------------------------------------------------------------------------------------


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


CASES.mark_quick(["batch_norm_around", "torch_encoder_relu", "torch_decoder", "pooler_and_classifier"])
