"""Compute forward, backward and thresholds: choose the kernels with their sizes and buffers, and launch them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
import triton
from torch import Tensor

from surgeon.kernels.experts import Experts, Gradients
from surgeon.kernels.gpu_model.cost import Way
from surgeon.kernels.triton import backward_kernels as _backward
from surgeon.kernels.triton import decode_kernels as _decode
from surgeon.kernels.triton import forward_kernels as _forward
from surgeon.kernels.triton import launch
from surgeon.kernels.triton import plan as _plan
from surgeon.kernels.triton import threshold_kernels as _thresholds
from surgeon.kernels.triton import tiles as _tiles
from surgeon.kernels.triton.plan import Plan

PARTIAL_BYTES = 512 * 2**20
"""The most bytes for outputs of pairs that are not yet added up. The host does not know how many there will be."""

_LEAST_COLUMNS = 128  # of these outputs at a time


class _Hidden(NamedTuple):
    """For every slot [slots, s]: the gradients of x w1ᵀ + b1 and of x gateᵀ + b_gate, and the hidden values."""

    up: Tensor
    gate: Tensor | None
    h: Tensor | None


def forward(
    x: Tensor,
    scores: Tensor,
    threshold: Tensor,
    experts: Experts,
    b2: Tensor | None,
    activation: str,
    *,
    way: Way = "experts",
    ordered: bool = False,
) -> Tensor:
    """Return Σ over selected experts of h_e w2_e, plus b2: a new contiguous tensor [N, d_out] in the dtype of `x`.

    It only takes arguments for which `backend.supports` returns None. Sums over experts are accumulated in fp32. Hidden
    values are rounded to the dtype of `x` between the two products, as in the dense FFN. fp32 is multiplied in TF32 if
    PyTorch may (`torch.backends.cuda.matmul`).

    Args:
        x: [N, d_in].
        scores: [N, E], any floating dtype.
        threshold: [N], any floating dtype.
        experts: the weights, same dtype as `x`.
        b2: [d_out] or None.
        activation: one of `elementwise.ACTIVATIONS`.
        way: what is computed expert by expert, and what densely.
        ordered: add up experts in a fixed order, so that equal inputs give equal bits. Dense products always do.
    """
    x, scores, threshold = x.contiguous(), scores.contiguous(), threshold.contiguous()
    experts, chip = _contiguous(experts), launch.chip(x.device)
    (tokens, _), (count, neurons, _), d_out = x.shape, experts.w1.shape, experts.w2.shape[2]
    if way != "experts" and tokens:
        if way == "masked":
            h = _masked(x, scores, threshold, experts, activation)
        else:
            h = _hidden(x, _plan.plan(scores, threshold, _rows(x)), experts, activation, spread=True)
        return F.linear(h.view(tokens, count * neurons), experts.flat().w2.t(), b2)
    decodes = tokens <= _decode.MOST_TOKENS and not ordered
    if not decodes and (ordered or not _tiles.adds_atomically(chip, tokens, d_out)):
        ordered_out = x.new_empty(tokens, d_out)
        for part in _parts(scores, d_out, x.element_size()):
            plan = _plan.plan(scores[part], threshold[part], _rows(x), slot_of_pair=True)
            h = _hidden(x[part], plan, experts, activation)
            _ordered_sum(plan, [(h, experts.w2)], b2, ordered_out[part])
        return ordered_out
    out = torch.empty(tokens, d_out, dtype=torch.float32, device=x.device)
    out.zero_() if b2 is None else out.copy_(b2)
    if tokens == 0:
        pass
    elif decodes:
        _decode_into(out, x, scores, threshold, experts, activation)
    else:
        plan = _plan.plan(scores, threshold, _rows(x))
        if _tiles.fuses(chip, x.dtype, tokens, count, neurons, plan.rows, gated=experts.gate is not None):
            _fused_into(out, x, plan, experts, activation)
        else:
            _add_products(plan, [(_hidden(x, plan, experts, activation), experts.w2)], out)
    return out.to(x.dtype)


def backward(
    grad: Tensor,
    x: Tensor,
    scores: Tensor,
    threshold: Tensor,
    experts: Experts,
    activation: str,
    need_x: bool = True,
    need_weights: bool = True,
    *,
    way: Way = "experts",
    ordered: bool = False,
) -> Gradients:
    """Return the gradients of `x` and the weights for `grad`, the gradient of the output [N, d_out].

    The arguments are those of `forward`, which need not be called first. Gradients that are not needed are None. Every
    `way` except expert by expert is masked. `ordered` concerns the gradient of `x`: those of the weights are always
    reproducible.
    """
    grad, x, scores, threshold = (t.contiguous() for t in (grad, x, scores, threshold))
    experts = _contiguous(experts)
    if way != "experts" and len(x):
        return _masked_backward(grad, x, scores, threshold, experts, activation, need_x, need_weights)
    ordered = ordered or not _tiles.adds_atomically(launch.chip(x.device), *x.shape)
    grad_x = torch.empty_like(x) if need_x else None
    grads = None
    if need_weights:
        # Without tokens nothing is launched; otherwise every element is written.
        new = torch.zeros_like if x.shape[0] == 0 else torch.empty_like
        grads = Experts(*(None if t is None else new(t) for t in experts))  # type: ignore[arg-type]
    parts = list(_parts(scores, x.shape[1], x.element_size())) if need_x and ordered else []
    if grad_x is not None and len(parts) > 1:
        for part in parts:
            plan = _plan.plan(scores[part], threshold[part], _rows(x), slot_of_pair=True)
            found = _grad_hidden(grad[part], x[part], plan, experts, activation, need_h=False)
            _ordered_sum(plan, _into_x(found, experts), None, grad_x[part])
    whole = grad_x if len(parts) <= 1 else None
    if x.shape[0] and (grads is not None or whole is not None):
        plan = _plan.plan(scores, threshold, _rows(x), slot_of_pair=whole is not None and ordered)
        found = _grad_hidden(grad, x, plan, experts, activation, need_h=need_weights)
        if whole is not None and ordered:
            _ordered_sum(plan, _into_x(found, experts), None, whole)
        elif whole is not None:
            total = torch.zeros(x.shape, dtype=torch.float32, device=x.device)
            _add_products(plan, _into_x(found, experts), total)
            whole.copy_(total)
        if grads is not None:
            _grad_weight(plan, found.up, x, grads.w1, grads.b1)
            _grad_weight(plan, found.gate, x, grads.gate, grads.b_gate)
            _grad_weight(plan, found.h, grad, grads.w2, None)
    return Gradients(grad_x, *(grads or [None] * 5))


def sorted_threshold(scores: Tensor, tau: Tensor, rule: str) -> Tensor:
    """Compute `surgeon::sorted_threshold` without sorting, for scores that `backend.sorts` accepts.

    Args:
        scores: [..., E], float32, not negative.
        tau: a scalar, float32.
        rule: "cumulative", "energy" or "top_k".
    """
    scores, count = scores.contiguous(), scores.shape[-1]
    out = scores.new_empty(scores.shape[:-1])
    sizes = _tiles.scores(count)
    launch.launch(
        _thresholds.sorted_threshold, (out.numel(),), scores, tau, out, count, RULE=rule, **sizes.constants("columns")
    )
    return out


def _contiguous(experts: Experts) -> Experts:
    return Experts(*(None if t is None else t.contiguous() for t in experts))  # type: ignore[arg-type]


def _rows(x: Tensor) -> int:
    return _tiles.rows(launch.chip(x.device), x.dtype, x.shape[0])


def _parts(scores: Tensor, width: int, size: int) -> Iterator[slice]:
    """Ranges of tokens for which a few columns of every pair fit into `PARTIAL_BYTES`. `size`: bytes per element."""
    tokens, experts = scores.shape
    step = max(_decode.MOST_TOKENS, PARTIAL_BYTES // (experts * min(width, _LEAST_COLUMNS) * size))
    return (slice(first, min(first + step, tokens)) for first in range(0, tokens, step))


def _arithmetic(x: Tensor) -> dict[str, Any]:
    return {"PRECISION": launch.precision(x.dtype, launch.chip(x.device).backend), "UPCAST": launch.upcasts(x.dtype)}


def _decode_into(out: Tensor, x: Tensor, scores: Tensor, threshold: Tensor, experts: Experts, activation: str) -> None:
    (tokens, d_in), (count, neurons, _), d_out = x.shape, experts.w1.shape, out.shape[1]
    sizes = _tiles.decode(launch.chip(x.device), x.dtype, tokens, neurons, gated=experts.gate is not None)
    grid = (count * triton.cdiv(neurons, sizes.neurons),)
    tensors = (x, scores, threshold, *experts, out)
    how: dict[str, Any] = {"ACTIVATION": activation, "COMPARE": _plan.comparison_type(scores, threshold)}
    if tokens == 1:
        how |= sizes.constants("neurons", "depth", "columns")
        launch.launch(_decode.decode_one, grid, *tensors, neurons, d_in, d_out, **how)
    else:
        how |= sizes.constants("rows", "neurons", "depth", "columns") | _arithmetic(x)
        launch.launch(_decode.decode_tokens, grid, *tensors, tokens, count, neurons, d_in, d_out, **how)


def _fused_into(out: Tensor, x: Tensor, plan: Plan, experts: Experts, activation: str) -> None:
    (count, neurons, d_in), d_out, chip = experts.w1.shape, out.shape[1], launch.chip(x.device)
    sizes = _tiles.fused(chip, x.dtype, plan.rows, neurons, gated=experts.gate is not None)
    launch.launch(
        _forward.fused,
        (_tiles.programs(chip, sizes),),
        *(x, *experts, out, *plan.tiles(), count, neurons, d_in, d_out),
        ACTIVATION=activation,
        **sizes.constants("rows", "neurons", "depth", "columns"),
        **_arithmetic(x),
    )


def _hidden(x: Tensor, plan: Plan, experts: Experts, activation: str, *, spread: bool = False) -> Tensor:
    """The hidden values [slots, s], or [N, E, s] with zeros if `spread`: as much memory as in the dense FFN."""
    (count, neurons, d_in), chip = experts.w1.shape, launch.chip(x.device)
    products = 1 if experts.gate is None else 2
    sizes = _tiles.hidden(chip, x.dtype, plan.rows, neurons, products=products, spread=spread)
    h = x.new_zeros(x.shape[0], count, neurons) if spread else x.new_empty(plan.token_of_slot.shape[0], neurons)
    launch.launch(
        _forward.hidden,
        (_tiles.programs(chip, sizes),),
        *(x, *experts[:4], h, *plan.tiles(), count, neurons, d_in),
        ACTIVATION=activation,
        SPREAD=spread,
        **sizes.constants("rows", "neurons", "depth"),
        **_arithmetic(x),
    )
    return h


def _masked(x: Tensor, scores: Tensor, threshold: Tensor, experts: Experts, activation: str) -> Tensor:
    """The hidden values [N, E · s] of the dense FFN, zero for experts that do not run."""
    neurons, flat = experts.w1.shape[1], experts.flat()
    h = F.linear(x, flat.w1, flat.b1)
    z = None if flat.gate is None else F.linear(x, flat.gate, flat.b_gate)
    _mask(_forward.mask, (h, z), scores, threshold, neurons, activation)
    return h


def _masked_backward(
    grad: Tensor,
    x: Tensor,
    scores: Tensor,
    threshold: Tensor,
    experts: Experts,
    activation: str,
    need_x: bool,
    need_weights: bool,
) -> Gradients:
    """All gradients by products of the dense FFN, with what does not run cleared between them."""
    flat = experts.flat()
    up, grad_up = F.linear(x, flat.w1, flat.b1), F.linear(grad, flat.w2)
    grad_z = None if flat.gate is None else F.linear(x, flat.gate, flat.b_gate)
    _mask(_backward.grad_mask, (grad_up, up, grad_z), scores, threshold, experts.w1.shape[1], activation)
    h = up
    grad_x = None
    if need_x:
        grad_x = grad_up @ flat.w1
        if grad_z is not None and flat.gate is not None:
            grad_x.addmm_(grad_z, flat.gate)
    if not need_weights:
        return Gradients(grad_x, *[None] * 5)

    def weight(factor: Tensor | None, rows: Tensor, like: Tensor | None) -> Tensor | None:
        return None if factor is None or like is None else (factor.t() @ rows).view_as(like)

    def bias(factor: Tensor | None, like: Tensor | None) -> Tensor | None:
        return None if factor is None or like is None else factor.sum(0).view_as(like)

    w1, gate, w2 = weight(grad_up, x, experts.w1), weight(grad_z, x, experts.gate), weight(h, grad, experts.w2)
    return Gradients(grad_x, w1, bias(grad_up, experts.b1), gate, bias(grad_z, experts.b_gate), w2)


def _mask(
    kernel: Any, tensors: tuple[Tensor | None, ...], scores: Tensor, threshold: Tensor, neurons: int, activation: str
) -> None:
    """Run a kernel over the hidden values [N, E · s] of all tokens. The first of `tensors` holds them."""
    tokens, count = scores.shape
    sizes = _tiles.mask(count * neurons)
    launch.launch(
        kernel,
        (tokens, triton.cdiv(count * neurons, sizes.columns)),
        *(*tensors, scores, threshold, count),
        ACTIVATION=activation,
        COMPARE=_plan.comparison_type(scores, threshold),
        S=neurons,
        **sizes.constants("columns"),
    )


def _grad_hidden(grad: Tensor, x: Tensor, plan: Plan, experts: Experts, activation: str, *, need_h: bool) -> _Hidden:
    """The gradients of the pre-activations, and the hidden values if needed."""
    (count, neurons, d_in), d_out, chip = experts.w1.shape, grad.shape[1], launch.chip(x.device)
    sizes = _tiles.hidden(chip, x.dtype, plan.rows, neurons, products=2 if experts.gate is None else 3)
    grad_up = x.new_empty(plan.token_of_slot.shape[0], neurons)
    grad_z = None if experts.gate is None else torch.empty_like(grad_up)
    h = torch.empty_like(grad_up) if need_h else None
    launch.launch(
        _backward.grad_hidden,
        (_tiles.programs(chip, sizes),),
        *(grad, x, *experts, h, grad_up, grad_z, *plan.tiles(), count, neurons, d_in, d_out),
        ACTIVATION=activation,
        **sizes.constants("rows", "neurons", "depth"),
        **_arithmetic(x),
    )
    return _Hidden(grad_up, grad_z, h)


def _into_x(found: _Hidden, experts: Experts) -> list[tuple[Tensor, Tensor]]:
    """The products whose sum is the gradient of x."""
    pairs = (found.up, experts.w1), (found.gate, experts.gate)
    return [(g, w) for g, w in pairs if g is not None and w is not None]


def _add_products(plan: Plan, products: list[tuple[Tensor, Tensor]], out: Tensor) -> None:
    """Add Σ h w over one or two products to the rows of the tokens, fp32."""
    _combine(plan, products, out, 0, out.shape[1], ordered=False)


def _combine(
    plan: Plan, products: list[tuple[Tensor, Tensor]], out: Tensor, first: int, width: int, *, ordered: bool
) -> None:
    """Compute some columns of Σ h w. Add them to the rows of the tokens, or if ordered write them to the slots'."""
    (h, w), (h_gate, w_gate) = products[0], products[1] if len(products) > 1 else (None, None)
    (count, neurons, d), chip = w.shape, launch.chip(h.device)
    sizes = _tiles.combine(chip, h.dtype, plan.rows, neurons, products=len(products), ordered=ordered)
    launch.launch(
        _forward.combine,
        (_tiles.programs(chip, sizes),),
        *(h, w, h_gate, w_gate, out, *plan.tiles(), count, neurons, d, first, width),
        ORDERED=ordered,
        **sizes.constants("rows", "neurons", "columns"),
        **_arithmetic(h),
    )


def _ordered_sum(plan: Plan, products: list[tuple[Tensor, Tensor]], bias: Tensor | None, out: Tensor) -> None:
    """Write the sum over the pairs of each token, plus a bias, to `out`, always in the same order.

    The output of each pair is rounded to the dtype of `out`. Each step takes as many columns as there is room for.
    """
    (tokens, d), count, slots = out.shape, products[0][1].shape[0], plan.token_of_slot.shape[0]
    room = PARTIAL_BYTES // (slots * out.element_size()) // _LEAST_COLUMNS * _LEAST_COLUMNS
    step = min(d, max(_LEAST_COLUMNS, room))
    partial = torch.empty(slots * step, dtype=out.dtype, device=out.device)
    for first in range(0, d, step):
        width = min(step, d - first)
        _combine(plan, products, partial[: slots * width].view(slots, width), first, width, ordered=True)
        sizes = _tiles.reduce(width)
        launch.launch(
            _forward.reduce,
            (tokens, triton.cdiv(width, sizes.columns)),
            *(partial, plan.slot_of_pair, bias, out, count, d, first, width),
            EXPERTS=sizes.rows,
            **sizes.constants("columns"),
        )


def _grad_weight(plan: Plan, factor: Tensor | None, rows: Tensor, grad_w: Tensor | None, grad_b: Tensor | None) -> None:
    """Write Σ factor ⊗ rows over the pairs of each expert. An FFN without a gate writes nothing for it."""
    if factor is None or grad_w is None:
        return
    count, neurons, d = grad_w.shape
    sizes = _tiles.grad_weight(launch.chip(rows.device), rows.dtype, neurons)
    launch.launch(
        _backward.grad_weight,
        (count * triton.cdiv(neurons, sizes.neurons) * triton.cdiv(d, sizes.columns),),
        *(factor, rows, grad_w, grad_b, plan.start, plan.token_of_slot, neurons, d),
        **sizes.constants("rows", "neurons", "columns"),
        **_arithmetic(rows),
    )
