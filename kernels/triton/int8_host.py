"""Compute the operator with weights of 8 or 4 bits: choose kernels, sizes and buffers, and launch."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import triton
from torch import Tensor

from surgeon.kernels.int8_arguments import Int8Call, most_hidden, most_inputs
from surgeon.kernels.panels import MOST_TRUNK, PLACES, Int8Experts, Panels, group_size
from surgeon.kernels.triton import forward_kernels as _forward
from surgeon.kernels.triton import int8_kernels as _kernels
from surgeon.kernels.triton import launch
from surgeon.kernels.triton import plan as _plan
from surgeon.kernels.triton import tiles as _tiles
from surgeon.kernels.triton.decode_kernels import MOST_TOKENS
from surgeon.kernels.triton.plan import Plan

HIDDEN_BYTES = 512 * 2**20
"""The most bytes for hidden values, and for outputs of pairs that are not yet added up."""


def trunk(x: Tensor, x_scale: Tensor | None, fc1: Panels, fc1_scale: Tensor, fc1_bias: Tensor | None) -> Tensor:
    """Return what goes into the activation of a router's trunk: fc1 (x · x_scale) + fc1_bias, float32 [N, R].

    Args:
        x: [N, d_in], float32, float16 or bfloat16.
        x_scale, fc1, fc1_scale, fc1_bias: as `surgeon.kernels.int8` describes them.
    """
    (tokens, d_in), width = x.shape, len(fc1_scale)
    out = x.new_empty((tokens, width), dtype=torch.float32)
    if out.numel() == 0:
        return out
    q, scale = _rounded(x.contiguous(), x_scale, MOST_TRUNK, torch.int16)
    sizes = _tiles.trunk(tokens)
    launch.launch(
        _kernels.trunk,
        (triton.cdiv(tokens, sizes.rows), triton.cdiv(width, sizes.neurons)),
        *(q, scale, fc1.contiguous(), fc1_scale.contiguous(), _contiguous(fc1_bias), out, tokens, width, d_in),
        **sizes.constants("rows", "neurons", "depth"),
    )
    return out


def forward(call: Int8Call, scores: Tensor, threshold: Tensor, *, ordered: bool = False) -> Tensor:
    """Return what the operator gives for these scores: a new contiguous tensor [N, d_out] in the dtype of x.

    It only takes calls for which `backend.supports_int8` returns None. Sums over experts are accumulated in fp32.

    Args:
        call: its x may have any number of dimensions.
        scores: [N, E], float32; infinite for experts that always run.
        threshold: [N], float32.
        ordered: add up experts in a fixed order, so that equal inputs give equal bits.
    """
    x = call.x.reshape(-1, call.x.shape[-1]).contiguous()
    scores, threshold = scores.contiguous(), threshold.contiguous()
    call = call._replace(x_scale=_contiguous(call.x_scale), b2=_contiguous(call.b2))
    weights = Int8Experts(*(_contiguous(tensor) for tensor in call.experts))  # type: ignore[arg-type]
    if weights.float8:  # not every chip has the type
        gate = None if weights.gate is None else weights.gate.view(torch.uint8)
        weights = weights._replace(w1=weights.w1.view(torch.uint8), gate=gate, w2=weights.w2.view(torch.uint8))
    tokens, (experts, neurons), d_out = len(x), weights.w1_scale.shape, len(weights.y_scale)
    chip = launch.chip(x.device)
    decodes = tokens <= MOST_TOKENS and not ordered
    ordered = not decodes and (ordered or not _tiles.adds_atomically(chip, tokens, d_out))
    out = x.new_empty((tokens, d_out), dtype=x.dtype if ordered else torch.float32)
    if not ordered:
        out.zero_() if call.b2 is None else out.copy_(call.b2)
    if tokens:
        dtype = torch.float16 if call.experts.float8 else torch.int8
        q, scale = _rounded(x, call.x_scale, most_inputs(call), dtype)
        if decodes:
            _decode_into(out, q, scale, scores, threshold, weights, call)
        else:
            for part in _parts(tokens, experts * neurons * 4):
                plan = _plan.plan(
                    scores[part], threshold[part], _tiles.rows(chip, torch.int8, tokens), slot_of_pair=ordered
                )
                h = _hidden(q[part], scale[part], plan, weights, call)
                into = _ordered_sum if ordered else _add_outputs
                into(h, plan, weights, call, out[part])
    return out.to(x.dtype)


def _contiguous(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.contiguous()


def _parts(tokens: int, bytes_of_token: int) -> Iterator[slice]:
    """Ranges of tokens whose hidden values fit into `HIDDEN_BYTES` if all experts run."""
    step = max(MOST_TOKENS, HIDDEN_BYTES // bytes_of_token)
    return (slice(first, min(first + step, tokens)) for first in range(0, tokens, step))


def _rounded(x: Tensor, x_scale: Tensor | None, most: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Numbers [N, d_in] and their scales [N]."""
    (tokens, d_in), sizes = x.shape, _tiles.round_rows(x.shape[1])
    q, scale = torch.empty_like(x, dtype=dtype), x.new_empty(tokens, dtype=torch.float32)
    launch.launch(
        _kernels.round_rows,
        (tokens,),
        *(x, _contiguous(x_scale), q, scale, d_in),
        MOST=float(most),
        **sizes.constants("columns"),
    )
    return q, scale


def _run(columns: int, factors: Tensor | None) -> int:
    """How many places of 8 inputs share a factor of weights of 4 bits."""
    return 1 if factors is None else group_size(columns, factors.shape[2]) // PLACES


def _first(q: Tensor, weights: Int8Experts) -> tuple[list[Any], tuple[int, ...]]:
    """The tensors of the first product, and its sizes, as the kernels take them."""
    d_in, neurons, w = q.shape[1], weights.w1_scale.shape[1], weights
    run, gate_run = _run(d_in, w.w1_group), _run(d_in, w.gate_group)
    tensors = [w.w1, w.w1_scale, w.b1, w.gate, w.gate_scale, w.b_gate, w.w2_scale, w.w1_group, w.gate_group]
    return tensors, (neurons, d_in, run, gate_run)


def _decode_into(
    out: Tensor, q: Tensor, scale: Tensor, scores: Tensor, threshold: Tensor, weights: Int8Experts, call: Int8Call
) -> None:
    (tokens, experts), d_out = scores.shape, out.shape[1]
    tensors, (neurons, *rest) = _first(q, weights)
    h = q.new_empty((tokens, experts, neurons), dtype=torch.float32)
    compare, run = _plan.comparison_type(scores, threshold), _run(neurons, weights.w2_group)
    sizes = _tiles.decode_int8(d_out)
    launch.launch(
        _kernels.decode_hidden_int8,
        (experts * triton.cdiv(neurons, sizes.neurons),),
        *(q, scale, scores, threshold, *tensors, h, tokens, experts, neurons, *rest),
        ACTIVATION=call.activation,
        COMPARE=compare,
        **sizes.constants("rows", "neurons", "depth"),
    )
    launch.launch(
        _kernels.decode_combine_int8,
        (experts * triton.cdiv(d_out, sizes.columns),),
        *(h, scores, threshold, weights.w2, weights.y_scale, weights.w2_group, out),
        *(tokens, experts, neurons, d_out, run),
        MOST=float(most_hidden(call)),
        COMPARE=compare,
        **(sizes.constants("rows", "columns") | {"NEURONS": _tiles.depth_int8(neurons, sizes.depth // 2)}),
    )


def _hidden(q: Tensor, scale: Tensor, plan: Plan, weights: Int8Experts, call: Int8Call) -> Tensor:
    """The hidden values [slots, s], fp32."""
    chip, experts = launch.chip(q.device), len(weights.w1_scale)
    tensors, (neurons, *rest) = _first(q, weights)
    sizes = _tiles.hidden_int8(chip, plan.rows, neurons, gated=weights.gate is not None)
    h = q.new_empty((plan.token_of_slot.shape[0], neurons), dtype=torch.float32)
    launch.launch(
        _kernels.hidden_int8,
        (_tiles.programs(chip, sizes),),
        *(q, scale, *tensors, h, *plan.tiles(), experts, neurons, *rest),
        ACTIVATION=call.activation,
        **sizes.constants("rows", "neurons", "depth"),
    )
    return h


def _combine(
    h: Tensor, plan: Plan, weights: Int8Experts, call: Int8Call, out: Tensor, first: int, width: int, *, ordered: bool
) -> None:
    """Compute some columns of the outputs. Add them to the rows of the tokens, or if ordered write them to slots."""
    chip, (experts, neurons), d_out = launch.chip(h.device), weights.w1_scale.shape, len(weights.y_scale)
    sizes = _tiles.combine_int8(chip, plan.rows, neurons)
    launch.launch(
        _kernels.combine_int8,
        (_tiles.programs(chip, sizes),),
        *(h, weights.w2, weights.y_scale, weights.w2_group, out, *plan.tiles()),
        *(experts, neurons, d_out, first // sizes.columns, width, _run(neurons, weights.w2_group)),
        ORDERED=ordered,
        MOST=float(most_hidden(call)),
        **sizes.constants("rows", "neurons", "columns"),
    )


def _add_outputs(h: Tensor, plan: Plan, weights: Int8Experts, call: Int8Call, out: Tensor) -> None:
    """Add the outputs of pairs to the rows of their tokens, fp32."""
    _combine(h, plan, weights, call, out, 0, out.shape[1], ordered=False)


def _ordered_sum(h: Tensor, plan: Plan, weights: Int8Experts, call: Int8Call, out: Tensor) -> None:
    """Write the sum over the pairs of each token, plus b2, to `out`, always in the same order.

    The output of each pair is rounded to the dtype of `out`. Each step takes as many columns as there is room for.
    """
    (tokens, d_out), (slots, neurons), experts = out.shape, h.shape, len(weights.w1_scale)
    columns = _tiles.combine_int8(launch.chip(h.device), plan.rows, neurons).columns
    room = HIDDEN_BYTES // (slots * out.element_size()) // columns * columns
    step = min(d_out, max(columns, room))
    partial = torch.empty(slots * step, dtype=out.dtype, device=out.device)
    for first in range(0, d_out, step):
        width = min(step, d_out - first)
        some = partial[: slots * width].view(slots, width)
        _combine(h, plan, weights, call, some, first, width, ordered=True)
        sizes = _tiles.reduce(width)
        launch.launch(
            _forward.reduce,
            (tokens, triton.cdiv(width, sizes.columns)),
            *(some, plan.slot_of_pair, call.b2, out, experts, d_out, first, width),
            EXPERTS=sizes.rows,
            **sizes.constants("columns"),
        )
