#!/usr/bin/env bash
# torch 2.13.0, CPU with AMX: in a bfloat16 matrix product, a NaN or an infinity in one row makes the whole row before it
# NaN too, if the inner size leaves a rest when divided by 32. Of 33 rows of width 50, one has a NaN: two rows of the
# product are NaN. With width 64, or without AMX, it is one.
#
# One would guess that rows of a product do not know of each other: row i of x @ w is x[i] @ w. In a batch, one sample
# that overflows then spoils the answer of another one, and a check per sample blames a sample that was fine. oneDNN
# multiplies here: the tile's rest reaches into the next row, whose numbers meet zeros. Zero times NaN is NaN.
#
# Output seen:
#     torch 2.13.0+cpu
#     AVX512_CORE_AMX: width 50: rows with NaN [3] of x, [2, 3] of x @ w; width 64: [3], [3]
#     AVX512_CORE_AMX, infinity: width 50: rows not finite [3] of x, [2, 3] of x @ w; width 64: [3], [3]
#     AVX512_CORE_BF16: width 50: rows with NaN [3] of x, [3] of x @ w; width 64: [3], [3]
set -euo pipefail

grep -qw amx_bf16 /proc/cpuinfo || { echo "needs a processor with AMX" >&2; exit 1; }
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.13.0 numpy==2.4.6

cat >"$folder/rows.py" <<'PYTHON'
import math
import sys

import torch

name = sys.argv[1]


def rows(width, bad):
    """Which rows are not finite: of x, and of x @ w."""
    torch.manual_seed(0)
    x, w = torch.randn(33, width).bfloat16(), torch.randn(width, 64).bfloat16()
    x[3, 0] = bad
    return [(~values.isfinite()).any(1).nonzero().flatten().tolist() for values in (x, x @ w)]


def line(what, bad, words):
    narrow, wide = rows(50, bad), rows(64, bad)
    print(f"{what}: width 50: {words} {narrow[0]} of x, {narrow[1]} of x @ w; width 64: {wide[0]}, {wide[1]}")
    assert wide == [[3], [3]], "the width of whole tiles was fine"
    return narrow


if name == "AVX512_CORE_AMX":
    print(f"torch {torch.__version__}")
    assert line(name, math.nan, "rows with NaN") == [[3], [2, 3]], "the row before is fine now"
    assert line(f"{name}, infinity", math.inf, "rows not finite") == [[3], [2, 3]], "the row before is fine now"
else:
    assert line(name, math.nan, "rows with NaN") == [[3], [3]], "it spreads without AMX too"
PYTHON
cd "$folder"
for name in AVX512_CORE_AMX AVX512_CORE_BF16; do
  ONEDNN_MAX_CPU_ISA=$name "$folder/venv/bin/python" rows.py "$name"
done
