"""Kernels of the backward pass over tiles of a plan, with the arguments that `forward_kernels` describes.

First hidden values anew and the gradients of the pre-activations, per pair, into memory. From these
`forward_kernels.combine` adds up the gradient of x, and `grad_weight` those of the weights, one program owning each
block of a weight, without atomics.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator"
# ruff: noqa: N803, SIM102
# Triton gives parameters their types when it compiles; the only annotation it reads is `constexpr`, and those are
# constants. Conditions on them decide what is compiled, so each is a statement of its own.

import triton
import triton.language as tl

from .elementwise import activate, activate_backward
from .forward_kernels import project, rows_of


@triton.jit
def grad_hidden(
    grad, x, w1, b1, gate, b_gate, w2, h, grad_up, grad_z, start, first_tile, expert_of_tile, token_of_slot,
    E, s, d_in, d_out,
    ACTIVATION: tl.constexpr, ROWS: tl.constexpr, NEURONS: tl.constexpr, DEPTH: tl.constexpr,
    PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Write h (unless None) and the gradients of x w1ᵀ + b1 and, if gated, x gateᵀ + b_gate: all [slots, s]."""
    blocks = tl.cdiv(s, NEURONS)
    for item in range(tl.program_id(0).to(tl.int64), tl.load(first_tile + E) * blocks, tl.num_programs(0)):
        expert, slot, there, token = rows_of(item // blocks, start, first_tile, expert_of_tile, token_of_slot, ROWS)
        neuron = (item % blocks) * NEURONS + tl.arange(0, NEURONS)
        up, z = project(
            x + token * d_in, there, w1, b1, gate, b_gate, expert, neuron, s, d_in,
            ROWS, NEURONS, DEPTH, PRECISION, UPCAST,
        )  # fmt: skip
        grad_h, _ = project(
            grad + token * d_out, there, w2, None, None, None, expert, neuron, s, d_out,
            ROWS, NEURONS, DEPTH, PRECISION, UPCAST,
        )  # fmt: skip
        at = slot[:, None] * s + neuron[None, :]
        inside = there[:, None] & (neuron < s)[None, :]
        if gate is not None:
            a = activate(z, ACTIVATION)
            value = a * up
            up_gradient = grad_h * a
            z_gradient = activate_backward(grad_h * up, z, ACTIVATION)
            tl.store(grad_z + at, z_gradient.to(grad_z.dtype.element_ty), mask=inside)
        else:
            value = activate(up, ACTIVATION)
            up_gradient = activate_backward(grad_h, up, ACTIVATION)
        tl.store(grad_up + at, up_gradient.to(grad_up.dtype.element_ty), mask=inside)
        if h is not None:
            tl.store(h + at, value.to(h.dtype.element_ty), mask=inside)


@triton.jit
def grad_weight(
    factor, rows, grad_w, grad_b, start, token_of_slot, s, d,
    ROWS: tl.constexpr, NEURONS: tl.constexpr, COLUMNS: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """grad_w[e] = Σ over the pairs of expert e of factor[slot] ⊗ rows[token]; grad_b[e] = Σ factor[slot], unless None.

    factor [slots, s], rows [N, d], grad_w [E, s, d], grad_b [E, s]. A program for each expert and block of its weight;
    experts without a pair get zeros.
    """
    column_blocks = tl.cdiv(d, COLUMNS)
    neuron_blocks = tl.cdiv(s, NEURONS)
    column_block = tl.program_id(0) % column_blocks
    neuron_block = tl.program_id(0) // column_blocks % neuron_blocks
    expert = (tl.program_id(0) // column_blocks // neuron_blocks).to(tl.int64)
    column = column_block * COLUMNS + tl.arange(0, COLUMNS)
    neuron = neuron_block * NEURONS + tl.arange(0, NEURONS)
    end = tl.load(start + expert + 1)
    total = tl.zeros((NEURONS, COLUMNS), tl.float32)
    bias = tl.zeros((NEURONS,), tl.float32)
    for first in range(tl.load(start + expert), end, ROWS):
        slot = first + tl.arange(0, ROWS)
        there = slot < end
        token = tl.load(token_of_slot + slot, mask=there, other=0).to(tl.int64)
        f_inside = (neuron < s)[:, None] & there[None, :]
        f = tl.load(factor + slot[None, :] * s + neuron[:, None], mask=f_inside, other=0.0)
        r_inside = there[:, None] & (column < d)[None, :]
        r = tl.load(rows + token[:, None] * d + column[None, :], mask=r_inside, other=0.0)
        if UPCAST:
            f = f.to(tl.float32)
            r = r.to(tl.float32)
        if grad_b is not None:
            bias += tl.sum(f.to(tl.float32), 1)
        total = tl.dot(f, r, total, input_precision=PRECISION)
    w_row = expert * s + neuron
    inside = (neuron < s)[:, None] & (column < d)[None, :]
    tl.store(grad_w + w_row[:, None] * d + column[None, :], total.to(grad_w.dtype.element_ty), mask=inside)
    if grad_b is not None:
        if column_block == 0:
            tl.store(grad_b + w_row, bias.to(grad_b.dtype.element_ty), mask=neuron < s)
