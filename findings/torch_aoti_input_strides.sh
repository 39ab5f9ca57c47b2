#!/usr/bin/env bash
# torch 2.13.0, CPU: a package of AOTInductor reads its inputs with the strides of the example that it was exported with.
# A transposed tensor of the right shape is read in the order of its memory, and the numbers are wrong. No error and no
# warning. The exported program itself, and torch.compile, compute what eager does. A linear layer alone is right, since
# it is not generated code.
#
# One would guess that a tensor's strides are its own matter, as everywhere in PyTorch, or that an input which the code
# cannot read is refused. There is such a check, but only with AOTI_RUNTIME_CHECK_INPUTS=1, and not by default.
#
# Output seen:
#     torch 2.13.0+cpu
#     x + arange: largest difference from eager 0.0 if contiguous, 2.0 if transposed; read as it lies in memory: True
#     linear: largest difference from eager 0.0 if contiguous, 0.0 if transposed
#     torch.compile: 0.0
#     with AOTI_RUNTIME_CHECK_INPUTS=1: refused
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.13.0 numpy==2.4.6 setuptools==80.9.0

cat >"$folder/strides.py" <<'PYTHON'
import os
import sys

import torch
from torch import nn


class Shifted(nn.Module):
    """The rows of a table, and what their places add."""

    def forward(self, x):
        return x + torch.arange(6.0).view(2, 3)


def package(model, x, name):
    exported = torch.export.export(model, (x,))
    assert torch.equal(exported.module()(turned(x)), model(turned(x))), "the exported program differs from eager"
    return torch._inductor.aoti_compile_and_package(exported, package_path=os.path.abspath(f"{name}.pt2"))


def turned(x):
    """The same numbers in the same shape, stored by columns."""
    return x.t().contiguous().t()


def apart(run, model, x):
    return float((run(x) - model(x)).abs().max())


x = torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]])
shifted = Shifted()
with torch.no_grad():
    if len(sys.argv) == 1:
        print(f"torch {torch.__version__}")
        run = torch._inductor.aoti_load_package(package(shifted, x, "shifted"))
        plain, other = apart(run, shifted, x), apart(run, shifted, turned(x))
        order = torch.equal(run(turned(x)), shifted(turned(x).as_strided((2, 3), (3, 1))))
        print(
            f"x + arange: largest difference from eager {plain} if contiguous, {other} if transposed; "
            f"read as it lies in memory: {order}"
        )
        assert plain == 0 and other > 1 and order, "strides are heeded now"
        torch.manual_seed(0)
        linear, square = nn.Linear(4, 4).eval(), torch.randn(4, 4)
        run = torch._inductor.aoti_load_package(package(linear, square, "linear"))
        plain, other = apart(run, linear, square), apart(run, linear, turned(square))
        print(f"linear: largest difference from eager {plain} if contiguous, {other} if transposed")
        assert plain < 1e-6 and other < 1e-6, "a linear layer was right"
        compiled = torch.compile(shifted)
        compiled(x)
        print(f"torch.compile: {apart(compiled, shifted, turned(x))}")
        assert apart(compiled, shifted, turned(x)) == 0, "torch.compile was right"
    else:
        run = torch._inductor.aoti_load_package(os.path.abspath("shifted.pt2"))
        try:
            run(turned(x))
        except RuntimeError:
            print("with AOTI_RUNTIME_CHECK_INPUTS=1: refused")
        else:
            raise SystemExit("the check lets it pass now")
PYTHON
cd "$folder"
venv/bin/python -W ignore strides.py
AOTI_RUNTIME_CHECK_INPUTS=1 venv/bin/python -W ignore strides.py check 2>/dev/null
