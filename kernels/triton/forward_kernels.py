"""The kernels of the forward pass: fused, split in two with the hidden values in memory, or a mask over dense values.

Programs share the tiles of a `Plan`: program p takes items p, p + programs, … until the count found on the device.
All offsets into tensors are 64-bit. Rows of a tile that belong to no pair are loaded as zero and never stored, so the
values of one token, NaN included, reach no other.

Arguments that every kernel has: `start`, `first_tile`, `expert_of_tile` and `token_of_slot` from the plan; `s` neurons
per expert; PRECISION and UPCAST from `launch`; tile sizes ROWS × NEURONS for hidden values, DEPTH along the sum that
gives them, COLUMNS of the result.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator"
# ruff: noqa: N803
# Triton gives parameters their types when it compiles; the only annotation it reads is `constexpr`, and those are
# constants. Conditions on them decide what is compiled, so each is a statement of its own.

import triton
import triton.language as tl

from surgeon.kernels.triton.elementwise import gated_activation
from surgeon.kernels.triton.plan import runs


@triton.jit
def rows_of(tile, start, first_tile, expert_of_tile, token_of_slot, ROWS: tl.constexpr):
    """Return the expert of a tile, and for each of its rows the slot, whether there is a pair, and the token."""
    expert = tl.load(expert_of_tile + tile).to(tl.int64)
    slot = tl.load(start + expert) + (tile - tl.load(first_tile + expert)) * ROWS + tl.arange(0, ROWS)
    there = slot < tl.load(start + expert + 1)
    token = tl.load(token_of_slot + slot, mask=there, other=0).to(tl.int64)
    return expert, slot, there, token


@triton.jit
def project(
    x_row, there, w1, b1, gate, b_gate, expert, neuron, s, d_in,
    ROWS: tl.constexpr, NEURONS: tl.constexpr, DEPTH: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Return x w1ᵀ + b1, and x gateᵀ + b_gate or zeros: fp32 [ROWS, NEURONS]. `x_row` [ROWS] points to rows of x."""
    known = neuron < s
    w_row = expert * s + neuron
    up = tl.zeros((ROWS, NEURONS), tl.float32)
    z = tl.zeros((ROWS, NEURONS), tl.float32)
    for first in range(0, d_in, DEPTH):
        k = first + tl.arange(0, DEPTH)
        x_inside = there[:, None] & (k < d_in)[None, :]
        w_inside = known[None, :] & (k < d_in)[:, None]
        w_at = w_row[None, :] * d_in + k[:, None]
        a = tl.load(x_row[:, None] + k[None, :], mask=x_inside, other=0.0)
        w = tl.load(w1 + w_at, mask=w_inside, other=0.0)
        if UPCAST:
            a = a.to(tl.float32)
            w = w.to(tl.float32)
        up = tl.dot(a, w, up, input_precision=PRECISION)
        if gate is not None:
            g = tl.load(gate + w_at, mask=w_inside, other=0.0)
            if UPCAST:
                g = g.to(tl.float32)
            z = tl.dot(a, g, z, input_precision=PRECISION)
    if b1 is not None:
        up += tl.load(b1 + w_row, mask=known, other=0.0).to(tl.float32)[None, :]
    if b_gate is not None:
        z += tl.load(b_gate + w_row, mask=known, other=0.0).to(tl.float32)[None, :]
    return up, z


@triton.jit
def add_ffn(
    x, w1, b1, gate, b_gate, w2, out, expert, there, token, neuron, s, d_in, d_out,
    ACTIVATION: tl.constexpr, ROWS: tl.constexpr, NEURONS: tl.constexpr, DEPTH: tl.constexpr, COLUMNS: tl.constexpr,
    PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Add the outputs of some neurons of an expert for tokens that are `there` to out [N, d_out], fp32, atomically."""
    up, z = project(
        x + token * d_in, there, w1, b1, gate, b_gate, expert, neuron, s, d_in,
        ROWS, NEURONS, DEPTH, PRECISION, UPCAST,
    )  # fmt: skip
    h = gated_activation(up, z, gate, ACTIVATION).to(w2.dtype.element_ty)
    if UPCAST:
        h = h.to(tl.float32)
    w_row = w2 + (expert * s + neuron) * d_out
    out_row = out + token * d_out
    for first in range(0, d_out, COLUMNS):
        column = first + tl.arange(0, COLUMNS)
        known = column < d_out
        w = tl.load(w_row[:, None] + column[None, :], mask=(neuron < s)[:, None] & known[None, :], other=0.0)
        if UPCAST:
            w = w.to(tl.float32)
        y = tl.dot(h, w, input_precision=PRECISION)
        inside = there[:, None] & known[None, :]
        tl.atomic_add(out_row[:, None] + column[None, :], y, mask=inside, sem="relaxed")


@triton.jit
def fused(
    x, w1, b1, gate, b_gate, w2, out, start, first_tile, expert_of_tile, token_of_slot, E, s, d_in, d_out,
    ACTIVATION: tl.constexpr, ROWS: tl.constexpr, NEURONS: tl.constexpr, DEPTH: tl.constexpr, COLUMNS: tl.constexpr,
    PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Add the experts' outputs to out [N, d_out], fp32, atomically. NEURONS covers all `s`: they stay on the chip."""
    tiles = tl.load(first_tile + E)
    neuron = tl.arange(0, NEURONS)
    for tile in range(tl.program_id(0).to(tl.int64), tiles, tl.num_programs(0)):
        expert, _, there, token = rows_of(tile, start, first_tile, expert_of_tile, token_of_slot, ROWS)
        add_ffn(
            x, w1, b1, gate, b_gate, w2, out, expert, there, token, neuron, s, d_in, d_out,
            ACTIVATION, ROWS, NEURONS, DEPTH, COLUMNS, PRECISION, UPCAST,
        )  # fmt: skip


@triton.jit
def hidden(
    x, w1, b1, gate, b_gate, h, start, first_tile, expert_of_tile, token_of_slot, E, s, d_in,
    ACTIVATION: tl.constexpr, SPREAD: tl.constexpr, ROWS: tl.constexpr, NEURONS: tl.constexpr, DEPTH: tl.constexpr,
    PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Write the hidden values h [slots, s], or if SPREAD to their places in h [N, E, s], which must hold zeros.

    An item is a tile and a block of NEURONS.
    """
    blocks = tl.cdiv(s, NEURONS)
    for item in range(tl.program_id(0).to(tl.int64), tl.load(first_tile + E) * blocks, tl.num_programs(0)):
        expert, slot, there, token = rows_of(item // blocks, start, first_tile, expert_of_tile, token_of_slot, ROWS)
        neuron = (item % blocks) * NEURONS + tl.arange(0, NEURONS)
        up, z = project(
            x + token * d_in, there, w1, b1, gate, b_gate, expert, neuron, s, d_in,
            ROWS, NEURONS, DEPTH, PRECISION, UPCAST,
        )  # fmt: skip
        value = gated_activation(up, z, gate, ACTIVATION)
        inside = there[:, None] & (neuron < s)[None, :]
        if SPREAD:
            at = (h + expert * s + neuron)[None, :] + (token * E * s)[:, None]
        else:
            at = h + slot[:, None] * s + neuron[None, :]
        tl.store(at, value.to(h.dtype.element_ty), mask=inside)


@triton.jit
def combine(
    h, w, h_gate, w_gate, out, start, first_tile, expert_of_tile, token_of_slot, E, s, d, first_column, width,
    ORDERED: tl.constexpr, ROWS: tl.constexpr, NEURONS: tl.constexpr, COLUMNS: tl.constexpr,
    PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Compute h w, plus h_gate w_gate if given: h [slots, s], w [E, s, d]. An item is a tile and a block of COLUMNS.

    This takes `width` columns of w from `first_column` on. It adds the result to out [N, d], fp32, atomically. If
    ORDERED, it writes the result to out [slots, width].
    """
    blocks = tl.cdiv(width, COLUMNS)
    for item in range(tl.program_id(0).to(tl.int64), tl.load(first_tile + E) * blocks, tl.num_programs(0)):
        expert, slot, there, token = rows_of(item // blocks, start, first_tile, expert_of_tile, token_of_slot, ROWS)
        place = (item % blocks) * COLUMNS + tl.arange(0, COLUMNS)
        known = place < width
        column = first_column + place
        y = tl.zeros((ROWS, COLUMNS), tl.float32)
        for first in range(0, s, NEURONS):
            neuron = first + tl.arange(0, NEURONS)
            h_at = slot[:, None] * s + neuron[None, :]
            h_inside = there[:, None] & (neuron < s)[None, :]
            w_at = (expert * s + neuron)[:, None] * d + column[None, :]
            w_inside = (neuron < s)[:, None] & known[None, :]
            a = tl.load(h + h_at, mask=h_inside, other=0.0)
            b = tl.load(w + w_at, mask=w_inside, other=0.0)
            if UPCAST:
                a = a.to(tl.float32)
                b = b.to(tl.float32)
            y = tl.dot(a, b, y, input_precision=PRECISION)
            if h_gate is not None:
                a = tl.load(h_gate + h_at, mask=h_inside, other=0.0)
                b = tl.load(w_gate + w_at, mask=w_inside, other=0.0)
                if UPCAST:
                    a = a.to(tl.float32)
                    b = b.to(tl.float32)
                y = tl.dot(a, b, y, input_precision=PRECISION)
        inside = there[:, None] & known[None, :]
        if ORDERED:
            tl.store(out + slot[:, None] * width + place[None, :], y.to(out.dtype.element_ty), mask=inside)
        else:
            tl.atomic_add(out + token[:, None] * d + column[None, :], y, mask=inside, sem="relaxed")


@triton.jit
def neurons_of(token, scores, threshold, E, COMPARE: tl.constexpr, S: tl.constexpr, COLUMNS: tl.constexpr):
    """Return, for a block of a token's neurons, their places in [N, E · S], which of them exist, and which run."""
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    known = column < E * S
    score = tl.load(scores + token * E + column // S, mask=known, other=0.0)
    on = known & runs(score, tl.load(threshold + token), COMPARE)
    return token * E * S + column, known, on


@triton.jit
def mask(
    h, z, scores, threshold, E,
    ACTIVATION: tl.constexpr, COMPARE: tl.constexpr, S: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Set h to act(h), or act(z) · h if z is given, in place, and to 0 if a neuron's expert does not run: [N, E · S].

    There is one program for each token and block of COLUMNS. Neurons that do not run are not read.
    """
    token = tl.program_id(0).to(tl.int64)
    at, known, on = neurons_of(token, scores, threshold, E, COMPARE, S, COLUMNS)
    up = tl.load(h + at, mask=on, other=0.0).to(tl.float32)
    gate = up
    if z is not None:
        gate = tl.load(z + at, mask=on, other=0.0).to(tl.float32)
    # All activations are 0 at 0.
    tl.store(h + at, gated_activation(up, gate, z, ACTIVATION).to(h.dtype.element_ty), mask=known)


@triton.jit
def reduce(
    partial, slot_of_pair, bias, out, E, d, first_column, width, EXPERTS: tl.constexpr, COLUMNS: tl.constexpr
):  # fmt: skip
    """out[n] = bias + Σ over the experts of token n of partial[slot], in an order that depends only on E.

    This writes `width` columns of out [N, d] from `first_column` on; partial [slots, width].
    """
    token = tl.program_id(0).to(tl.int64)
    place = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    known = place < width
    column = first_column + place
    total = tl.zeros((COLUMNS,), tl.float32)
    if bias is not None:
        total += tl.load(bias + column, mask=known, other=0.0).to(tl.float32)
    for first in range(0, E, EXPERTS):
        expert = first + tl.arange(0, EXPERTS)
        slot = tl.load(slot_of_pair + token * E + expert, mask=expert < E, other=-1).to(tl.int64)
        if tl.max(slot, 0) >= 0:
            inside = (slot >= 0)[:, None] & known[None, :]
            part = tl.load(partial + slot[:, None] * width + place[None, :], mask=inside, other=0.0)
            total += tl.sum(part.to(tl.float32), 0)
    tl.store(out + token * d + column, total.to(out.dtype.element_ty), mask=known)
