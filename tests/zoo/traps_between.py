"""Traps that hold something between their linears: a norm, a reduction, another order of axes, a value from outside."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import traps
from .body import DOWN, FUSED, HIDDEN, TOKENS, UP, WIDTH, weight
from .case import Registry

CASES = Registry("between")
PAIR = {"up": UP, "down": DOWN}
trap = partial(traps.trap, registry=CASES)

# Something that is not elementwise stands between ---------------------------------------------------------------------


@trap("a layer norm stands between the linears", **PAIR, norm=lambda: nn.LayerNorm(HIDDEN))
def layer_norm_between(m: Any, x: Tensor) -> Tensor:
    return m.down(m.norm(F.gelu(m.up(x))))


@trap("a layer norm stands before the activation", **PAIR, norm=lambda: nn.LayerNorm(HIDDEN))
def layer_norm_before_activation(m: Any, x: Tensor) -> Tensor:
    return m.down(F.gelu(m.norm(m.up(x))))


@trap("an RMS norm stands between the linears", **PAIR, norm=lambda: nn.RMSNorm(HIDDEN))
def rms_norm_between(m: Any, x: Tensor) -> Tensor:
    return m.down(m.norm(F.gelu(m.up(x))))


@trap("a norm written out stands between the linears", **PAIR, scale=weight(HIDDEN))
def rms_norm_written_out(m: Any, x: Tensor) -> Tensor:
    h = F.relu(m.up(x)) ** 2
    return m.down(h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + 1e-6) * m.scale)


@trap("a batch norm stands between the linears", **PAIR, norm=lambda: nn.BatchNorm1d(HIDDEN))
def batch_norm_between(m: Any, x: Tensor) -> Tensor:
    return m.down(F.relu(m.norm(m.up(x).mT).mT))


@trap("a batch norm stands between the linears", **PAIR, norm=lambda: nn.BatchNorm1d(HIDDEN))
def batch_norm_between_on_rows(m: Any, x: Tensor) -> Tensor:
    return m.down(F.relu(m.norm(m.up(x.flatten(0, 1))))).view_as(x)


@trap("a group norm stands between the linears", **PAIR, norm=lambda: nn.GroupNorm(4, HIDDEN))
def group_norm_between(m: Any, x: Tensor) -> Tensor:
    return m.down(m.norm(F.relu(m.up(x)).mT).mT)


@trap("a global response norm stands between the linears", **PAIR, gamma=weight(HIDDEN), beta=weight(HIDDEN))
def global_response_norm_between(m: Any, x: Tensor) -> Tensor:
    h = F.gelu(m.up(x))
    norm = h.norm(dim=1, keepdim=True)
    return m.down(h + m.gamma * (h * (norm / (norm.mean(dim=-1, keepdim=True) + 1e-6))) + m.beta)


@trap("the hidden values are normalised to length one", **PAIR)
def unit_length_between(m: Any, x: Tensor) -> Tensor:
    return m.down(F.normalize(F.relu(m.up(x)), dim=-1))


@trap(
    "a depthwise convolution over tokens stands between",
    **PAIR,
    conv=lambda: nn.Conv1d(HIDDEN, HIDDEN, 3, 1, 1, 1, HIDDEN),
)
def depthwise_convolution_between(m: Any, x: Tensor) -> Tensor:
    return m.down(F.gelu(m.conv(m.up(x).mT).mT))


@trap("a softmax over neurons stands between, as in attention over a memory", **PAIR)
def softmax_between(m: Any, x: Tensor) -> Tensor:
    return m.down(torch.softmax(m.up(x), dim=-1))


@trap("a softmax over tokens stands between", **PAIR)
def softmax_over_tokens_between(m: Any, x: Tensor) -> Tensor:
    return m.down(torch.softmax(m.up(x), dim=1))


@trap("a cumulative sum over tokens stands between", **PAIR)
def cumsum_over_tokens_between(m: Any, x: Tensor) -> Tensor:
    return m.down(torch.cumsum(F.relu(m.up(x)), dim=1))


@trap("a cumulative sum over neurons stands between", **PAIR)
def cumsum_over_neurons_between(m: Any, x: Tensor) -> Tensor:
    return m.down(torch.cumsum(F.relu(m.up(x)), dim=-1))


@trap("a maximum over neighbouring tokens stands between", **PAIR, pool=lambda: nn.MaxPool1d(3, 1, 1))
def max_pool_between(m: Any, x: Tensor) -> Tensor:
    return m.down(m.pool(F.relu(m.up(x)).mT).mT)


@trap("a maximum over pairs of neurons stands between", up=UP, down=(HIDDEN // 2, WIDTH))
def maxout_between(m: Any, x: Tensor) -> Tensor:
    return m.down(m.up(x).unflatten(-1, (HIDDEN // 2, 2)).amax(dim=-1))


@trap("only the largest hidden values pass", **PAIR)
def top_k_between(m: Any, x: Tensor) -> Tensor:
    h = F.relu(m.up(x))
    values, places = h.topk(4, dim=-1)
    return m.down(torch.zeros_like(h).scatter(-1, places, values))


@trap("the threshold is the token's own k-th value", **PAIR)
def k_winners_between(m: Any, x: Tensor) -> Tensor:
    h = F.relu(m.up(x))
    return m.down(torch.where(h >= h.kthvalue(HIDDEN - 4, dim=-1, keepdim=True).values, h, 0.0))


@trap("the hidden values are sorted", **PAIR)
def sort_between(m: Any, x: Tensor) -> Tensor:
    return m.down(F.relu(m.up(x)).sort(dim=-1).values)


@trap("neighbouring tokens are mixed", **PAIR)
def token_shift_between(m: Any, x: Tensor) -> Tensor:
    h = F.relu(m.up(x))
    return m.down(h + torch.roll(h, 1, dims=1))


@trap("tokens are averaged", **PAIR)
def token_mean_between(m: Any, x: Tensor) -> Tensor:
    return m.down(F.relu(m.up(x)).mean(dim=1, keepdim=True)).expand_as(x)


@trap("gelu of the sum over tokens", **PAIR)
def difference_to_token_mean_between(m: Any, x: Tensor) -> Tensor:
    h = m.up(x)
    return m.down(F.gelu(h - h.mean(dim=1, keepdim=True)))


@trap("values of the batch are mixed", **PAIR)
def batch_shift_between(m: Any, x: Tensor) -> Tensor:
    return m.down(F.relu(m.up(x)).flip(0))


@trap(
    "half of the hidden values are projected over tokens and gate the rest", up=FUSED, down=DOWN, mix=(TOKENS, TOKENS)
)
def spatial_gating_between(m: Any, x: Tensor) -> Tensor:
    a, b = F.gelu(m.up(x)).chunk(2, dim=-1)
    return m.down(a * m.mix(b.mT).mT)


@trap(
    "the channels are weighted by a function of all of them",
    certain=False,
    **PAIR,
    squeeze=(HIDDEN, 6),
    excite=(6, HIDDEN),
)
def squeeze_excite_between(m: Any, x: Tensor) -> Tensor:
    h = F.relu(m.up(x))
    return m.down(h * torch.sigmoid(m.excite(F.relu(m.squeeze(h.mean(dim=1, keepdim=True))))))


# The axes or the order of neurons change between ----------------------------------------------------------------------


@trap("the neurons are shuffled between", certain=False, **PAIR)
def channel_shuffle_between(m: Any, x: Tensor) -> Tensor:
    h = F.relu(m.up(x)).unflatten(-1, (4, HIDDEN // 4))
    return m.down(h.transpose(-1, -2).reshape(*x.shape[:-1], HIDDEN))


@trap("the neurons are reversed between", certain=False, **PAIR)
def flip_between(m: Any, x: Tensor) -> Tensor:
    return m.down(F.relu(m.up(x)).flip(-1))


@trap("the neurons are permuted between", certain=False, **PAIR, order=lambda: torch.randperm(HIDDEN))
def permutation_between(m: Any, x: Tensor) -> Tensor:
    return m.down(F.relu(m.up(x))[..., m.order])


@trap("the neurons are rotated between", certain=False, **PAIR)
def roll_between(m: Any, x: Tensor) -> Tensor:
    return m.down(F.relu(m.up(x)).roll(3, dims=-1))


@trap("the tokens become channels between", up=(WIDTH, WIDTH), down=(TOKENS, TOKENS))
def transpose_between(m: Any, x: Tensor) -> Tensor:
    return m.down(F.relu(m.up(x)).mT).mT


@trap("the second linear reads two tokens at once", up=UP, down=(2 * HIDDEN, 2 * WIDTH))
def tokens_merged_between(m: Any, x: Tensor) -> Tensor:
    x = torch.cat([x, x[:, :1]], dim=1)
    h = F.relu(m.up(x)).reshape(x.shape[0], (TOKENS + 1) // 2, 2 * HIDDEN)
    return m.down(h).reshape(x.shape)[:, :TOKENS]


@trap("each token's hidden values are read in two parts", up=UP, down=(HIDDEN // 2, WIDTH // 2))
def tokens_divided_between(m: Any, x: Tensor) -> Tensor:
    h = F.relu(m.up(x)).reshape(x.shape[0], 2 * TOKENS, HIDDEN // 2)
    return m.down(h).reshape(x.shape)


@trap("the hidden values of batch and tokens change places", certain=False, **PAIR)
def batch_and_tokens_swapped_between(m: Any, x: Tensor) -> Tensor:
    h = F.relu(m.up(x)).transpose(0, 1).reshape(x.shape[0], x.shape[1], HIDDEN)
    return m.down(h)


# Other values enter between -------------------------------------------------------------------------------------------


@trap("a learned threshold for each neuron stands between", **PAIR, threshold=weight(HIDDEN))
def learned_threshold_between(m: Any, x: Tensor) -> Tensor:
    h = m.up(x)
    return m.down(torch.where(h > m.threshold, h, 0.0))


@trap("the activation has a learned number", **PAIR, beta=lambda: nn.Parameter(torch.tensor(1.3)))
def swish_with_learned_beta(m: Any, x: Tensor) -> Tensor:
    h = m.up(x)
    return m.down(h * torch.sigmoid(m.beta * h))


@trap("the activation has learned numbers", **PAIR, a=weight(1), b=weight(1))
def xielu(m: Any, x: Tensor) -> Tensor:
    h, p, n = m.up(x), F.softplus(m.a), F.softplus(m.b) + 0.5
    return m.down(torch.where(h > 0, p * h * h + 0.5 * h, n * torch.expm1(h.clamp(max=-1e-6)) - n * h + 0.5 * h))


@trap("a residual joins inside", up=(WIDTH, WIDTH), down=(WIDTH, WIDTH))
def residual_between(m: Any, x: Tensor) -> Tensor:
    return m.down(F.relu(m.up(x)) + x)


@trap("a residual joins inside, times the input", up=(WIDTH, WIDTH), down=(WIDTH, WIDTH))
def gated_by_input(m: Any, x: Tensor) -> Tensor:
    return m.down(F.silu(m.up(x)) * x)


@trap("a position embedding is added inside", **PAIR, position=weight(TOKENS, HIDDEN))
def position_between(m: Any, x: Tensor) -> Tensor:
    return m.down(F.relu(m.up(x) + m.position))


@trap("shift and scale of each neuron depend on the input", **PAIR, shift=UP, scale=UP)
def conditioned_between(m: Any, x: Tensor) -> Tensor:
    pooled = x.mean(dim=1, keepdim=True)
    return m.down(F.gelu(m.up(x)) * (1 + m.scale(pooled)) + m.shift(pooled))


@trap("a mask of the tokens is multiplied in", certain=False, **PAIR)
def token_mask_between(m: Any, x: Tensor) -> Tensor:
    keep = (x[..., :1] > 0).to(x.dtype)
    return m.down(F.relu(m.up(x)) * keep)


@trap("concatenated with the input", up=UP, down=(HIDDEN + WIDTH, WIDTH))
def concatenated_with_input(m: Any, x: Tensor) -> Tensor:
    return m.down(torch.cat([F.relu(m.up(x)), x], dim=-1))


@trap("every neuron enters with both signs", up=UP, down=(2 * HIDDEN, WIDTH))
def concatenated_with_negative(m: Any, x: Tensor) -> Tensor:
    h = m.up(x)
    return m.down(F.relu(torch.cat([h, -h], dim=-1)))


@trap("two first linears are concatenated", certain=False, up=UP, other=UP, down=(2 * HIDDEN, WIDTH))
def two_linears_concatenated(m: Any, x: Tensor) -> Tensor:
    return m.down(F.relu(torch.cat([m.up(x), m.other(x)], dim=-1)))


@trap("gate and up read different inputs", gate=UP, **PAIR, norm=lambda: nn.LayerNorm(WIDTH))
def gate_reads_other_input(m: Any, x: Tensor) -> Tensor:
    return m.down(F.silu(m.gate(m.norm(x))) * m.up(x))


@trap("the gate is that of the first token", gate=UP, **PAIR)
def gate_of_first_token(m: Any, x: Tensor) -> Tensor:
    return m.down(F.silu(m.gate(x))[:, :1] * m.up(x))


@trap("the gate is that of the previous token", gate=UP, **PAIR)
def gate_of_previous_token(m: Any, x: Tensor) -> Tensor:
    return m.down(F.silu(m.gate(x)).roll(1, dims=1) * m.up(x))


@trap("the gate is pooled over tokens", gate=UP, **PAIR)
def gate_pooled(m: Any, x: Tensor) -> Tensor:
    return m.down(torch.sigmoid(m.gate(x.mean(dim=1, keepdim=True))) * m.up(x))


@trap("one gate for all neurons", gate=(WIDTH, 1), **PAIR)
def gate_for_all_neurons(m: Any, x: Tensor) -> Tensor:
    return m.down(torch.sigmoid(m.gate(x)) * F.relu(m.up(x)))


@trap("one gate for four neurons", gate=(WIDTH, HIDDEN // 4), **PAIR)
def gate_for_groups(m: Any, x: Tensor) -> Tensor:
    return m.down(torch.sigmoid(m.gate(x)).repeat_interleave(4, dim=-1) * m.up(x))


@trap("the input is overwritten between gate and up", gate=UP, **PAIR)
def input_overwritten_between_gate_and_up(m: Any, x: Tensor) -> Tensor:
    x = x.clone()
    gate = m.gate(x)
    x.mul_(2.0)
    return m.down(F.silu(gate) * m.up(x))


@trap("the input is overwritten after the first linear read it", certain=False, **PAIR)
def input_overwritten_after_first_linear(m: Any, x: Tensor) -> Tensor:
    x = x.clone()
    h = m.up(x)
    x += 1.0
    return m.down(F.relu(h)) + x


@trap("the output is overwritten in place", certain=False, **PAIR)
def output_overwritten(m: Any, x: Tensor) -> Tensor:
    y = m.down(F.relu(m.up(x)))
    y.mul_(0.5).add_(x)
    return y


@trap("the pre-activation is overwritten through a view of it", certain=False, **PAIR)
def hidden_overwritten_through_view(m: Any, x: Tensor) -> Tensor:
    h = m.up(x)
    h[..., :4] = 0.0
    return m.down(F.relu(h))


@trap("the pre-activation of one token is overwritten", certain=False, **PAIR)
def token_overwritten_through_view(m: Any, x: Tensor) -> Tensor:
    h = m.up(x)
    h[:, 0].mul_(2.0)
    return m.down(F.relu(h))


CASES.mark_quick(
    [
        "layer_norm_between",
        "softmax_between",
        "top_k_between",
        "channel_shuffle_between",
        "tokens_merged_between",
        "learned_threshold_between",
        "residual_between",
        "gate_reads_other_input",
        "input_overwritten_between_gate_and_up",
        "hidden_overwritten_through_view",
    ]
)
