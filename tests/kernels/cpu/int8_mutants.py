"""Broken int8 kernels, to see that comparisons as those of `test_int8` notice."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from dataclasses import dataclass
from itertools import product
from pathlib import Path

import torch
from torch import Tensor

import surgeon.kernels
from surgeon.kernels.int8_arguments import Int8Call
from surgeon.kernels.selection import RULES
from tests.kernels.int8_calls import int8_call

SOURCE = Path(surgeon.kernels.__path__[0]) / "cpu"
HOST = Path(__file__).with_name("int8_host.cpp")
HIDDEN, OUTPUT = ("relu", "tanh"), ("abs", "relu", "softplus", "exp", "sigmoid")
ACTIVATIONS = ("relu", "gelu")  # the first ones of `activations.inc`


@dataclass(frozen=True)
class Mutant:
    """`old`, found once in `file`, becomes `new`; in the kernels of the instruction set `kernels`."""

    file: str
    old: str
    new: str
    kernels: str = "int8_portable"

    @property
    def name(self) -> str:
        return f"{self.kernels}, {self.file}: {self.old} → {self.new}"


VNNI, AMX = "int8_avx512_vnni", "int8_amx"
MUTANTS = (
    Mutant("dots.inc", "w[1] = ints(both >> 8)", "w[1] = ints(both >> 7)"),
    Mutant("dots.inc", "spread_group(x + 4), w[1]", "spread_group(x), w[1]"),
    Mutant("dots.inc", "int c = 1; c < CHAINS", "int c = 2; c < CHAINS", VNNI),
    Mutant("dots.inc", "ADDED = 128;", "ADDED = 127;", VNNI),
    Mutant("rows.inc", "0x4b400000", "0x4b3fffff"),
    Mutant("rows.inc", "sum = sum * load_some(layer.y_scale + c, d - c);", ""),
    Mutant("router.inc", "(factor * scale[m]) + bias", "factor + bias"),
    Mutant("experts.inc", "positive ? 255.f : MOST", "positive ? 256.f : MOST"),
    Mutant("experts.inc", "Rounding by(largest_of(largest), positive", "Rounding by(largest_of(largest) / 2, positive"),
    Mutant("experts.inc", "if (is_positive(layer)) down_product", "if (!is_positive(layer)) down_product", VNNI),
    Mutant("tiles_int8.inc", "if (POSITIVE) TILE_POSITIVE(0, 2, 4)", "if (!POSITIVE) TILE_POSITIVE(0, 2, 4)", AMX),
    Mutant("tiles_int8.inc", "memcpy(rest[n], panel[n], left * STEP)", "memcpy(rest[n], panel[n], STEP)", AMX),
    Mutant("trunk_tiles.inc", "TILE_SIGNED(1, 6, 4)", "TILE_SIGNED(1, 6, 5)", AMX),
    Mutant("trunk_tiles.inc", "v & spread_int(0x001f001f)", "v & spread_int(0x000f001f)", AMX),
    Mutant("experts_tiles.inc", "finished + 2 < begun", "finished + 3 < begun", AMX),
    Mutant("experts_tiles.inc", "memset(to + held, 0, bytes - held)", "memset(to + held, 1, bytes - held)", AMX),
    Mutant("unpack.inc", "halves & 0x0f0f0f0fu", "halves & 0x0f0f0f07u"),
    Mutant("unpack.inc", "both << 3 | both << 11) - uint8_t(added)", "both << 3 | both << 11)", VNNI),
    Mutant("unpack.inc", "half ? both >> 4 : both", "both"),
    Mutant("unpack.inc", "w.factors + n * w.groups * LANES", "w.factors"),
    Mutant("unpack.inc", "factors + i * w.groups * LANES", "factors", VNNI),
    Mutant("unpack.inc", "k / AT_ONCE * (M * LINE)", "k / AT_ONCE * LINE", VNNI),
    Mutant("unpack.inc", "half % CHAINS][m][v] =", "0][m][v] ="),
    Mutant("unpack.inc", "store_ints(by[p].whole(both >> 4), at + STEP)", "store_ints(by[p].whole(both), at + STEP)"),
    Mutant("unpack.inc", "factors + e * rows * groups", "factors + e * rows"),
    Mutant("unpack.inc", "unpack(from.gate, s, d_in, scratch + up)", "unpack(from.w1, s, d_in, scratch + up)"),
    Mutant("routed.h", "layer.shared + w * 64", "w * 64"),
    Mutant("routed.h", "< all * part", "< all * (part + 1)"),
    Mutant("routed.h", "first * layer.router.d_in * bytes", "first * layer.d_out * bytes"),
)  # fmt: skip


def calls() -> list[tuple[Int8Call, int]]:
    """Calls with the number of threads."""
    made = []
    for tokens, threads in ((1, 1), (3, 2), (20, 1), (300, 1)):
        for gated, activation, group in product((False, True), ("relu", "gelu"), (None, 32)):
            call = int8_call(
                (tokens,), 5, 40, 70, 50, shared=1, scaled=True, gated=gated, activation=activation, width=20,
                group=group, seed=3,
            )  # fmt: skip
            if tokens == 20:
                call.x[1, 7], call.x[2] = float("inf"), 0.0
            made.append((call, threads))
    return [*made, (int8_call((3,), 60, 64, 100, 100, activation="gelu"), 2)]  # enough weights for two threads


def build(folder: Path, kernels: str, mutant: Mutant | None) -> ctypes.CDLL:
    """Compile a copy of the kernels with the mutant's change.

    Raises:
        CalledProcessError: it does not compile.
    """
    shutil.copytree(SOURCE, folder / "cpu")
    if mutant is not None:
        file = folder / "cpu" / "int8" / mutant.file
        text = file.read_text()
        assert text.count(mutant.old) == 1, mutant.name
        file.write_text(text.replace(mutant.old, mutant.new))
    library = folder / "kernels.so"
    sources = [str(folder / "cpu" / "int8" / f"{kernels}.cpp"), str(HOST)]
    flags = ["-std=c++17", "-O0", "-fPIC", "-shared", f"-I{folder / 'cpu'}", f"-DKERNELS={kernels}"]
    subprocess.run(["c++", *flags, *sources, "-o", str(library)], check=True, capture_output=True)
    return ctypes.CDLL(str(library))


def run(library: ctypes.CDLL, call: Int8Call, threads: int) -> Tensor:
    """The result of a call, [tokens, d_out]."""
    (experts, neurons), d_out, (tokens, d_in) = call.w1_scale.shape, len(call.y_scale), call.x.shape
    y = torch.empty(tokens, d_out)
    tensors = [value for i, value in enumerate(call) if i != 1 and not isinstance(value, str | int)]
    pointers = (ctypes.c_void_p * (len(tensors) + 1))(*(None if t is None else t.data_ptr() for t in (*tensors, y)))
    names = (RULES.index(call.rule), HIDDEN.index(call.hidden), OUTPUT.index(call.output))
    sizes = (
        tokens, d_in, call.fc2.shape[1], experts, call.shared, neurons, d_out, *names,
        ACTIVATIONS.index(call.activation), threads,
        *(0 if factors is None else factors.shape[2] for factors in (call.w1_group, call.w2_group)),
    )  # fmt: skip
    library.run_int8(pointers, (ctypes.c_int64 * len(sizes))(*sizes), ctypes.c_float(float(call.tau)))
    return y


def noticed(library: ctypes.CDLL, step: float) -> bool:
    """Whether a result differs by more than the steps of rounding do: most tokens by none, and all by few."""
    for call, threads in calls():
        found, wanted = run(library, call, threads), torch.ops.surgeon.routed_ffn_int8_torch(*call)
        if not torch.equal(found.isnan(), wanted.isnan()):
            return True
        error = ((found - wanted).abs().amax(-1) / wanted.abs().amax(-1)).nan_to_num()
        if float(error.max()) > step or float((error > 1e-5).double().mean()) > 0.25:
            return True
    return False
