#!/usr/bin/env bash
# torch 2.13.0, ml_dtypes 0.5.4: converting to float8_e4m3fn in torch turns infinity into 448, the largest number of the
# format, so an overflow or a broken weight can no longer be seen in the result. The other float8 formats of torch keep
# infinity or make it NaN, and ml_dtypes, which JAX and ONNX use, makes it NaN in float8_e4m3fn as well.
#
# One would guess NaN: the format has no infinity but has a NaN, the other three formats of torch behave so, and a plain
# conversion is no saturating one elsewhere in torch. A model whose activations overflow before they are quantised gives
# finite answers, and a file of weights that one library wrote reads differently from the other's.
#
# What helps: check that values are finite before they are converted (isfinite does not exist for float8 on CPUs), and
# scale by the largest absolute value.
#
# Output seen:
#     torch 2.13.0+cpu, ml_dtypes 0.5.4
#                        float8_e4m3fn  float8_e5m2  float8_e4m3fnuz  float8_e5m2fnuz
#     torch, 1e6                 448.0          inf              nan              nan
#     torch, infinity            448.0          inf              nan              nan
#     ml_dtypes, 1e6               nan          inf              nan              nan
#     ml_dtypes, infinity          nan          inf              nan              nan
#     isfinite of the result: NotImplementedError
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.13.0 numpy==2.4.6 ml_dtypes==0.5.4

"$folder/venv/bin/python" - <<'PYTHON'
import ml_dtypes
import numpy as np
import torch

FORMATS = ("float8_e4m3fn", "float8_e5m2", "float8_e4m3fnuz", "float8_e5m2fnuz")
found = {}
for label, value in (("1e6", 1e6), ("infinity", float("inf"))):
    given = np.array([value], dtype=np.float32)
    found["torch", label] = [torch.from_numpy(given).to(getattr(torch, name)).float().item() for name in FORMATS]
    with np.errstate(all="ignore"):
        found["ml_dtypes", label] = [float(given.astype(getattr(ml_dtypes, name))[0]) for name in FORMATS]

print(f"torch {torch.__version__}, ml_dtypes {ml_dtypes.__version__}")
print(" " * 19 + "  ".join(FORMATS))
for library in ("torch", "ml_dtypes"):
    for label in ("1e6", "infinity"):
        cells = (f"{number:>{len(name)}}" for number, name in zip(found[library, label], FORMATS, strict=True))
        print(f"{f'{library}, {label}':<19}" + "  ".join(cells))
try:
    torch.isfinite(torch.ones(1).to(torch.float8_e4m3fn))
    raised = "none"
except NotImplementedError as error:
    raised = type(error).__name__
print("isfinite of the result:", raised)

as_seen = raised == "NotImplementedError"
for label in ("1e6", "infinity"):
    first, second, *others = found["torch", label]
    as_seen &= first == 448 and second == float("inf") and bool(np.isnan(others).all())
    first, second, *others = found["ml_dtypes", label]
    as_seen &= bool(np.isnan(first)) and second == float("inf") and bool(np.isnan(others).all())
raise SystemExit(0 if as_seen else "it behaves otherwise now")
PYTHON
