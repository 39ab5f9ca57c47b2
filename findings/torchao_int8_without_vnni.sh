#!/usr/bin/env bash
# torchao 0.18.0, torch 2.13.0, CPU: where the processor has no dot products of bytes (VNNI), a linear quantised with
# Int8DynamicActivationInt8WeightConfig gives other numbers, because sums of two products are cut off at 16 bits. With
# weights and inputs of one all over, 64 inputs add up to 0.5 and not to 64. With random weights the error is eight times
# as large.
#
# One would guess that the sums are exact, as int8 times int8 adds up in int32 everywhere, so that a model whose accuracy
# was measured on one machine has it on all. oneDNN, which multiplies, says that its own functions may saturate on such
# processors; torch._int_mm and torchao say nothing.
#
# ONEDNN_MAX_CPU_ISA makes oneDNN run as on the older processor, so this shows on any with AVX-512 VNNI.
#
# Output seen (‖difference‖ / ‖output‖ from the linear in float32):
#     torch 2.13.0+cpu, torchao 0.18.0
#     AVX512_CORE_VNNI: ones 63.5 for 64, normal weights off by 0.009
#     AVX512_CORE: ones 0.5 for 64, normal weights off by 0.069
#     AVX2: ones 0.5 for 64, normal weights off by 0.069
set -euo pipefail

grep -qw avx512_vnni /proc/cpuinfo || { echo "needs a processor with AVX-512 VNNI" >&2; exit 1; }
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.13.0 torchao==0.18.0 numpy==2.4.6

cat >"$folder/saturate.py" <<'PYTHON'
import sys

import torch
import torchao
from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_

name = sys.argv[1]
if name == "AVX512_CORE_VNNI":
    print(f"torch {torch.__version__}, torchao {torchao.__version__}")
torch.manual_seed(0)


def run(weight, x):
    linear = torch.nn.Linear(64, 64, bias=False)
    linear.weight.data = weight
    wanted = linear(x)
    quantize_(linear, Int8DynamicActivationInt8WeightConfig())
    found = linear(x)
    return float(found[0, 0]), float((found - wanted).norm() / wanted.norm())


total, _ = run(torch.ones(64, 64), torch.ones(32, 64))
_, error = run(torch.randn(64, 64), torch.randn(32, 64))
print(f"{name}: ones {total:.1f} for 64, normal weights off by {error:.3f}")
if name == "AVX512_CORE_VNNI":
    assert abs(total - 64) < 1 and error < 0.02, "exact"
else:
    assert total < 1 and error > 0.05, "nothing is cut off now"
PYTHON
cd "$folder"
for name in AVX512_CORE_VNNI AVX512_CORE AVX2; do
  ONEDNN_MAX_CPU_ISA=$name "$folder/venv/bin/python" saturate.py "$name" 2>"$folder/log" ||
    { cat "$folder/log" >&2; exit 1; }
done
