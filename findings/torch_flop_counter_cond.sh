#!/usr/bin/env bash
# torch 2.13.0: counting the operations of an exported program that branches with torch.cond fails, if a branch reads a
# parameter. The program itself runs, also without gradients.
#
# One would guess that a counter changes nothing about what runs, and that torch.no_grad() or inference_mode() keeps
# autograd out of it. FlopCounterMode hooks every module to follow the hierarchy, with a hook for backward on each
# input that requires gradients. A branch of an exported cond is a module that gets the parameter as an input, in a place
# where nothing is recorded for backward: "'NoneType' object has no attribute 'next_functions'".
#
# What helps: no parameter that requires gradients while the operations are counted.
#
# Output seen:
#     torch 2.13.0+cpu
#     the program runs without gradients
#     counted with no_grad: AttributeError
#     counted with inference_mode: AttributeError
#     counted with parameters that need no gradients: 8192
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.13.0 numpy==2.4.6

"$folder/venv/bin/python" - <<'PYTHON'
import sys
import warnings

import torch
from torch.utils.flop_counter import FlopCounterMode

warnings.simplefilter("ignore")


class Branch(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(16, 16))

    def forward(self, x):
        return torch.cond(x.sum() > 0, lambda x: x @ self.weight, lambda x: x @ self.weight * 2, (x,))


def counted(mode):
    try:
        with mode(), FlopCounterMode(display=False) as counter:
            program(x)
        return counter.get_total_flops()
    except AttributeError as error:
        return type(error).__name__


x = torch.ones(16, 16)
program = torch.export.export(Branch().eval(), (x,)).module()
print("torch", torch.__version__)
with torch.no_grad():
    assert torch.equal(program(x), torch.full((16, 16), 16.0))
print("the program runs without gradients")
found = [counted(torch.no_grad), counted(torch.inference_mode)]
print("counted with no_grad:", found[0])
print("counted with inference_mode:", found[1])
program.requires_grad_(False)
found.append(counted(torch.no_grad))
print("counted with parameters that need no gradients:", found[2])
seen = found == ["AttributeError", "AttributeError", 8192]
sys.exit(0 if seen else "This has changed: the note at the top of the file no longer holds.")
PYTHON
