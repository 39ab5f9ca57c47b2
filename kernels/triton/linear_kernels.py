"""The kernels of linear layers that read only the inputs that some token keeps, for a few tokens.

One launch, without a list of these inputs: a program goes through a part of the inputs for a block of the outputs, and
the mask of its loads leaves out the rows of the weight that no token keeps. Results are added to out [N, d_out], fp32,
atomically. `surgeon.kernels.sparse_linear` says what is computed.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator"
# ruff: noqa: N803
# Triton gives parameters their types when it compiles; the only annotation it reads is `constexpr`, and those are
# constants. Conditions on them decide what is compiled, so each is a statement of its own.

import triton
import triton.language as tl

MOST_TOKENS = 16
"""As many as the rows of the smallest tile that tensor cores multiply."""


@triton.jit
def level_at(levels, tau, last):
    """Return `levels` [last + 1] at place tau · last, interpolated linearly."""
    place = tl.minimum(tl.maximum(tl.load(tau), 0.0), 1.0) * last
    below = tl.minimum(place.to(tl.int32), last - 1)
    low = tl.load(levels + below)
    high = tl.load(levels + below + 1)
    part = place - below
    return tl.where(part < 0.5, low + part * (high - low), high - (high - low) * (1.0 - part))


@triton.jit
def deviations(x, there, scale, centre, i, inside, threshold):
    """Return how far inputs i are from their centre, fp32, and which are kept. `x` points to those that are `there`."""
    deviation = tl.load(x, mask=there, other=0.0).to(tl.float32)
    if centre is not None:
        deviation -= tl.load(centre + i, mask=inside, other=0.0)
    score = tl.abs(deviation)
    if scale is not None:
        score *= tl.load(scale + i, mask=inside, other=0.0)
    # NaN is kept.
    return deviation, ~(score <= threshold) & there


@triton.jit
def linear_one(
    x, weight, scale, centre, levels, tau, w_scale, out, d_in, d_out, last,
    STEPS: tl.constexpr, DEPTH: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Compute one token by multiply-adds: each weight is read once and used once, so tensor cores would not help."""
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    known = column < d_out
    threshold = level_at(levels, tau, last)
    parts = tl.zeros((DEPTH, COLUMNS), tl.float32)
    for step in range(0, STEPS):
        i = (tl.program_id(1) * STEPS + step) * DEPTH + tl.arange(0, DEPTH)
        inside = i < d_in
        deviation, keep = deviations(x + i, inside, scale, centre, i, inside, threshold)
        at = i.to(tl.int64)[:, None] * d_out + column[None, :]
        w = tl.load(weight + at, mask=keep[:, None] & known[None, :], other=0.0).to(tl.float32)
        parts += deviation[:, None] * w  # zeros where it is not kept
    y = tl.sum(parts, 0)
    if w_scale is not None:
        y *= tl.load(w_scale + column, mask=known, other=0.0)
    tl.atomic_add(out + column, y, mask=known, sem="relaxed")


@triton.jit
def linear_tokens(
    x, weight, scale, centre, levels, tau, w_scale, out, N, d_in, d_out, last,
    STEPS: tl.constexpr, ROWS: tl.constexpr, DEPTH: tl.constexpr, COLUMNS: tl.constexpr, PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
):  # fmt: skip
    """Compute up to ROWS tokens by matrix products."""
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    known = column < d_out
    token = tl.arange(0, ROWS).to(tl.int64)
    threshold = level_at(levels, tau, last)
    y = tl.zeros((ROWS, COLUMNS), tl.float32)
    for step in range(0, STEPS):
        i = (tl.program_id(1) * STEPS + step) * DEPTH + tl.arange(0, DEPTH)
        inside = i < d_in
        there = (token < N)[:, None] & inside[None, :]
        x_at = x + token[:, None] * d_in + i[None, :]
        deviation, keep = deviations(x_at, there, scale, centre, i[None, :], inside[None, :], threshold)
        some = tl.max(keep.to(tl.int32), 0) > 0
        at = i.to(tl.int64)[:, None] * d_out + column[None, :]
        w = tl.load(weight + at, mask=some[:, None] & known[None, :], other=0.0)
        if w_scale is not None:
            w = w.to(tl.float32).to(x.dtype.element_ty)  # the interpreter does not convert int8 to bf16 at once
        a = tl.where(keep, deviation, 0.0).to(x.dtype.element_ty)
        if UPCAST:
            a = a.to(tl.float32)
            w = w.to(tl.float32)
        y = tl.dot(a, w, y, input_precision=PRECISION)
    if w_scale is not None:
        y *= tl.load(w_scale + column, mask=known, other=0.0)[None, :]
    to = token[:, None] * d_out + column[None, :]
    tl.atomic_add(out + to, y, mask=(token < N)[:, None] & known[None, :], sem="relaxed")
