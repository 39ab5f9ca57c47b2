"""Spellings of a gated FFN, `down(act(gate x) · up x)`, with separate and with fused projections."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import spelling
from .body import DOWN, FUSED, HIDDEN, UP, WIDTH, weight
from .case import Registry

CASES = Registry("gated")
ffn = partial(spelling.ffn, CASES)

THREE = {"gate": UP, "up": UP, "down": DOWN}
TWO = {"gate_up": FUSED, "down": DOWN}

# Separate projections -------------------------------------------------------------------------------------------------


@ffn("silu", gated=True, **THREE)
def swiglu(m: Any, x: Tensor) -> Tensor:
    return m.down(F.silu(m.gate(x)) * m.up(x))


@ffn("silu", gated=True, **THREE)
def swiglu_up_first(m: Any, x: Tensor) -> Tensor:
    up = m.up(x)
    return m.down(up * F.silu(m.gate(x)))


@ffn("silu", gated=True, gate=(WIDTH, HIDDEN, False), up=(WIDTH, HIDDEN, False), down=(HIDDEN, WIDTH, False))
def swiglu_without_bias(m: Any, x: Tensor) -> Tensor:
    return m.down(torch.mul(m.up(x), F.silu(m.gate(x))))


@ffn("silu", gated=True, gate=UP, up=(WIDTH, HIDDEN, False), down=(HIDDEN, WIDTH, False))
def swiglu_gate_bias_only(m: Any, x: Tensor) -> Tensor:
    return m.down(F.silu(m.gate(x)) * m.up(x))


@ffn("silu", gated=True, gate=(WIDTH, HIDDEN, False), up=UP, down=DOWN)
def swiglu_up_bias_only(m: Any, x: Tensor) -> Tensor:
    return m.down(F.silu(m.gate(x)) * m.up(x))


@ffn("silu", gated=True, **THREE)
def swiglu_composed(m: Any, x: Tensor) -> Tensor:
    gate = m.gate(x)
    return m.down(gate * torch.sigmoid(gate) * m.up(x))


@ffn("silu", gated=True, **THREE)
def swiglu_composed_associated_otherwise(m: Any, x: Tensor) -> Tensor:
    gate = m.gate(x)
    return m.down(torch.sigmoid(gate) * (gate * m.up(x)))


@ffn("silu", gated=True, **THREE)
def swiglu_in_place(m: Any, x: Tensor) -> Tensor:
    return m.down(F.silu(m.gate(x), inplace=True).mul_(m.up(x)))


@ffn("silu", gated=True, **THREE, drop=lambda: nn.Dropout(0.2))
def swiglu_dropout(m: Any, x: Tensor) -> Tensor:
    return m.drop(m.down(m.drop(F.silu(m.gate(x)) * m.up(x))))


@ffn("silu", gated=True, **THREE, drop=lambda: nn.Dropout(0.2))
def swiglu_dropout_on_gate(m: Any, x: Tensor) -> Tensor:
    return m.down(m.drop(F.silu(m.gate(x))) * m.up(x))


@ffn("silu", gated=True, w1=weight(WIDTH, HIDDEN), w2=weight(HIDDEN, WIDTH), w3=weight(WIDTH, HIDDEN))
def swiglu_matmul(m: Any, x: Tensor) -> Tensor:
    return (F.silu(x @ m.w1) * (x @ m.w3)) @ m.w2


@ffn("gelu_tanh", gated=True, w1=weight(2, WIDTH, HIDDEN), w2=weight(HIDDEN, WIDTH), required=False)
def geglu_einsum_stacked_weight(m: Any, x: Tensor) -> Tensor:
    gate, up = torch.einsum("btd,gdh->gbth", x, m.w1)
    return torch.einsum("bth,hd->btd", F.gelu(gate, approximate="tanh") * up, m.w2)


@ffn("relu", gated=True, **THREE)
def reglu(m: Any, x: Tensor) -> Tensor:
    return m.down(F.relu(m.gate(x)) * m.up(x))


@ffn("relu", gated=True, **THREE)
def reglu_masked(m: Any, x: Tensor) -> Tensor:
    gate = m.gate(x)
    return m.down(torch.where(gate > 0, gate, 0.0) * m.up(x))


@ffn("gelu", gated=True, **THREE)
def geglu(m: Any, x: Tensor) -> Tensor:
    return m.down(F.gelu(m.gate(x)) * m.up(x))


@ffn("gelu_tanh", gated=True, **THREE)
def geglu_tanh(m: Any, x: Tensor) -> Tensor:
    return m.down(F.gelu(m.gate(x), approximate="tanh") * m.up(x))


@ffn("relu2", gated=True, **THREE)
def relu2_glu(m: Any, x: Tensor) -> Tensor:
    return m.down(F.relu(m.gate(x)).square() * m.up(x))


@ffn("sigmoid", gated=True, **THREE)
def sigmoid_glu(m: Any, x: Tensor) -> Tensor:
    return m.down(m.up(x) * torch.sigmoid(m.gate(x)))


@ffn("identity", gated=True, **THREE)
def bilinear(m: Any, x: Tensor) -> Tensor:
    return m.down(m.gate(x) * m.up(x))


@ffn(None, gated=True, **THREE, note="silu but for a constant factor")
def swiglu_scaled(m: Any, x: Tensor) -> Tensor:
    return m.down(0.7 * F.silu(m.gate(x)) * m.up(x))


@ffn(None, gated=True, **THREE, required=False)
def swiglu_gate_scaled_inside(m: Any, x: Tensor) -> Tensor:
    return m.down(F.silu(m.gate(x) * 0.7) * m.up(x))


@ffn("silu", gated=True, **THREE)
def swiglu_in_float32(m: Any, x: Tensor) -> Tensor:
    return m.down(F.silu(m.gate(x).float()).to(x.dtype) * m.up(x))


@ffn(None, **THREE, gain=20.0, required=False, note="both factors clamped, and one is added to the linear one")
def swiglu_clamped_plus_one(m: Any, x: Tensor) -> Tensor:
    gate, up = m.gate(x).clamp(max=7.0), m.up(x).clamp(-7.0, 7.0)
    return m.down((up + 1) * (gate * torch.sigmoid(1.702 * gate)))


@ffn(None, **THREE, gain=20.0, required=False)
def swiglu_clamped(m: Any, x: Tensor) -> Tensor:
    return m.down(F.silu(m.gate(x).clamp(max=10.0)) * m.up(x).clamp(-10.0, 10.0))


@ffn(None, **THREE, required=False, note="an activation on either factor")
def both_activated(m: Any, x: Tensor) -> Tensor:
    return m.down(F.silu(m.gate(x)) * torch.tanh(m.up(x)))


@ffn(None, **THREE, required=False, note="the factor 1 + gate")
def one_plus_gate(m: Any, x: Tensor) -> Tensor:
    return m.down((1 + torch.tanh(m.gate(x))) * m.up(x))


@ffn(None, **THREE, required=False, note="not linear in either factor")
def divided_by_gate(m: Any, x: Tensor) -> Tensor:
    return m.down(m.up(x) / (1 + m.gate(x).abs()))


@ffn(None, **THREE, required=False, note="a sum, not a product")
def sum_of_two(m: Any, x: Tensor) -> Tensor:
    return m.down(F.relu(m.gate(x)) + m.up(x))


@ffn(None, **THREE, required=False, note="the larger of two linears")
def maxout(m: Any, x: Tensor) -> Tensor:
    return m.down(torch.maximum(m.gate(x), m.up(x)))


@ffn(None, **THREE, required=False, note="an interpolation by the gate")
def highway(m: Any, x: Tensor) -> Tensor:
    gate = torch.sigmoid(m.gate(x))
    return m.down(gate * F.relu(m.up(x)) + (1 - gate) * m.up(x))


@ffn(None, **THREE, third=UP, required=False, note="a product of three linears")
def three_factors(m: Any, x: Tensor) -> Tensor:
    return m.down(F.silu(m.gate(x)) * m.up(x) * m.third(x))


# Fused projections ----------------------------------------------------------------------------------------------------


@ffn("silu", gated=True, **TWO)
def fused_chunk(m: Any, x: Tensor) -> Tensor:
    gate, up = m.gate_up(x).chunk(2, dim=-1)
    return m.down(F.silu(gate) * up)


@ffn("silu", gated=True, **TWO)
def fused_chunk_up_first(m: Any, x: Tensor) -> Tensor:
    up, gate = torch.chunk(m.gate_up(x), 2, dim=2)
    return m.down(up * F.silu(gate))


@ffn("silu", gated=True, gate_up=(WIDTH, 2 * HIDDEN, False), down=(HIDDEN, WIDTH, False))
def fused_chunk_without_bias(m: Any, x: Tensor) -> Tensor:
    gate, up = m.gate_up(x).chunk(2, -1)
    return m.down(F.silu(gate) * up)


@ffn("gelu", gated=True, **TWO)
def fused_split(m: Any, x: Tensor) -> Tensor:
    up, gate = m.gate_up(x).split(HIDDEN, dim=-1)
    return m.down(F.gelu(gate) * up)


@ffn("gelu", gated=True, **TWO)
def fused_split_sizes(m: Any, x: Tensor) -> Tensor:
    gate, up = torch.split(m.gate_up(x), [HIDDEN, HIDDEN], dim=-1)
    return m.down(F.gelu(gate) * up)


@ffn("gelu", gated=True, **TWO)
def fused_tensor_split(m: Any, x: Tensor) -> Tensor:
    gate, up = m.gate_up(x).tensor_split(2, dim=-1)
    return m.down(F.gelu(gate) * up)


@ffn("silu", gated=True, **TWO)
def fused_slices(m: Any, x: Tensor) -> Tensor:
    h = m.gate_up(x)
    return m.down(F.silu(h[..., :HIDDEN]) * h[..., HIDDEN:])


@ffn("silu", gated=True, **TWO)
def fused_slices_second_is_gate(m: Any, x: Tensor) -> Tensor:
    h = m.gate_up(x)
    return m.down(h[:, :, :HIDDEN] * F.silu(h[:, :, -HIDDEN:]))


@ffn("silu", gated=True, **TWO)
def fused_narrow(m: Any, x: Tensor) -> Tensor:
    h = m.gate_up(x)
    return m.down(F.silu(h.narrow(-1, 0, HIDDEN)) * h.narrow(-1, HIDDEN, HIDDEN))


@ffn("silu", gated=True, **TWO)
def fused_unbind(m: Any, x: Tensor) -> Tensor:
    gate, up = m.gate_up(x).view(*x.shape[:-1], 2, HIDDEN).unbind(-2)
    return m.down(F.silu(gate) * up)


@ffn("silu", gated=True, **TWO)
def fused_select(m: Any, x: Tensor) -> Tensor:
    h = m.gate_up(x).unflatten(-1, (2, HIDDEN))
    return m.down(F.silu(h[..., 0, :]) * h[..., 1, :])


@ffn("silu", gated=True, **TWO)
def fused_interleaved(m: Any, x: Tensor) -> Tensor:
    h = m.gate_up(x)
    return m.down(F.silu(h[..., ::2]) * h[..., 1::2])


@ffn("silu", gated=True, **TWO)
def fused_interleaved_unbind(m: Any, x: Tensor) -> Tensor:
    gate, up = m.gate_up(x).reshape(*x.shape[:-1], HIDDEN, 2).unbind(-1)
    return m.down(F.silu(gate) * up)


@ffn("silu", gated=True, **TWO, required=False)
def fused_transposed_unbind(m: Any, x: Tensor) -> Tensor:
    gate, up = m.gate_up(x).view(*x.shape[:-1], 2, HIDDEN).permute(2, 0, 1, 3).unbind(0)
    return m.down(F.silu(gate) * up)


@ffn("sigmoid", gated=True, **TWO)
def fused_glu(m: Any, x: Tensor) -> Tensor:
    return m.down(F.glu(m.gate_up(x), dim=-1))


@ffn("sigmoid", gated=True, **TWO, glu=lambda: nn.GLU())
def fused_glu_module(m: Any, x: Tensor) -> Tensor:
    return m.down(m.glu(m.gate_up(x)))


@ffn("relu", gated=True, **TWO)
def fused_reglu(m: Any, x: Tensor) -> Tensor:
    gate, up = m.gate_up(x).chunk(2, dim=-1)
    return m.down(F.relu(gate) * up)


@ffn("identity", gated=True, **TWO)
def fused_bilinear(m: Any, x: Tensor) -> Tensor:
    gate, up = m.gate_up(x).chunk(2, dim=-1)
    return m.down(gate * up)


@ffn("silu", gated=True, w1=weight(WIDTH, 2 * HIDDEN), b1=weight(2 * HIDDEN), w2=weight(HIDDEN, WIDTH))
def fused_matmul(m: Any, x: Tensor) -> Tensor:
    gate, up = (x @ m.w1 + m.b1).chunk(2, dim=-1)
    return (F.silu(gate) * up) @ m.w2


@ffn(
    "silu", gated=True, w1=weight(WIDTH, 2 * HIDDEN), b1=weight(2 * HIDDEN), w2=weight(HIDDEN, WIDTH), b2=weight(WIDTH)
)
def fused_addmm(m: Any, x: Tensor) -> Tensor:
    gate, up = torch.addmm(m.b1, x.view(-1, WIDTH), m.w1).view(*x.shape[:-1], -1).chunk(2, dim=-1)
    h = F.silu(gate) * up
    return torch.addmm(m.b2, h.view(-1, HIDDEN), m.w2).view(x.shape)


@ffn("silu", gated=True, **TWO, required=False, note="a view of the projection is written in place")
def fused_written_in_place(m: Any, x: Tensor) -> Tensor:
    h = m.gate_up(x)
    h[..., HIDDEN:] *= F.silu(h[..., :HIDDEN])
    return m.down(h[..., HIDDEN:])


@ffn(None, gate_up=(WIDTH, 3 * HIDDEN), down=DOWN, required=False, note="a third of the projection is never used")
def fused_with_unused_third(m: Any, x: Tensor) -> Tensor:
    gate, up, _ = m.gate_up(x).chunk(3, dim=-1)
    return m.down(F.silu(gate) * up)


@ffn(None, gate_up=(WIDTH, HIDDEN + HIDDEN // 2), down=DOWN, required=False, note="the slices overlap")
def fused_overlapping(m: Any, x: Tensor) -> Tensor:
    h = m.gate_up(x)
    return m.down(F.silu(h[..., :HIDDEN]) * h[..., HIDDEN // 2 :])


@ffn(None, gate_up=UP, down=DOWN, required=False, note="either factor is the whole projection, in two orders")
def fused_with_flipped_self(m: Any, x: Tensor) -> Tensor:
    h = m.gate_up(x)
    return m.down(F.silu(h) * h.flip(-1))


@ffn(None, up=UP, down=(HIDDEN // 2, WIDTH), required=False, note="half of the projection, the rest is never used")
def half_of_projection(m: Any, x: Tensor) -> Tensor:
    return m.down(F.relu(m.up(x)[..., : HIDDEN // 2]))


@ffn(None, **TWO, required=False, note="split along tokens, not along neurons")
def split_along_tokens(m: Any, x: Tensor) -> Tensor:
    h = m.gate_up(torch.cat([x, x.flip(1)], dim=1))[..., :HIDDEN]
    first, second = h.chunk(2, dim=1)
    return m.down(F.silu(first) * second)


@ffn(None, up=UP, down=DOWN, required=False, note="gate and up are one linear")
def gate_is_up(m: Any, x: Tensor) -> Tensor:
    h = m.up(x)
    return m.down(F.silu(h) * h)


@ffn("relu_relu", gated=True, **THREE)
def relu_of_both(m: Any, x: Tensor) -> Tensor:
    return m.down(F.relu(m.gate(x)) * F.relu(m.up(x)))


CASES.mark_quick(
    [
        "relu_of_both",
        "swiglu",
        "swiglu_up_first",
        "swiglu_composed",
        "geglu",
        "bilinear",
        "swiglu_clamped",
        "three_factors",
        "fused_chunk",
        "fused_chunk_up_first",
        "fused_slices",
        "fused_unbind",
        "fused_interleaved",
        "fused_glu",
    ]
)
