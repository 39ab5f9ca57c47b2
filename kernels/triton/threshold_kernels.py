"""The kernel for the rules that go through a token's scores in ascending order. It does not sort them."""

# mypy: disable-error-code="no-untyped-def, untyped-decorator"
# ruff: noqa: N803
# Triton gives parameters their types when it compiles; the only annotation it reads is `constexpr`, and those are
# constants. Conditions on them decide what is compiled, so each is a statement of its own.

import triton
import triton.language as tl


@triton.jit
def amount_up_to(keys, amounts, most):
    """Return the sum of the amounts whose keys are at most `most`, added in float64 and rounded to float32."""
    return tl.sum(tl.where(keys <= most, amounts, 0.0), 0).to(tl.float32)


@triton.jit
def sorted_threshold(scores, tau, out, E, RULE: tl.constexpr, COLUMNS: tl.constexpr):
    """out[n] = the threshold for row n of scores [N, E], float32: `surgeon.kernels.selection` says what the rules are.

    There is one program for each row. Floats are mapped to integers in the same order, with NaN last. A binary search
    over the floats from the smallest to the largest score finds the first one up to which more than may be skipped is
    found.
    """
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, COLUMNS)
    known = column < E
    score = tl.load(scores + row * E + column, mask=known, other=0.0)
    score = tl.where(score == score, score, float("nan"))  # of either sign
    bits = score.to(tl.int32, bitcast=True)
    keys = tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits).to(tl.int64)
    high = tl.max(keys, 0)  # what pads a row is 0
    low = tl.min(tl.where(known, keys, 2**31), 0)
    share = tl.load(tau)
    if RULE == "top_k":
        amounts = known.to(tl.float64)
        # The epsilon: a share may be a little less than what it stands for. The search is for one more than may be
        # skipped; if there are not that many, it ends at the largest score.
        limit = tl.floor(share * E + 1e-4) + 1
    else:
        if RULE == "energy":
            amounts = score * score
            share = share * share
        else:
            tl.static_assert(RULE == "cumulative")
            amounts = score
        amounts = tl.where(known, amounts, 0.0).to(tl.float64)
        limit = share * amount_up_to(keys, amounts, high)
    while low < high:
        middle = low + (high - low) // 2
        # Not a comparison with the least that is enough: NaN is.
        if amount_up_to(keys, amounts, middle) < limit:
            low = middle + 1
        else:
            high = middle
    found = low.to(tl.int32)
    found = tl.where(found < 0, found ^ 0x7FFFFFFF, found)
    tl.store(out + row, found.to(tl.float32, bitcast=True))
