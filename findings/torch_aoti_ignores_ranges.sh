#!/usr/bin/env bash
# torch 2.13.0: a package that AOTInductor compiles from an exported program does not check the sizes that the program
# does. A size outside the program's range gives an output, and not the model's.
#
# One would guess that the conditions of a program hold for what is compiled from it. The exported program itself, saved
# and loaded or not, refuses the size ("Guard failed"). The package runs the path that was traced: the model crops long
# inputs, and the package does not. There is no error and no warning, when it is compiled or when it is called.
#
# What helps: AOTI_RUNTIME_CHECK_INPUTS=1 in the environment of the process that loads and calls the package.
#
# Output seen:
#     torch 2.13.0+cpu
#     model at 40: (2, 16)
#     program at 40: AssertionError, Guard failed: x.size()[1] <= 16
#     package at 40: (2, 40)
#     package with AOTI_RUNTIME_CHECK_INPUTS=1 at 40: RuntimeError
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.13.0 numpy==2.4.6 setuptools

cat > "$folder/try.py" <<'PYTHON'
import logging
import os
import sys
import warnings

import torch
from torch.export import Dim, export

logging.disable(logging.CRITICAL)
warnings.simplefilter("ignore")


class Crop(torch.nn.Module):
    def forward(self, x):
        return (x[:, -16:] if x.shape[1] > 16 else x) * 2


def shape_or_error(call):
    try:
        return str(tuple(call(torch.ones(2, 40)).shape))
    except Exception as error:
        first = str(error).strip().splitlines()[0]
        return type(error).__name__ + (f", {first}" if first.startswith("Guard failed") else "")


model, folder, checks = Crop().eval(), sys.argv[1], "AOTI_RUNTIME_CHECK_INPUTS" in os.environ
program = export(model, (torch.ones(2, 8),), dynamic_shapes=({0: Dim.AUTO, 1: Dim.AUTO},))
path = torch._inductor.aoti_compile_and_package(program, package_path=f"{folder}/model{int(checks)}.pt2")
package = torch._inductor.aoti_load_package(path)
assert torch.equal(package(torch.ones(3, 9)), model(torch.ones(3, 9)))
if checks:
    found = shape_or_error(package)
    print("package with AOTI_RUNTIME_CHECK_INPUTS=1 at 40:", found)
    sys.exit(0 if found == "RuntimeError" else "This has changed: the note at the top of the file no longer holds.")
print("torch", torch.__version__)
found = [shape_or_error(model), shape_or_error(program.module()), shape_or_error(package)]
for name, result in zip(("model", "program", "package"), found, strict=True):
    print(f"{name} at 40:", result)
wanted = ["(2, 16)", "AssertionError, Guard failed: x.size()[1] <= 16", "(2, 40)"]
sys.exit(0 if found == wanted else "This has changed: the note at the top of the file no longer holds.")
PYTHON

"$folder/venv/bin/python" "$folder/try.py" "$folder" 2>/dev/null
AOTI_RUNTIME_CHECK_INPUTS=1 "$folder/venv/bin/python" "$folder/try.py" "$folder" 2>/dev/null
