"""The kernels for a few tokens. One launch without a plan runs one program for each expert and block of its neurons.

If no token selected its expert, a program ends at once. So only the selected weights are read, each once for all
tokens. Results are added to out [N, d_out], fp32, atomically.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator"
# ruff: noqa: N803
# Triton gives parameters their types when it compiles; the only annotation it reads is `constexpr`, and those are
# constants. Conditions on them decide what is compiled, so each is a statement of its own.

import triton
import triton.language as tl

from surgeon.kernels.triton.elementwise import gated_activation
from surgeon.kernels.triton.forward_kernels import add_ffn
from surgeon.kernels.triton.plan import runs

MOST_TOKENS = 16
"""As many as the rows of the smallest tile that tensor cores multiply."""


@triton.jit
def decode_tokens(
    x, scores, threshold, w1, b1, gate, b_gate, w2, out, N, E, s, d_in, d_out,
    ACTIVATION: tl.constexpr, COMPARE: tl.constexpr, ROWS: tl.constexpr, NEURONS: tl.constexpr, DEPTH: tl.constexpr,
    COLUMNS: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Compute up to ROWS tokens by matrix products."""
    blocks = tl.cdiv(s, NEURONS)
    expert = (tl.program_id(0) // blocks).to(tl.int64)
    neuron = (tl.program_id(0) % blocks) * NEURONS + tl.arange(0, NEURONS)
    token = tl.arange(0, ROWS)
    score = tl.load(scores + token.to(tl.int64) * E + expert, mask=token < N, other=0.0)
    least = tl.load(threshold + token, mask=token < N, other=0.0)
    there = runs(score, least, COMPARE) & (token < N)
    if tl.sum(there.to(tl.int32), 0) == 0:
        return
    add_ffn(
        x, w1, b1, gate, b_gate, w2, out, expert, there, token.to(tl.int64), neuron, s, d_in, d_out,
        ACTIVATION, ROWS, NEURONS, DEPTH, COLUMNS, PRECISION, UPCAST,
    )  # fmt: skip


@triton.jit
def decode_one(
    x, scores, threshold, w1, b1, gate, b_gate, w2, out, s, d_in, d_out,
    ACTIVATION: tl.constexpr, COMPARE: tl.constexpr, NEURONS: tl.constexpr, DEPTH: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Compute one token by multiply-adds: each weight is read once and used once, so tensor cores would not help."""
    blocks = tl.cdiv(s, NEURONS)
    expert = (tl.program_id(0) // blocks).to(tl.int64)
    if runs(tl.load(scores + expert), tl.load(threshold), COMPARE):
        neuron = (tl.program_id(0) % blocks) * NEURONS + tl.arange(0, NEURONS)
        known = neuron < s
        w_row = expert * s + neuron
        up_parts = tl.zeros((NEURONS, DEPTH), tl.float32)
        z_parts = tl.zeros((NEURONS, DEPTH), tl.float32)
        for first in range(0, d_in, DEPTH):
            k = first + tl.arange(0, DEPTH)
            a = tl.load(x + k, mask=k < d_in, other=0.0).to(tl.float32)
            at = w_row[:, None] * d_in + k[None, :]
            inside = known[:, None] & (k < d_in)[None, :]
            up_parts += a[None, :] * tl.load(w1 + at, mask=inside, other=0.0).to(tl.float32)
            if gate is not None:
                z_parts += a[None, :] * tl.load(gate + at, mask=inside, other=0.0).to(tl.float32)
        up = tl.sum(up_parts, 1)
        if b1 is not None:
            up += tl.load(b1 + w_row, mask=known, other=0.0).to(tl.float32)
        z = tl.sum(z_parts, 1)
        if b_gate is not None:
            z += tl.load(b_gate + w_row, mask=known, other=0.0).to(tl.float32)
        # Rounded like hidden values everywhere else.
        h = gated_activation(up, z, gate, ACTIVATION).to(w2.dtype.element_ty).to(tl.float32)
        for first in range(0, d_out, COLUMNS):
            column = first + tl.arange(0, COLUMNS)
            at = w_row[:, None] * d_out + column[None, :]
            w = tl.load(w2 + at, mask=known[:, None] & (column < d_out)[None, :], other=0.0).to(tl.float32)
            tl.atomic_add(out + column, tl.sum(h[:, None] * w, 0), mask=column < d_out, sem="relaxed")
