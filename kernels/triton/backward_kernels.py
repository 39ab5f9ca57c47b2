"""The kernels of the backward pass over tiles of a plan, with the arguments that `forward_kernels` describes.

First `grad_hidden` writes the hidden values again and the gradients of the pre-activations, for each pair. From these
`forward_kernels.combine` adds up the gradient of x, and `grad_weight` the gradients of the weights. There one program
owns each block of a weight, so no atomics are needed. With dense products, `grad_mask` between them replaces all this.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator"
# ruff: noqa: N803, SIM102
# Triton gives parameters their types when it compiles; the only annotation it reads is `constexpr`, and those are
# constants. Conditions on them decide what is compiled, so each is a statement of its own.

import triton
import triton.language as tl

from surgeon.kernels.triton.elementwise import gated_activation, gated_backward
from surgeon.kernels.triton.forward_kernels import neurons_of, project, rows_of


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
        up_gradient, z_gradient = gated_backward(grad_h, up, z, gate, ACTIVATION)
        if gate is not None:
            tl.store(grad_z + at, z_gradient.to(grad_z.dtype.element_ty), mask=inside)
        tl.store(grad_up + at, up_gradient.to(grad_up.dtype.element_ty), mask=inside)
        if h is not None:
            value = gated_activation(up, z, gate, ACTIVATION)
            tl.store(h + at, value.to(h.dtype.element_ty), mask=inside)


@triton.jit
def grad_mask(
    grad_h, up, z, scores, threshold, E,
    ACTIVATION: tl.constexpr, COMPARE: tl.constexpr, S: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Compute what `grad_hidden` writes, in place of dense products [N, E · S]; 0 where an expert does not run.

    up = x w1ᵀ + b1 becomes h, and grad_h becomes the gradient of up. z = x gateᵀ + b_gate, unless None, becomes its own
    gradient. There is one program for each token and block of COLUMNS. Neurons that do not run are not read.
    """
    token = tl.program_id(0).to(tl.int64)
    at, known, on = neurons_of(token, scores, threshold, E, COMPARE, S, COLUMNS)
    g = tl.load(grad_h + at, mask=on, other=0.0).to(tl.float32)
    u = tl.load(up + at, mask=on, other=0.0).to(tl.float32)
    v = u
    if z is not None:
        v = tl.load(z + at, mask=on, other=0.0).to(tl.float32)
    # All activations are 0 at 0, and so are gradients of 0.
    u_gradient, v_gradient = gated_backward(g, u, v, z, ACTIVATION)
    tl.store(up + at, gated_activation(u, v, z, ACTIVATION).to(up.dtype.element_ty), mask=known)
    tl.store(grad_h + at, u_gradient.to(grad_h.dtype.element_ty), mask=known)
    if z is not None:
        tl.store(z + at, v_gradient.to(z.dtype.element_ty), mask=known)


@triton.jit
def grad_weight(
    factor, rows, grad_w, grad_b, start, token_of_slot, s, d,
    ROWS: tl.constexpr, NEURONS: tl.constexpr, COLUMNS: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """grad_w[e] = Σ over the pairs of expert e of factor[slot] ⊗ rows[token]; grad_b[e] = Σ factor[slot], unless None.

    factor [slots, s], rows [N, d], grad_w [E, s, d], grad_b [E, s]. There is one program for each expert and block of
    its weight. Experts without a pair get zeros.
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
