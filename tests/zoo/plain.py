"""Spellings of an FFN of two linears in plain torch."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import spelling
from .body import DOWN, HIDDEN, UP, WIDTH, weight
from .case import Registry
from .functions import COMMON, UNCOMMON, Function

CASES = Registry("plain")
spell, ffn = partial(spelling.spell, CASES), partial(spelling.ffn, CASES)

# Activations ----------------------------------------------------------------------------------------------------------


def _around(function: Function) -> Function:
    return lambda m, x: m.down(function(m.up(x)))


for _name, (_activation, _function) in COMMON.items():
    spell(_name, _around(_function), _activation, up=UP, down=DOWN)
for _name, _function in UNCOMMON.items():
    spell(_name, _around(_function), None, up=UP, down=DOWN, gain=20.0, required=False)
spell("rrelu", _around(nn.RReLU().eval()), None, up=UP, down=DOWN, required=False)


class _Relu(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, h: Tensor) -> Tensor:
        ctx.save_for_backward(h)
        return h.clamp(min=0)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        (h,) = ctx.saved_tensors
        return grads[0] * (h > 0)


spell("relu_autograd_function", _around(_Relu.apply), "relu", up=UP, down=DOWN)

# What may stand between activation and second linear ------------------------------------------------------------------


@ffn("gelu", up=UP, down=DOWN, drop=lambda: nn.Dropout(0.3))
def dropout_module(m: Any, x: Tensor) -> Tensor:
    return m.drop(m.down(m.drop(F.gelu(m.up(x)))))


@ffn("gelu", up=UP, down=DOWN, drop=lambda: nn.Dropout(0.3))
def dropout_before_activation(m: Any, x: Tensor) -> Tensor:
    return m.down(F.gelu(m.drop(m.up(x))))


@ffn("relu", up=UP, down=DOWN)
def dropout_function(m: Any, x: Tensor) -> Tensor:
    return m.down(F.dropout(F.relu(m.up(x)), 0.1, training=m.training))


@ffn("relu", up=UP, down=DOWN)
def dropout_function_inplace(m: Any, x: Tensor) -> Tensor:
    return m.down(F.dropout(F.relu(m.up(x)), 0.1, m.training, True))


@ffn("relu", up=UP, down=DOWN, drop=lambda: nn.Dropout(0.0))
def dropout_zero(m: Any, x: Tensor) -> Tensor:
    return m.down(m.drop(F.relu(m.up(x))))


@ffn("relu", up=UP, down=DOWN, drop=lambda: nn.Dropout(0.3))
def dropout_twice(m: Any, x: Tensor) -> Tensor:
    return m.down(m.drop(m.drop(F.relu(m.up(x)))))


@ffn(
    "relu", up=UP, down=DOWN, drop=lambda: nn.AlphaDropout(0.3), required=False, note="not a plain dropout in training"
)
def dropout_alpha(m: Any, x: Tensor) -> Tensor:
    return m.down(m.drop(F.relu(m.up(x))))


@ffn("relu", up=UP, down=DOWN, required=False, note="a dropout that is never switched off has a random eval output")
def dropout_with_unit_keep(m: Any, x: Tensor) -> Tensor:
    return m.down(F.dropout(F.relu(m.up(x)), 0.0, training=True))


@ffn("silu", up=UP, down=DOWN)
def silu_multiplied_in_place(m: Any, x: Tensor) -> Tensor:
    h = m.up(x)
    h *= torch.sigmoid(h)
    return m.down(h)


@ffn("relu", up=UP, down=DOWN)
def no_ops_between(m: Any, x: Tensor) -> Tensor:
    return m.down(F.relu(m.up(x).contiguous()).clone().to(x.dtype).view(*x.shape[:-1], HIDDEN))


@ffn("relu", up=UP, down=DOWN)
def flattened_between(m: Any, x: Tensor) -> Tensor:
    h = F.relu(m.up(x))
    return m.down(h.reshape(-1, HIDDEN)).view(x.shape)


@ffn("relu", up=UP, down=DOWN)
def flattened_around(m: Any, x: Tensor) -> Tensor:
    return m.down(F.relu(m.up(x.flatten(0, 1)))).unflatten(0, x.shape[:2])


@ffn("relu", up=UP, down=DOWN, required=False)
def unsqueezed_between(m: Any, x: Tensor) -> Tensor:
    return m.down(F.relu(m.up(x)).unsqueeze(1)).squeeze(1)


@ffn("relu", up=UP, down=DOWN, required=False)
def transposed_and_back_between(m: Any, x: Tensor) -> Tensor:
    return m.down(F.relu(m.up(x).transpose(0, 1)).transpose(0, 1))


@ffn("gelu", up=UP, down=DOWN)
def scaled_output(m: Any, x: Tensor) -> Tensor:
    return m.down(F.gelu(m.up(x))) * 2.0


@ffn(None, up=UP, down=DOWN, note="the activation is gelu but for a constant factor")
def scaled_hidden(m: Any, x: Tensor) -> Tensor:
    return m.down(F.gelu(m.up(x)) * 0.7)


@ffn(None, up=UP, down=DOWN, required=False)
def scaled_before_activation(m: Any, x: Tensor) -> Tensor:
    return m.down(F.gelu(m.up(x) * 0.7))


@ffn("relu", up=UP, down=DOWN)
def residual_inside(m: Any, x: Tensor) -> Tensor:
    return x + m.down(F.relu(m.up(x)))


@ffn("relu", up=UP, down=DOWN, norm=lambda: nn.LayerNorm(WIDTH))
def norm_inside(m: Any, x: Tensor) -> Tensor:
    return m.norm(m.down(F.relu(m.up(m.norm(x)))) + x)


# Linears --------------------------------------------------------------------------------------------------------------


@ffn("relu", up=(WIDTH, HIDDEN, False), down=(HIDDEN, WIDTH, False))
def no_bias(m: Any, x: Tensor) -> Tensor:
    return m.down(F.relu(m.up(x)))


@ffn("relu", up=UP, down=(HIDDEN, WIDTH, False))
def first_bias_only(m: Any, x: Tensor) -> Tensor:
    return m.down(F.relu(m.up(x)))


@ffn("relu", up=(WIDTH, HIDDEN, False), down=DOWN)
def second_bias_only(m: Any, x: Tensor) -> Tensor:
    return m.down(F.relu(m.up(x)))


@ffn("gelu", w1=weight(WIDTH, HIDDEN), b1=weight(HIDDEN), w2=weight(HIDDEN, WIDTH), b2=weight(WIDTH))
def addmm_on_rows(m: Any, x: Tensor) -> Tensor:
    h = F.gelu(torch.addmm(m.b1, x.view(-1, WIDTH), m.w1).view(*x.shape[:-1], HIDDEN))
    return torch.addmm(m.b2, h.view(-1, HIDDEN), m.w2).view(x.shape)


@ffn("gelu", w1=weight(WIDTH, HIDDEN), b1=weight(HIDDEN), w2=weight(HIDDEN, WIDTH), b2=weight(WIDTH))
def addmm_kept_flat(m: Any, x: Tensor) -> Tensor:
    h = F.gelu(torch.addmm(m.b1, x.reshape(-1, WIDTH), m.w1))
    return torch.addmm(m.b2, h, m.w2).reshape(x.shape)


@ffn(None, w1=weight(WIDTH, HIDDEN), b1=weight(HIDDEN), w2=weight(HIDDEN, WIDTH), b2=weight(WIDTH), required=False)
def addmm_with_factors(m: Any, x: Tensor) -> Tensor:
    h = F.relu(torch.addmm(m.b1, x.reshape(-1, WIDTH), m.w1, beta=0.5, alpha=2.0))
    return torch.addmm(m.b2, h, m.w2, beta=2.0, alpha=0.5).reshape(x.shape)


@ffn("relu", w1=weight(WIDTH, HIDDEN), b1=weight(HIDDEN), w2=weight(HIDDEN, WIDTH), b2=weight(WIDTH))
def matmul_then_add(m: Any, x: Tensor) -> Tensor:
    return F.relu(x @ m.w1 + m.b1) @ m.w2 + m.b2


@ffn("relu", w1=weight(WIDTH, HIDDEN), b1=weight(HIDDEN), w2=weight(HIDDEN, WIDTH), b2=weight(WIDTH))
def add_then_matmul_order_swapped(m: Any, x: Tensor) -> Tensor:
    return m.b2 + torch.matmul(F.relu(torch.add(m.b1, torch.matmul(x, m.w1))), m.w2)


@ffn("relu", w1=weight(WIDTH, HIDDEN), b1=weight(HIDDEN), w2=weight(HIDDEN, WIDTH))
def matmul_add_in_place(m: Any, x: Tensor) -> Tensor:
    h = x @ m.w1
    h += m.b1
    return F.relu_(h) @ m.w2


@ffn("silu", w1=weight(WIDTH, HIDDEN), w2=weight(HIDDEN, WIDTH))
def matmul_without_bias(m: Any, x: Tensor) -> Tensor:
    return torch.matmul(F.silu(torch.matmul(x, m.w1)), m.w2)


@ffn("relu", w1=weight(HIDDEN, WIDTH), w2=weight(WIDTH, HIDDEN))
def matmul_transposed(m: Any, x: Tensor) -> Tensor:
    return F.relu(x @ m.w1.t()) @ m.w2.T


@ffn("relu", w1=weight(HIDDEN, WIDTH), w2=weight(WIDTH, HIDDEN))
def matmul_transposed_axes(m: Any, x: Tensor) -> Tensor:
    return F.relu(x @ m.w1.transpose(-2, -1)) @ m.w2.permute(1, 0)


@ffn("relu", w1=weight(WIDTH, HIDDEN), b1=weight(HIDDEN), w2=weight(HIDDEN, WIDTH), b2=weight(WIDTH))
def linear_with_transposed_weight(m: Any, x: Tensor) -> Tensor:
    return F.linear(F.relu(F.linear(x, m.w1.t(), m.b1)), m.w2.t(), m.b2)


@ffn("gelu", w1=weight(WIDTH, HIDDEN), b1=weight(HIDDEN), w2=weight(HIDDEN, WIDTH), b2=weight(WIDTH))
def einsum(m: Any, x: Tensor) -> Tensor:
    h = F.gelu(torch.einsum("bsd,dh->bsh", x, m.w1) + m.b1)
    return torch.einsum("bsh,hd->bsd", h, m.w2) + m.b2


@ffn("gelu", w1=weight(HIDDEN, WIDTH), w2=weight(WIDTH, HIDDEN))
def einsum_weight_first(m: Any, x: Tensor) -> Tensor:
    return torch.einsum("di,bti->btd", m.w2, F.gelu(torch.einsum("fe,bte->btf", m.w1, x)))


@ffn("gelu", w1=weight(WIDTH, HIDDEN), w2=weight(HIDDEN, WIDTH))
def einsum_ellipsis(m: Any, x: Tensor) -> Tensor:
    return torch.einsum("...h,hd->...d", F.gelu(torch.einsum("...d,dh->...h", x, m.w1)), m.w2)


@ffn(None, w1=weight(WIDTH, HIDDEN), w2=weight(HIDDEN, WIDTH), required=False)
def einsum_hidden_first(m: Any, x: Tensor) -> Tensor:
    return torch.einsum("hbs,hd->bsd", F.relu(torch.einsum("bsd,dh->hbs", x, m.w1)), m.w2)


@ffn(None, w1=weight(WIDTH, HIDDEN), w2=weight(HIDDEN, WIDTH), required=False)
def tensordot(m: Any, x: Tensor) -> Tensor:
    return torch.tensordot(F.relu(torch.tensordot(x, m.w1, dims=1)), m.w2, dims=([-1], [0]))


@ffn(None, w1=weight(HIDDEN, WIDTH), w2=weight(WIDTH, HIDDEN), required=False)
def weight_on_the_left(m: Any, x: Tensor) -> Tensor:
    return (m.w2 @ F.relu(m.w1 @ x.mT)).mT


@ffn(None, w1=weight(WIDTH, HIDDEN), w2=weight(HIDDEN, WIDTH), required=False)
def batched_matmul(m: Any, x: Tensor) -> Tensor:
    batch = x.shape[0]
    return torch.bmm(F.relu(torch.bmm(x, m.w1.expand(batch, -1, -1))), m.w2.expand(batch, -1, -1))


@ffn(None, up=UP, down=DOWN, bias=weight(HIDDEN), required=False, note="two biases on the first linear")
def second_bias_added(m: Any, x: Tensor) -> Tensor:
    return m.down(F.relu(m.up(x) + m.bias))


@ffn("relu", up=lambda: nn.Linear(WIDTH, HIDDEN).requires_grad_(False), down=DOWN)
def frozen_first_linear(m: Any, x: Tensor) -> Tensor:
    return m.down(F.relu(m.up(x)))


@ffn(None, w1=lambda: torch.randn(HIDDEN, WIDTH), w2=lambda: torch.randn(WIDTH, HIDDEN), required=False)
def weights_as_buffers(m: Any, x: Tensor) -> Tensor:
    return F.linear(F.relu(F.linear(x, m.w1)), m.w2)


@ffn(None, w=weight(2, HIDDEN, WIDTH), required=False, note="both weights are slices of one parameter")
def weights_sliced_from_one(m: Any, x: Tensor) -> Tensor:
    return F.linear(F.relu(F.linear(x, m.w[0])), m.w[1].t())


@ffn(None, w1=weight(HIDDEN, WIDTH), down=DOWN, required=False, note="the weight is computed in the forward pass")
def weight_standardized(m: Any, x: Tensor) -> Tensor:
    return m.down(F.relu(F.linear(x, m.w1 / m.w1.norm(dim=1, keepdim=True))))


@ffn(None, w1=weight(HIDDEN, WIDTH), down=DOWN, required=False)
def weight_scaled(m: Any, x: Tensor) -> Tensor:
    return m.down(F.relu(F.linear(x, m.w1 * 0.5)))


@ffn("relu", w1=weight(HIDDEN, WIDTH), w2=weight(WIDTH, HIDDEN))
def weight_cast_to_same_dtype(m: Any, x: Tensor) -> Tensor:
    return F.linear(F.relu(F.linear(x, m.w1.to(x.dtype))), m.w2.to(x.dtype))


@ffn("relu", w1=lambda: nn.Parameter(torch.randn(WIDTH, HIDDEN).t() * 0.2), down=DOWN)
def weight_not_contiguous(m: Any, x: Tensor) -> Tensor:
    return m.down(F.relu(F.linear(x, m.w1)))


@ffn(
    None, up=UP, down=DOWN, a=(WIDTH, 4, False), b=(4, HIDDEN, False), required=False, note="an adapter beside the FFN"
)
def low_rank_adapter(m: Any, x: Tensor) -> Tensor:
    return m.down(F.relu(m.up(x) + 0.5 * m.b(m.a(x))))


@ffn("relu", up=UP, down=DOWN, a=(HIDDEN, 4, False), b=(4, WIDTH, False), required=False)
def low_rank_adapter_on_second(m: Any, x: Tensor) -> Tensor:
    h = F.relu(m.up(x))
    return m.down(h) + m.b(m.a(h))


@ffn(None, up=lambda: nn.Conv1d(WIDTH, HIDDEN, 1), down=lambda: nn.Conv1d(HIDDEN, WIDTH, 1), required=False)
def pointwise_convolution(m: Any, x: Tensor) -> Tensor:
    return m.down(F.relu(m.up(x.transpose(1, 2)))).transpose(1, 2)


@ffn("relu", w=lambda: nn.ParameterList([torch.randn(HIDDEN, WIDTH), torch.randn(WIDTH, HIDDEN)]))
def parameter_list(m: Any, x: Tensor) -> Tensor:
    return F.linear(F.relu(F.linear(x, m.w[0])), m.w[1])


@ffn("relu", w=lambda: nn.ParameterDict({"into": torch.randn(HIDDEN, WIDTH), "out": torch.randn(WIDTH, HIDDEN)}))
def parameter_dict(m: Any, x: Tensor) -> Tensor:
    return F.linear(F.relu(F.linear(x, m.w["into"])), m.w["out"])


@ffn("relu", up=UP, down=DOWN)
def functional_call(m: Any, x: Tensor) -> Tensor:
    h = torch.func.functional_call(m.up, dict(m.up.named_parameters()), (x,))
    return torch.func.functional_call(m.down, dict(m.down.named_parameters()), (F.relu(h),))


# Parameters between the linears that only scale the neurons, or their negative values ---------------------------------


@ffn("relu", up=UP, down=DOWN, scale=weight(HIDDEN))
def learned_scale_between(m: Any, x: Tensor) -> Tensor:
    return m.down(F.relu(m.up(x)) * m.scale)


@ffn("relu", up=UP, down=DOWN, scale=lambda: torch.rand(HIDDEN))
def fixed_scale_between(m: Any, x: Tensor) -> Tensor:
    return m.down(F.relu(m.up(x)) * m.scale)


@ffn("gelu", up=UP, down=DOWN, mask=lambda: torch.arange(HIDDEN) % 3 > 0)
def pruned_neurons(m: Any, x: Tensor) -> Tensor:
    return m.down(F.gelu(m.up(x)).masked_fill(~m.mask, 0.0))


@ffn(None, up=UP, down=DOWN, act=lambda: nn.PReLU(HIDDEN))
def prelu_per_neuron(m: Any, x: Tensor) -> Tensor:
    return m.down(m.act(m.up(x).mT).mT)


@ffn(None, up=UP, down=DOWN, act=nn.PReLU)
def prelu_single(m: Any, x: Tensor) -> Tensor:
    return m.down(m.act(m.up(x)))


@ffn(None, up=UP, down=DOWN, leak=lambda: nn.Parameter(torch.zeros(1, 1)))
def leak_learned_now_zero(m: Any, x: Tensor) -> Tensor:
    h = m.up(x)
    return m.down(torch.where(h > 0, h, m.leak * h))


CASES.mark_quick(
    [
        "learned_scale_between",
        "prelu_per_neuron",
        "relu_module",
        "relu_function_inplace",
        "relu_where",
        "gelu_module",
        "gelu_erf",
        "gelu_special_erf",
        "gelu_tanh_module",
        "gelu_tanh_pow",
        "quick_gelu_inplace",
        "silu_sigmoid",
        "relu2_square",
        "relu_in_float64",
        "relu_steeper_beyond_30",
        "gelu_clamped_at_10",
        "identity_in_disguise",
        "dropout_module",
        "dropout_function_inplace",
        "flattened_between",
        "scaled_hidden",
        "no_bias",
        "addmm_on_rows",
        "matmul_then_add",
        "linear_with_transposed_weight",
        "einsum",
        "weight_standardized",
        "low_rank_adapter",
    ]
)
