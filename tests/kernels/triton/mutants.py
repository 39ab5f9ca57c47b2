"""Broken kernels, to see that the checks notice: `python -m tests.kernels.triton.mutants` with one word of `main`.

A mutant is a change of text in one module. Those that calculate wrongly are run in the interpreter against `checks`;
those whose offsets have 32 bits are compiled as far as the front end and searched for products that overflow. None of
them leaves its tensors by more than the margin that `checks` puts around them: that would break the process.

Writes JSON: what became of each, "noticed", "survives", or "equivalent" for a survivor that is expected to be one.
"""

from __future__ import annotations

import importlib.util
import json
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from .checks import (
    PACKAGE,
    Case,
    check_activation,
    check_backward,
    check_forward,
    check_nan,
    check_plan,
    check_thresholds,
)
from .mutant import SOURCE, Mutant
from .mutants_int8 import CALCULATE_INT8, OVERFLOW_INT8, checks_int8

COUNT, ADD_BLOCKS = "def _count(", "def _add_blocks("
ADD_FFN, HIDDEN, COMBINE = "def add_ffn(", "def hidden(", "def combine("
MASK, REDUCE = "def mask(", "def reduce("
TOKENS, ONE = "def decode_tokens(", "def decode_one("
SEM = 'sem="relaxed"'

CALCULATE = (
    Mutant("plan", "score.to(COMPARE) < least.to", "score.to(COMPARE) <= least.to"),
    Mutant("plan", "~(score.to(COMPARE) < least.to(COMPARE))", "(score.to(COMPARE) >= least.to(COMPARE))"),
    Mutant("plan", "COMPARE) & inside).to(tl.int32)", "COMPARE)).to(tl.int32)"),
    Mutant("plan", "tl.float64 if", "tl.float32 if"),
    Mutant("plan", "running += tl.sum(count, 0)", "running = tl.sum(count, 0)"),
    Mutant("plan", "slots += tl.sum(count, 0)", "slots = tl.sum(count, 0)"),
    Mutant("plan", "tiles += tl.sum(cut, 0)", "tiles = tl.sum(cut, 0)"),
    Mutant("plan", "(count + ROWS - 1) // ROWS", "(count + ROWS) // ROWS"),
    Mutant("plan", "position % ROWS == 0", "position % ROWS == 1"),
    Mutant("plan", "tl.where(pair, slot, -1)", "slot"),
    Mutant("forward_kernels", "slot < tl.load(start + expert + 1)", "slot < tl.load(start + expert + 1) - 1"),
    Mutant("forward_kernels", "there[:, None] & (k < d_in)[None, :]", "there[:, None]"),
    Mutant("forward_kernels", "known[None, :] & (k < d_in)[:, None]", "known[None, :]"),
    Mutant("forward_kernels", "known[None, :] & (k < d_in)[:, None]", "(k < d_in)[:, None]"),
    Mutant("forward_kernels", "up += tl.load(b1", "up += 0 * tl.load(b1"),
    Mutant("forward_kernels", "z += tl.load(b_gate", "z += 0 * tl.load(b_gate"),
    Mutant("forward_kernels", "tl.load(gate + w_at", "tl.load(w1 + w_at"),
    Mutant("forward_kernels", f"tl.atomic_add(out_row[:, None] + column[None, :], y, mask=inside, {SEM})",
           "tl.store(out_row[:, None] + column[None, :], y, mask=inside)"),
    Mutant("forward_kernels", "inside = there[:, None] & known[None, :]", "inside = known[None, :]", ADD_FFN),
    Mutant("forward_kernels", "(neuron < s)[:, None] & known[None, :]", "known[None, :]", ADD_FFN),
    Mutant("forward_kernels", "gated_activation(up, z, gate, ACTIVATION)", "gated_activation(z, up, gate, ACTIVATION)",
           ADD_FFN),
    Mutant("forward_kernels", "gated_activation(up, z, gate, ACTIVATION)", "gated_activation(up, z, None, ACTIVATION)",
           HIDDEN),
    Mutant("forward_kernels", "(item % blocks) * NEURONS", "(item % blocks) * 1", HIDDEN),
    Mutant("forward_kernels", "(h + expert * s + neuron)", "(h + neuron)"),
    Mutant("forward_kernels", "on = known & runs(score, tl.load(threshold + token), COMPARE)", "on = known"),
    Mutant("forward_kernels", "token * E + column // S", "token * E + column % E"),
    Mutant("forward_kernels", "gate = tl.load(z + at", "gate = tl.load(h + at", MASK),
    Mutant("forward_kernels", "gated_activation(up, gate, z, ACTIVATION)",
           "gated_activation(up, gate, None, ACTIVATION)", MASK),
    Mutant("forward_kernels", "known = column < E * S", "known = column < E * S - 1"),
    Mutant("forward_kernels", f"tl.atomic_add(out + token[:, None] * d + column[None, :], y, mask=inside, {SEM})",
           "tl.store(out + token[:, None] * d + column[None, :], y, mask=inside)"),
    Mutant("forward_kernels", "tl.load(w_gate + w_at", "tl.load(w + w_at", COMBINE),
    Mutant("forward_kernels", "out + slot[:, None] * width", "out + token[:, None] * width", COMBINE),
    Mutant("forward_kernels", "column = first_column + place", "column = place", COMBINE),
    Mutant("forward_kernels", "column = first_column + place", "column = place", REDUCE),
    Mutant("forward_kernels", "if tl.max(slot, 0) >= 0:", "if tl.min(slot, 0) >= 0:"),
    Mutant("forward_kernels", "inside = there[:, None] & known[None, :]", "inside = known[None, :]", COMBINE),
    Mutant("forward_kernels", "for first in range(0, s, NEURONS)", "for first in range(0, 1, NEURONS)", COMBINE),
    Mutant("forward_kernels", "inside = (slot >= 0)", "inside = (slot > 0)"),
    Mutant("forward_kernels", "total += tl.load(bias", "total += 0 * tl.load(bias"),
    Mutant("forward_kernels", "mask=expert < E, other=-1", "mask=expert < E, other=0"),
    Mutant("decode_kernels", "there = runs(score, least, COMPARE) & (token < N)", "there = token < N"),
    Mutant("decode_kernels", "w2, out, expert, there, token", "w2, out, expert, token < N, token", TOKENS),
    Mutant("decode_kernels", "gated_activation(up, z, gate, ACTIVATION)", "gated_activation(z, up, gate, ACTIVATION)"),
    Mutant("decode_kernels", "if tl.sum(there.to(tl.int32), 0) == 0:", "if tl.sum(there.to(tl.int32), 0) < 0:",
           equivalent="it only ends programs whose rows are all masked"),
    Mutant("decode_kernels", "if runs(tl.load(scores + expert), tl.load(threshold), COMPARE):", "if expert >= 0:"),
    Mutant("decode_kernels", "mask=known[:, None] & (column < d_out)[None, :]", "mask=(column < d_out)[None, :]"),
    Mutant("decode_kernels", "inside = known[:, None] & (k < d_in)[None, :]", "inside = known[:, None]"),
    Mutant("decode_kernels", "a[None, :] * tl.load(gate + at", "a[None, :] * tl.load(w1 + at"),
    Mutant("decode_kernels", "z += tl.load(b_gate", "z += 0 * tl.load(b_gate"),
    Mutant("decode_kernels", f"tl.atomic_add(out + column, tl.sum(h[:, None] * w, 0), mask=column < d_out, {SEM})",
           "tl.store(out + column, tl.sum(h[:, None] * w, 0), mask=column < d_out)"),
    Mutant("backward_kernels", "gated_backward(grad_h, up, z, gate, ACTIVATION)",
           "gated_backward(grad_h, z, up, gate, ACTIVATION)"),
    Mutant("backward_kernels", "g = tl.load(grad_h + at, mask=on", "g = tl.load(grad_h + at, mask=known"),
    Mutant("backward_kernels", "v = tl.load(z + at", "v = tl.load(up + at"),
    Mutant("backward_kernels", "tl.store(grad_h + at, u_gradient", "tl.store(grad_h + at, v_gradient"),
    Mutant("backward_kernels", "there = slot < end", "there = slot < end - 1"),
    Mutant("backward_kernels", "bias += tl.sum", "bias = tl.sum"),
    Mutant("backward_kernels", "total = tl.dot(f, r, total, ", "total = tl.dot(f, r, "),
    Mutant("backward_kernels", "if column_block == 0:", "if column_block >= 0:",
           equivalent="every block of columns has the same sum for the bias"),
    Mutant("threshold_kernels", "tl.where(score == score, score, float(\"nan\"))", "score"),
    Mutant("threshold_kernels", "tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)", "bits"),
    Mutant("threshold_kernels", "tl.where(known, keys, 2**31)", "keys"),
    Mutant("threshold_kernels", "amounts = known.to(tl.float64)", "amounts = (keys == keys).to(tl.float64)"),
    Mutant("threshold_kernels", "share * E + 1e-4", "share * E"),
    Mutant("threshold_kernels", "tl.floor(share * E + 1e-4) + 1", "tl.floor(share * E + 1e-4)"),
    Mutant("threshold_kernels", "amounts = score * score", "amounts = score"),
    Mutant("threshold_kernels", "share = share * share", "share = share"),
    Mutant("threshold_kernels", "limit = share * amount_up_to(keys, amounts, high)", "limit = share"),
    Mutant("threshold_kernels", "keys <= most", "keys < most"),
    Mutant("threshold_kernels", "amount_up_to(keys, amounts, middle) < limit",
           "amount_up_to(keys, amounts, middle) <= limit"),
    Mutant("threshold_kernels", "low = middle + 1", "low = middle + 2"),
    Mutant("threshold_kernels", "tl.load(scores + row * E + column", "tl.load(scores + column"),
    Mutant("elementwise", "h = activate(z, ACTIVATION) * up", "h = activate(up, ACTIVATION) * z"),
    Mutant("elementwise", "h = activate(z, ACTIVATION) * up", "h = activate(z, ACTIVATION)"),
    Mutant("elementwise", "h = activate(up, ACTIVATION)", "h = up"),
    Mutant("elementwise", "a = tl.where(z < 0.0, 0.0, z)\n", "a = tl.maximum(z, 0.0)\n"),
    Mutant("elementwise", "tl.where(z <= 0.0, 0.0, grad)", "tl.where(z < 0.0, 0.0, grad)"),
    Mutant("elementwise", "tl.where(z < 0.0, 0.0, z * z)", "z * z"),
    Mutant("elementwise", "1.0 + 0.134145 * z * z", "1.0 + 0.044715 * z * z"),
    Mutant("elementwise", "s * (1.0 + z * (1.0 - s))", "s * (1.0 + z * s)"),
    Mutant("elementwise", "activate_backward(grad * up, z, ACTIVATION)", "activate_backward(grad, z, ACTIVATION)"),
    Mutant("elementwise", "up_gradient = grad * activate(z, ACTIVATION)", "up_gradient = grad"),
    Mutant("elementwise", "up_gradient = activate_backward(grad, up, ACTIVATION)", "up_gradient = grad"),
    Mutant("elementwise", "+ z * density", "- z * density"),
    Mutant("elementwise", "s + 1.702 * z", "s + z"),
    Mutant("host", "for first in range(0, d, step)", "for first in range(0, step, step)"),
    Mutant("host", "x.new_zeros(x.shape[0], count, neurons)", "x.new_ones(x.shape[0], count, neurons)"),
    Mutant("host", "F.linear(x, flat.gate, flat.b_gate)", "F.linear(x, flat.gate)", "def _masked("),
    Mutant("host", "F.linear(x, flat.gate, flat.b_gate)", "F.linear(x, flat.gate)", "def _masked_backward("),
    Mutant("host", "out.zero_() if b2 is None else out.copy_(b2)", "out.zero_()"),
    Mutant("host", "_grad_weight(plan, found.gate, x,", "_grad_weight(plan, found.up, x,"),
    Mutant("host", "grad_x.addmm_(grad_z, flat.gate)", "grad_x.addmm_(grad_z, flat.w1)"),
    Mutant("host", "weight(h, grad, experts.w2)", "weight(grad_up, grad, experts.w2)"),
    Mutant("host", "bias(grad_z, experts.b_gate)", "bias(grad_up, experts.b_gate)"),
)  # fmt: skip

OVERFLOW = (
    Mutant("plan", "token.to(tl.int64)[:, None] * E", "token[:, None] * E", "def _selected("),
    Mutant("plan", "block.to(tl.int64) * E", "block * E", COUNT),
    Mutant("plan", "block.to(tl.int64)[:, None] * E", "block[:, None] * E", ADD_BLOCKS),
    Mutant("plan", "token.to(tl.int64)[:, None] * E", "token[:, None] * E", "def _fill("),
    Mutant("forward_kernels", "tl.load(expert_of_tile + tile).to(tl.int64)", "tl.load(expert_of_tile + tile)"),
    Mutant("forward_kernels", "mask=there, other=0).to(tl.int64)", "mask=there, other=0)", "def rows_of("),
    Mutant("forward_kernels", "token = tl.program_id(0).to(tl.int64)", "token = tl.program_id(0)", MASK),
    Mutant("forward_kernels", "token = tl.program_id(0).to(tl.int64)", "token = tl.program_id(0)", REDUCE),
    Mutant("forward_kernels", "other=-1).to(tl.int64)", "other=-1)", REDUCE),
    Mutant("decode_kernels", "expert = (tl.program_id(0) // blocks).to(tl.int64)",
           "expert = tl.program_id(0) // blocks", TOKENS),
    Mutant("decode_kernels", "token.to(tl.int64) * E", "token * E"),
    Mutant("decode_kernels", "there, token.to(tl.int64), neuron", "there, token, neuron"),
    Mutant("decode_kernels", "expert = (tl.program_id(0) // blocks).to(tl.int64)",
           "expert = tl.program_id(0) // blocks", ONE),
    Mutant("threshold_kernels", "row = tl.program_id(0).to(tl.int64)", "row = tl.program_id(0)"),
    Mutant("backward_kernels", "(tl.program_id(0) // column_blocks // neuron_blocks).to(tl.int64)",
           "tl.program_id(0) // column_blocks // neuron_blocks"),
    Mutant("backward_kernels", "mask=there, other=0).to(tl.int64)", "mask=there, other=0)"),
    Mutant("backward_kernels", "token = tl.program_id(0).to(tl.int64)", "token = tl.program_id(0)"),
)  # fmt: skip


def checks(module: str) -> Iterator[Callable[[], None]]:
    """What notices mutants of a module, the quick ones first."""
    yield from checks_int8(module)
    if module == "elementwise":
        for name in ("relu", "relu2", "gelu", "gelu_tanh", "quick_gelu", "silu"):
            yield lambda name=name: check_activation(name)
        for gated in (True, False):
            case = Case(tokens=1, experts=2, neurons=5, gated=gated, share=1.0)
            yield lambda case=case: check_forward(case)
            yield lambda case=case: check_backward(case)
    if module == "threshold_kernels":
        generator = torch.Generator().manual_seed(0)
        exact = torch.randint(0, 50, (6, 21), generator=generator) / 16
        odd = exact.clone()
        odd[0, 3], odd[1, 4] = float("nan"), float("inf")
        odd[2] = torch.tensor([-0.0, 0.0, 1.0]).repeat(7)
        odd[3, 5] = -odd[0, 3]  # as processors make them
        for rule in ("cumulative", "energy", "top_k"):
            for tau in (0.0, 0.3, 0.5, 1.0):
                for scores in (exact, exact.double().square().float() / 64 + 1, odd):
                    yield lambda scores=scores, tau=tau, rule=rule: check_thresholds(scores, tau, rule)
        yield lambda: check_thresholds(torch.arange(22.0)[None], 13 / 22, "top_k")
    tiny = Case(tokens=20, experts=3, neurons=5, activation="relu")
    if module == "plan":
        for levels, score_dtype, experts in ((3, torch.float64, 70), (3, torch.float32, 20), (None, torch.float32, 5)):
            case = Case(tokens=45, experts=experts, neurons=1, levels=levels, score_dtype=score_dtype)
            yield lambda case=case: check_plan(case)
        yield lambda: check_nan(tiny, "scores")
    if module in ("decode_kernels", "host"):
        for tokens in (1, 9):
            for gated in (True, False):
                case = Case(tokens=tokens, experts=4, neurons=18, gated=gated, share=0.6)
                yield lambda case=case: check_forward(case)
    if module in ("forward_kernels", "host"):
        for way in ("fused", "split", "ordered", "spread", "masked"):
            # Two programs: an item and the one that goes on with the next tile are then not the same program's.
            case = Case(tokens=24, experts=3, neurons=20, gated=True, share=0.6, way=way, programs=2)
            yield lambda case=case: check_forward(case)
        yield lambda: check_forward(Case(tokens=18, experts=3, neurons=20, share=0.6))
        yield lambda: check_forward(Case(tokens=18, experts=3, neurons=20, share=0.6, way="ordered", room=4096))
    if module in ("forward_kernels", "backward_kernels", "host"):
        for gated in (True, False):
            for way in ("split", "masked"):
                case = Case(tokens=40, experts=2, neurons=18, gated=gated, share=0.6, way=way)
                yield lambda case=case: check_backward(case)


def products(module: str) -> Iterator[Callable[[], None]]:
    """What notices 32-bit offsets: every kernel is searched for them."""
    from .compiling import CHIPS, every_kernel, products_in_32_bits

    def search() -> None:
        chip, target = CHIPS["sm_90"]
        for one in every_kernel(chip):
            assert not products_in_32_bits(one, target)

    yield search


@contextmanager
def in_place(folder: Path) -> Iterator[None]:
    """Have the package of kernels be the one in `folder`."""

    def forget() -> None:
        for name in [name for name in sys.modules if name == PACKAGE or name.startswith(PACKAGE + ".")]:
            del sys.modules[name]

    forget()
    spec = importlib.util.spec_from_file_location(
        PACKAGE, folder / "__init__.py", submodule_search_locations=[str(folder)]
    )
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[PACKAGE] = module
    spec.loader.exec_module(module)
    try:
        yield
    finally:
        forget()


def verdict(mutant: Mutant | None, folder: Path, found_by: Callable[[str], Iterator[Callable[[], None]]]) -> str:
    """Whether a check fails with a mutant; for None, with none at all."""
    shutil.copytree(SOURCE, folder, ignore=shutil.ignore_patterns("__pycache__"))
    modules = ["elementwise", "threshold_kernels", "plan", "decode_kernels", "forward_kernels", "backward_kernels"]
    modules.append("int8_kernels")
    if mutant is not None:
        mutant.apply(folder)
        modules = [mutant.module]
    with in_place(folder):
        for module in modules:
            for check in found_by(module):
                # Anything else that is raised ends this: a mutant is to be wrong, not to break the check.
                try:
                    check()
                except AssertionError as error:
                    if mutant is None:
                        return f"fails: {error}"
                    return "noticed"
    if mutant is None:
        return "passes"
    return "equivalent" if mutant.equivalent else "survives"


def main(how: str) -> None:
    mutants, found_by = {
        "interpreted": (CALCULATE, checks),
        "interpreted_int8": (CALCULATE_INT8, checks),
        "compiled": (OVERFLOW + OVERFLOW_INT8, products),
    }[how]
    results = {}
    with tempfile.TemporaryDirectory() as scratch:
        for i, mutant in enumerate((None, *mutants)):
            name = "original" if mutant is None else mutant.name
            results[name] = verdict(mutant, Path(scratch) / f"kernels_{i}", found_by)
            sys.stderr.write(f"{name}: {results[name]}\n")
    json.dump(results, sys.stdout)


if __name__ == "__main__":
    main(sys.argv[1])
