"""Broken kernels for weights of 8 and 4 bits, and what notices them: see `mutants`."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from tests.kernels.int8_calls import int8_call

from .int8_checks import Sizes, check_int8, check_trunk
from .mutant import Mutant

ROUND, PANELS, HALVES, TRUNK = "def round_rows(", "def panels_of(", "def halves_of(", "def trunk("
WRITE, OUTPUTS, HIDDEN, COMBINE = "def write_hidden(", "def outputs_of(", "def hidden_int8(", "def combine_int8("
CHOSEN, DECODE_HIDDEN, DECODE_COMBINE = "def chosen(", "def decode_hidden_int8(", "def decode_combine_int8("
SEM = 'sem="relaxed"'

CALCULATE_INT8 = (
    Mutant("int8_kernels", "tl.where(tl.abs(z) < float(\"inf\"), tl.abs(z), float(\"inf\"))", "tl.abs(z)"),
    Mutant("int8_kernels", "tl.where(largest < float(\"inf\"), tl.div_rn(largest, MOST), float(\"nan\"))",
           "tl.div_rn(largest, MOST)"),
    Mutant("int8_kernels", " + 12582912.0) - 12582912.0", ")"),
    Mutant("int8_kernels", "z *= tl.load(x_scale", "z += 0 * tl.load(x_scale"),
    Mutant("int8_kernels", "sizes = tl.maximum(sizes, size_of(scaled(", "sizes = (size_of(scaled(", ROUND),
    Mutant("int8_kernels", "panel[:, None] * length + place[None, :]", "panel[:, None] * length + place[None, :] * 0"),
    Mutant("int8_kernels", "tl.permute(split, (1, 3, 0, 2))", "tl.permute(split, (1, 3, 2, 0))"),
    Mutant("int8_kernels", "tl.join(lines & 15, lines >> 4)", "tl.join(lines >> 4, lines & 15)"),
    Mutant("int8_kernels", ".to(tl.int8) - 8", ".to(tl.int8) - 7"),
    Mutant("int8_kernels", "(place // run)[None, :]", "(place // (run + 1))[None, :]"),
    Mutant("int8_kernels", "tl.permute(split, (1, 4, 3, 0, 2))", "tl.permute(split, (1, 3, 4, 0, 2))"),
    Mutant("int8_kernels", "a_low = (a & 127)", "a_low = (a & 63)"),
    Mutant("int8_kernels", "mixed = tl.dot(a_low, w_high, mixed)", "mixed = mixed"),
    Mutant("int8_kernels", "high * 16384 + mixed * 128 + low", "high * 16384 + mixed * 64 + low"),
    Mutant("int8_kernels", "t += tl.load(fc1_bias", "t += 0 * tl.load(fc1_bias"),
    Mutant("int8_kernels", "weights_of(gate, gate_group,", "weights_of(w1, gate_group,"),
    Mutant("int8_kernels", "weights_of(gate, gate_group,", "weights_of(gate, w1_group,"),
    Mutant("int8_kernels", "z *= step * tl.load(gate_scale", "z *= step * tl.load(w1_scale"),
    Mutant("int8_kernels", "up += tl.load(b1", "up += 0 * tl.load(b1"),
    Mutant("int8_kernels", "z += tl.load(b_gate", "z += 0 * tl.load(b_gate"),
    Mutant("int8_kernels", "value *= tl.load(w2_scale", "value += 0 * tl.load(w2_scale"),
    Mutant("int8_kernels", "sizes = tl.maximum(sizes, size_of(value))", "sizes = size_of(value)", OUTPUTS),
    Mutant("int8_kernels", "step_of(tl.max(sizes, 1), MOST)", "step_of(tl.max(sizes, 1), 127.0)"),
    Mutant("int8_kernels", "positive: tl.constexpr = MOST == 255", "positive: tl.constexpr = MOST > 255"),
    Mutant("int8_kernels", "q.dtype.element_ty != tl.float16", "True"),
    Mutant("int8_kernels", "a = rounded(value, step, whole)", "a = rounded(value, step, True)"),
    Mutant("int8_kernels", "(byte & 128).to(tl.uint16) << 8", "(byte & 128).to(tl.uint16) << 7"),
    Mutant("int8_kernels", "(byte & 127).to(tl.uint16) << 7", "(byte & 127).to(tl.uint16) << 8"),
    Mutant("int8_kernels", "(byte & 127)", "(byte & 63)"),
    Mutant("int8_kernels", "tl.float16, bitcast=True) * 256.0", "tl.float16, bitcast=True) * 128.0"),
    Mutant("int8_kernels", "sums += tl.sum(", "sums = tl.sum("),
    Mutant("int8_kernels", "y += (sums * 128)[None, :]", "y += (sums * 127)[None, :]"),
    Mutant("int8_kernels", "item % blocks, s, d_in", "0, s, d_in", HIDDEN),
    Mutant("int8_kernels", "first_block + item % blocks", "item % blocks", COMBINE),
    Mutant("int8_kernels", f"tl.atomic_add(out + token[:, None] * d_out + column[None, :], y, mask=inside, {SEM})",
           "tl.store(out + token[:, None] * d_out + column[None, :], y, mask=inside)", COMBINE),
    Mutant("int8_kernels", f"tl.atomic_add(out + token[:, None] * d_out + column[None, :], y, mask=inside, {SEM})",
           "tl.store(out + token[:, None] * d_out + column[None, :], y, mask=inside)", DECODE_COMBINE),
    Mutant("int8_kernels", "runs(score, least, COMPARE) & (token < N)", "(token < N)"),
    Mutant("int8_kernels", "tl.program_id(0) % blocks, s, d_in", "0, s, d_in", DECODE_HIDDEN),
    Mutant("int8_host", "out.zero_() if call.b2 is None else out.copy_(call.b2)", "out.zero_()"),
    Mutant("int8_host", "_rounded(x, call.x_scale, most_inputs(call), dtype)",
           "_rounded(x, None, most_inputs(call), dtype)"),
    Mutant("int8_host", "w2=weights.w2.view(torch.uint8)", "w2=weights.w2.float().to(torch.uint8)"),
    Mutant("int8_host", "group_size(columns, factors.shape[2]) // PLACES", "1"),
    Mutant("int8_host", "into(h, plan, weights, call, out[part])",
           "into(h, plan, weights, call, out[: part.stop - part.start])"),
    Mutant("int8_host", "for first in range(0, d_out, step)", "for first in range(0, step, step)"),
)  # fmt: skip

_EXPERT = "expert = (tl.program_id(0) // blocks).to(tl.int64)", "expert = tl.program_id(0) // blocks"
OVERFLOW_INT8 = (
    Mutant("int8_kernels", "row = tl.program_id(0).to(tl.int64)", "row = tl.program_id(0)"),
    Mutant("int8_kernels", "tl.arange(0, ROWS)).to(tl.int64)", "tl.arange(0, ROWS))", TRUNK),
    Mutant("int8_kernels", "tl.arange(0, NEURONS // 16)).to(tl.int64)", "tl.arange(0, NEURONS // 16))", TRUNK),
    Mutant("int8_kernels", "tl.arange(0, ROWS).to(tl.int64)", "tl.arange(0, ROWS)", CHOSEN),
    Mutant("int8_kernels", *_EXPERT, DECODE_HIDDEN),
    Mutant("int8_kernels", *_EXPERT, DECODE_COMBINE),
)


def checks_int8(module: str) -> Iterator[Callable[[], None]]:
    """What notices mutants of a module, the quick ones first."""
    if module not in ("int8_kernels", "int8_host"):
        return
    yield lambda: check_trunk(int8_call((3,), d_in=50, width=20))
    ways = ((3, Sizes()), (18, Sizes()), (18, Sizes(ordered=True, room=17 * 2 * 40 * 4)))
    for tokens, sizes in ways:
        for gated, activation, weights in (
            (False, "relu", {}), (True, "silu", {"group": 24}), (True, "gelu", {"float8": True})
        ):  # fmt: skip
            call = int8_call(
                (tokens,), 2, 40, 50, 40, gated=gated, activation=activation, scaled=True, rule="max", tau=0.9, seed=1,
                **weights,
            )  # fmt: skip
            call.x[1, 3] = float("nan")
            yield lambda call=call, sizes=sizes: check_int8(call, sizes)
