"""The kernels of the operator with weights of 8 or 4 bits: round rows, a trunk's product, hidden values, outputs.

They compute what `surgeon.kernels.int8` defines, with the same integers: sums of products are int32, and divisions
before a rounding are exact. Weights in float8 come as their bytes, uint8, and are made fp16: exactly, and with
instructions that every chip has. Sums of their products are fp32. Weights are read in their panels
(`surgeon.kernels.panels`), in the order in which they lie in memory.

An expert's hidden values are rounded with one scale for each token, which takes all of them. So one kernel writes them,
and another one rounds them and multiplies: both go through a `Plan`, or, for a few tokens, start programs for every
expert, which end at once if no token selected it. Rows of a tile that belong to no pair are zero and never stored.

Arguments that several kernels have: q [N, d_in], int8 or for weights in float8 fp16, and scale [N] fp32, the rounded
inputs; h, fp32, hidden values
times w2_scale; `w1_run`, `gate_run`, `w2_run`: how many places of 8 inputs share a factor of weights of 4 bits; tile
sizes as in `forward_kernels`, of which NEURONS, COLUMNS and DEPTH are multiples of 32, or 16 where nothing is summed.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator"
# ruff: noqa: N803
# Triton gives parameters their types when it compiles; the only annotation it reads is `constexpr`, and those are
# constants. Conditions on them decide what is compiled, so each is a statement of its own.

import triton
import triton.language as tl

from surgeon.kernels.triton.elementwise import gated_activation
from surgeon.kernels.triton.forward_kernels import rows_of
from surgeon.kernels.triton.plan import runs


@triton.jit
def size_of(z):
    """|z|, and infinity for NaN, which a maximum would lose."""
    return tl.where(tl.abs(z) < float("inf"), tl.abs(z), float("inf"))


@triton.jit
def step_of(largest, MOST: tl.constexpr):
    """The scale of numbers whose largest size is given: NaN if one is not finite, so that all they give is NaN."""
    return tl.where(largest < float("inf"), tl.div_rn(largest, MOST), float("nan"))


@triton.jit
def rounded(z, step, WHOLE: tl.constexpr):
    """z / step, fp32, if WHOLE rounded to integers, half to even. Zeros for a step of zero or NaN."""
    quotient = tl.div_rn(z, tl.where(step > 0.0, step, 1.0))
    if WHOLE:
        # Adding 1.5 · 2²³ leaves no bits for fractions.
        quotient = (quotient + 12582912.0) - 12582912.0
    return tl.where(step > 0.0, quotient, 0.0)


@triton.jit
def scaled(x, x_scale, column, known):
    """Some inputs of a row, times their scales: fp32."""
    z = tl.load(x + column, mask=known, other=0.0).to(tl.float32)
    if x_scale is not None:
        z *= tl.load(x_scale + column, mask=known, other=0.0).to(tl.float32)
    return z


@triton.jit
def round_rows(x, x_scale, q, scale, d, MOST: tl.constexpr, COLUMNS: tl.constexpr):
    """Round rows of x · x_scale [N, d] to numbers up to MOST, int8, int16 or fp16, and write their scales [N]; one
    program for each."""
    row = tl.program_id(0).to(tl.int64)
    sizes = tl.zeros((COLUMNS,), tl.float32)
    for first in range(0, d, COLUMNS):
        column = first + tl.arange(0, COLUMNS)
        sizes = tl.maximum(sizes, size_of(scaled(x + row * d, x_scale, column, column < d)))
    step = step_of(tl.max(sizes, 0), MOST)
    tl.store(scale + row, step)
    for first in range(0, d, COLUMNS):
        column = first + tl.arange(0, COLUMNS)
        values = rounded(scaled(x + row * d, x_scale, column, column < d), step, q.dtype.element_ty != tl.float16)
        tl.store(q + row * d + column, values.to(q.dtype.element_ty), mask=column < d)


@triton.jit
def panels_of(w, panel, panels, first, d, EACH: tl.constexpr, OUTPUTS: tl.constexpr, DEPTH: tl.constexpr):
    """Return inputs `first` to first + DEPTH of panels [panels, d / EACH, 16, EACH]: [DEPTH, OUTPUTS].

    panel: [OUTPUTS / 16] int64, which ones.
    """
    length = tl.cdiv(d, EACH) * (16 * EACH)
    place = first * 16 + tl.arange(0, DEPTH * 16)
    inside = (panel < panels)[:, None] & (place < length)[None, :]
    lines = tl.load(w + panel[:, None] * length + place[None, :], mask=inside, other=0)
    split = tl.reshape(lines, (OUTPUTS // 16, DEPTH // EACH, 16, EACH))
    return tl.reshape(tl.permute(split, (1, 3, 0, 2)), (DEPTH, OUTPUTS))


@triton.jit
def halves_of(w, factors, panel, panels, first, d, run, OUTPUTS: tl.constexpr, DEPTH: tl.constexpr):
    """The same of weights of 4 bits, uint8 [panels, d / 8, 16, 4], times their factors [panels, G, 16]: int8."""
    length = tl.cdiv(d, 8) * 64
    byte = first * 8 + tl.arange(0, DEPTH * 8)
    inside = (panel < panels)[:, None] & (byte < length)[None, :]
    lines = tl.load(w + panel[:, None] * length + byte[None, :], mask=inside, other=0)
    both = tl.join(lines & 15, lines >> 4).to(tl.int8) - 8
    place = first // 8 + tl.arange(0, DEPTH // 8)
    groups = tl.cdiv(tl.cdiv(d, 8), run)
    at = (panel[:, None] * groups + (place // run)[None, :])[:, :, None] * 16 + tl.arange(0, 16)[None, None, :]
    there = (panel < panels)[:, None, None] & (place * 8 < d)[None, :, None]
    factor = tl.load(factors + at, mask=there, other=0).to(tl.int8)
    split = tl.reshape(both, (OUTPUTS // 16, DEPTH // 8, 16, 4, 2)) * factor[:, :, :, None, None]
    return tl.reshape(tl.permute(split, (1, 4, 3, 0, 2)), (DEPTH, OUTPUTS))


@triton.jit
def of_float8(byte):
    """The fp16 numbers that bytes stand for in float8, E4M3."""
    # At the same place of the exponent, which is smaller by 8 in float8.
    bits = ((byte & 128).to(tl.uint16) << 8) | ((byte & 127).to(tl.uint16) << 7)
    return bits.to(tl.float16, bitcast=True) * 256.0


@triton.jit
def weights_of(w, factors, panel, panels, first, d, run, OUTPUTS: tl.constexpr, DEPTH: tl.constexpr):
    """The weights of any kind [DEPTH, OUTPUTS]: fp16 of those in float8, else int8."""
    if factors is not None:
        found = halves_of(w, factors, panel, panels, first, d, run, OUTPUTS, DEPTH)
    elif w.dtype.element_ty == tl.uint8:
        found = of_float8(panels_of(w, panel, panels, first, d, 4, OUTPUTS, DEPTH))
    else:
        found = panels_of(w, panel, panels, first, d, 4, OUTPUTS, DEPTH)
    return found


@triton.jit
def trunk(
    q, scale, fc1, fc1_scale, fc1_bias, out, N, R, d,
    ROWS: tl.constexpr, NEURONS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """out = scale fc1_scale · (fc1 q) + fc1_bias: [N, R] fp32, q [N, d] and fc1 int16 of up to 12 bits.

    A number is 128 · high + low, with low from 0 to 127, and both fit in 8 bits. Sums of their products have room in 32
    bits, where tensor cores would saturate. What is put together of them may wrap around, since the whole has room.
    """
    token = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    panel = (tl.program_id(1) * (NEURONS // 16) + tl.arange(0, NEURONS // 16)).to(tl.int64)
    there = token < N
    high = tl.zeros((ROWS, NEURONS), tl.int32)
    mixed = tl.zeros((ROWS, NEURONS), tl.int32)
    low = tl.zeros((ROWS, NEURONS), tl.int32)
    for first in range(0, d, DEPTH):
        k = first + tl.arange(0, DEPTH)
        a = tl.load(q + token[:, None] * d + k[None, :], mask=there[:, None] & (k < d)[None, :], other=0)
        w = panels_of(fc1, panel, tl.cdiv(R, 16), first, d, 2, NEURONS, DEPTH)
        a_high = (a >> 7).to(tl.int8)
        w_high = (w >> 7).to(tl.int8)
        a_low = (a & 127).to(tl.int8)
        w_low = (w & 127).to(tl.int8)
        high = tl.dot(a_high, w_high, high)
        mixed = tl.dot(a_high, w_low, mixed)
        mixed = tl.dot(a_low, w_high, mixed)
        low = tl.dot(a_low, w_low, low)
    neuron = tl.program_id(1) * NEURONS + tl.arange(0, NEURONS)
    known = neuron < R
    factor = tl.load(scale + token, mask=there, other=0.0)[:, None]
    factor = factor * tl.load(fc1_scale + neuron, mask=known, other=0.0).to(tl.float32)[None, :]
    t = (high * 16384 + mixed * 128 + low).to(tl.float32) * factor
    if fc1_bias is not None:
        t += tl.load(fc1_bias + neuron, mask=known, other=0.0).to(tl.float32)[None, :]
    tl.store(out + token[:, None] * R + neuron[None, :], t, mask=there[:, None] & known[None, :])


@triton.jit
def write_hidden(
    q, scale, w1, w1_scale, b1, gate, gate_scale, b_gate, w2_scale, w1_group, gate_group, h,
    expert, there, token, h_row, block, s, d_in, w1_run, gate_run,
    ACTIVATION: tl.constexpr, ROWS: tl.constexpr, NEURONS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """Write a block of NEURONS of an expert for some tokens to rows h_row of h [rows, s]."""
    panel = (block * (NEURONS // 16) + tl.arange(0, NEURONS // 16)).to(tl.int64)
    panels = tl.cdiv(s, 16)
    all_panels = expert * panels + panel
    end = (expert + 1) * panels
    sums_in: tl.constexpr = tl.int32 if q.dtype.element_ty == tl.int8 else tl.float32
    up = tl.zeros((ROWS, NEURONS), sums_in)
    z = tl.zeros((ROWS, NEURONS), sums_in)
    for first in range(0, d_in, DEPTH):
        k = first + tl.arange(0, DEPTH)
        a = tl.load(q + token[:, None] * d_in + k[None, :], mask=there[:, None] & (k < d_in)[None, :], other=0)
        up = tl.dot(a, weights_of(w1, w1_group, all_panels, end, first, d_in, w1_run, NEURONS, DEPTH), up)
        if gate is not None:
            z = tl.dot(a, weights_of(gate, gate_group, all_panels, end, first, d_in, gate_run, NEURONS, DEPTH), z)
    neuron = block * NEURONS + tl.arange(0, NEURONS)
    known = neuron < s
    place = expert * s + neuron
    step = tl.load(scale + token, mask=there, other=0.0)[:, None]
    up = up.to(tl.float32) * (step * tl.load(w1_scale + place, mask=known, other=0.0).to(tl.float32)[None, :])
    if b1 is not None:
        up += tl.load(b1 + place, mask=known, other=0.0).to(tl.float32)[None, :]
    z = z.to(tl.float32)
    if gate is not None:
        z *= step * tl.load(gate_scale + place, mask=known, other=0.0).to(tl.float32)[None, :]
        if b_gate is not None:
            z += tl.load(b_gate + place, mask=known, other=0.0).to(tl.float32)[None, :]
    value = gated_activation(up, z, gate, ACTIVATION)
    value *= tl.load(w2_scale + place, mask=known, other=0.0).to(tl.float32)[None, :]
    tl.store(h + h_row[:, None] * s + neuron[None, :], value, mask=there[:, None] & known[None, :])


@triton.jit
def outputs_of(
    h, w2, y_scale, w2_group, expert, there, h_row, block, s, d_out, w2_run,
    MOST: tl.constexpr, ROWS: tl.constexpr, NEURONS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Return a block of COLUMNS of an expert's outputs from rows h_row of h [rows, s]: fp32 [ROWS, COLUMNS].

    MOST: the largest of rounded hidden values: 127 or 255 of integers, which are positive if it is 255, more of fp16.
    """
    whole: tl.constexpr = MOST <= 255
    positive: tl.constexpr = MOST == 255
    h_row = h + h_row[:, None] * s
    sizes = tl.zeros((ROWS, NEURONS), tl.float32)
    for first in range(0, s, NEURONS):
        neuron = first + tl.arange(0, NEURONS)
        value = tl.load(h_row + neuron[None, :], mask=there[:, None] & (neuron < s)[None, :], other=0.0)
        sizes = tl.maximum(sizes, size_of(value))
    step = step_of(tl.max(sizes, 1), MOST)[:, None]
    panel = (block * (COLUMNS // 16) + tl.arange(0, COLUMNS // 16)).to(tl.int64)
    panels = tl.cdiv(d_out, 16)
    y = tl.zeros((ROWS, COLUMNS), tl.int32 if whole else tl.float32)
    sums = tl.zeros((COLUMNS,), tl.int32)
    for first in range(0, s, NEURONS):
        neuron = first + tl.arange(0, NEURONS)
        value = tl.load(h_row + neuron[None, :], mask=there[:, None] & (neuron < s)[None, :], other=0.0)
        a = rounded(value, step, whole)
        w = weights_of(w2, w2_group, expert * panels + panel, (expert + 1) * panels, first, s, w2_run, COLUMNS, NEURONS)
        if positive:
            # From 0 to 255: tensor cores take numbers with a sign, so 128 times the weights are added behind.
            a -= 128.0
            sums += tl.sum(w.to(tl.int32), 0)
        y = tl.dot(a.to(w.dtype), w, y)
    if positive:
        y += (sums * 128)[None, :]
    column = block * COLUMNS + tl.arange(0, COLUMNS)
    return y.to(tl.float32) * step * tl.load(y_scale + column, mask=column < d_out, other=0.0).to(tl.float32)[None, :]


@triton.jit
def hidden_int8(
    q, scale, w1, w1_scale, b1, gate, gate_scale, b_gate, w2_scale, w1_group, gate_group, h,
    start, first_tile, expert_of_tile, token_of_slot, E, s, d_in, w1_run, gate_run,
    ACTIVATION: tl.constexpr, ROWS: tl.constexpr, NEURONS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """Write the hidden values h [slots, s]. An item is a tile of a plan and a block of NEURONS."""
    blocks = tl.cdiv(s, NEURONS)
    for item in range(tl.program_id(0).to(tl.int64), tl.load(first_tile + E) * blocks, tl.num_programs(0)):
        expert, slot, there, token = rows_of(item // blocks, start, first_tile, expert_of_tile, token_of_slot, ROWS)
        write_hidden(
            q, scale, w1, w1_scale, b1, gate, gate_scale, b_gate, w2_scale, w1_group, gate_group, h,
            expert, there, token, slot, item % blocks, s, d_in, w1_run, gate_run, ACTIVATION, ROWS, NEURONS, DEPTH,
        )  # fmt: skip


@triton.jit
def combine_int8(
    h, w2, y_scale, w2_group, out, start, first_tile, expert_of_tile, token_of_slot, E, s, d_out, first_block, width,
    w2_run,
    ORDERED: tl.constexpr, MOST: tl.constexpr, ROWS: tl.constexpr, NEURONS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Compute the outputs of pairs from h [slots, s]. An item is a tile of a plan and a block of COLUMNS.

    This takes `width` columns from block `first_block` on. It adds them to out [N, d_out], fp32, atomically. If
    ORDERED, it writes them to out [slots, width].
    """
    blocks = tl.cdiv(width, COLUMNS)
    for item in range(tl.program_id(0).to(tl.int64), tl.load(first_tile + E) * blocks, tl.num_programs(0)):
        expert, slot, there, token = rows_of(item // blocks, start, first_tile, expert_of_tile, token_of_slot, ROWS)
        y = outputs_of(
            h, w2, y_scale, w2_group, expert, there, slot, first_block + item % blocks, s, d_out, w2_run,
            MOST, ROWS, NEURONS, COLUMNS,
        )  # fmt: skip
        place = (item % blocks) * COLUMNS + tl.arange(0, COLUMNS)
        inside = there[:, None] & (place < width)[None, :]
        if ORDERED:
            tl.store(out + slot[:, None] * width + place[None, :], y.to(out.dtype.element_ty), mask=inside)
        else:
            column = first_block * COLUMNS + place
            tl.atomic_add(out + token[:, None] * d_out + column[None, :], y, mask=inside, sem="relaxed")


@triton.jit
def chosen(scores, threshold, expert, N, E, COMPARE: tl.constexpr, ROWS: tl.constexpr):
    """Return up to ROWS tokens, and which of them run an expert."""
    token = tl.arange(0, ROWS).to(tl.int64)
    score = tl.load(scores + token * E + expert, mask=token < N, other=0.0)
    least = tl.load(threshold + token, mask=token < N, other=0.0)
    return token, runs(score, least, COMPARE) & (token < N)


@triton.jit
def decode_hidden_int8(
    q, scale, scores, threshold, w1, w1_scale, b1, gate, gate_scale, b_gate, w2_scale, w1_group, gate_group, h,
    N, E, s, d_in, w1_run, gate_run,
    ACTIVATION: tl.constexpr, COMPARE: tl.constexpr, ROWS: tl.constexpr, NEURONS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """Write the hidden values h [N, E, s] of up to ROWS tokens; one program for each expert and block of NEURONS."""
    blocks = tl.cdiv(s, NEURONS)
    expert = (tl.program_id(0) // blocks).to(tl.int64)
    token, there = chosen(scores, threshold, expert, N, E, COMPARE, ROWS)
    if tl.sum(there.to(tl.int32), 0) == 0:
        return
    write_hidden(
        q, scale, w1, w1_scale, b1, gate, gate_scale, b_gate, w2_scale, w1_group, gate_group, h,
        expert, there, token, token * E + expert, tl.program_id(0) % blocks, s, d_in, w1_run, gate_run,
        ACTIVATION, ROWS, NEURONS, DEPTH,
    )  # fmt: skip


@triton.jit
def decode_combine_int8(
    h, scores, threshold, w2, y_scale, w2_group, out, N, E, s, d_out, w2_run,
    MOST: tl.constexpr, COMPARE: tl.constexpr, ROWS: tl.constexpr, NEURONS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Add the experts' outputs from h [N, E, s] to out [N, d_out], fp32, atomically; one program for each expert and
    block of COLUMNS."""
    blocks = tl.cdiv(d_out, COLUMNS)
    expert = (tl.program_id(0) // blocks).to(tl.int64)
    token, there = chosen(scores, threshold, expert, N, E, COMPARE, ROWS)
    if tl.sum(there.to(tl.int32), 0) == 0:
        return
    block = tl.program_id(0) % blocks
    y = outputs_of(
        h, w2, y_scale, w2_group, expert, there, token * E + expert, block, s, d_out, w2_run,
        MOST, ROWS, NEURONS, COLUMNS,
    )  # fmt: skip
    column = block * COLUMNS + tl.arange(0, COLUMNS)
    inside = there[:, None] & (column < d_out)[None, :]
    tl.atomic_add(out + token[:, None] * d_out + column[None, :], y, mask=inside, sem="relaxed")
