#!/usr/bin/env bash
# torch 2.13.0: if an example input of torch.export is a slice of another tensor and a size is Dim.AUTO, the exported
# program runs, but run_decompositions() fails: "'NoneType' object has no attribute 'size'". Every exporter that
# decomposes the program first (to ONNX, OpenVINO, AOTInductor) then fails with words about a missing size.
#
# One would guess that only shape, strides and dtype of an example input matter. A copy with the same values, and a
# named Dim for the same size, both work.
#
# What helps: give copies of the example inputs, x.clone().
#
# Output seen:
#     torch 2.13.0+cpu
#     slice, Dim.AUTO: runs, AttributeError: 'NoneType' object has no attribute 'size'
#     slice, named Dim: runs, decomposed
#     copy, Dim.AUTO: runs, decomposed
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.13.0 numpy==2.4.6

cd "$folder"
"$folder/venv/bin/python" - <<'PYTHON'
import logging
import warnings

import torch

logging.disable(logging.CRITICAL)
warnings.simplefilter("ignore")


class Total(torch.nn.Module):
    def forward(self, x):
        return x.sum()


def decomposes(x, size):
    program = torch.export.export(Total(), (x,), dynamic_shapes=({0: size},))
    assert program.module()(x) == x.sum()
    try:
        program.run_decompositions()
    except AttributeError as error:
        return f"AttributeError: {str(error).splitlines()[0]}"
    return "decomposed"


print("torch", torch.__version__)
part = torch.ones(2, 5)[:, :3]
auto, named = torch.export.Dim.AUTO, torch.export.Dim("rows", min=1, max=9)
found = {
    "slice, Dim.AUTO": decomposes(part, auto),
    "slice, named Dim": decomposes(part, named),
    "copy, Dim.AUTO": decomposes(part.clone(), auto),
}
for name, result in found.items():
    print(f"{name}: runs, {result}")

assert found["slice, Dim.AUTO"] == "AttributeError: 'NoneType' object has no attribute 'size'"
assert found["slice, named Dim"] == found["copy, Dim.AUTO"] == "decomposed"
PYTHON
