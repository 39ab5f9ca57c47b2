#!/usr/bin/env bash
# torch 2.13.0: AOTInductor packages let constants be replaced after compilation (load_constants), but a buffer of up to
# eight elements is not among them. It is written into the code as literals, so a threshold or a scale that was made a
# buffer in order to stay adjustable is fixed. Its name is then unknown to load_constants.
#
# One would guess that every buffer of the exported program is a constant of the package: the program lists all of them
# in its state dict, and torch.export keeps each as an input of the graph.
#
# What helps: the inductor option {"always_keep_tensor_constants": True} for the compilation.
#
# Output seen:
#     torch 2.13.0+cpu
#     buffers of the program: ['b1', 'b8', 'b9']
#     constants of the package: ['b9']
#     always_keep_tensor_constants: ['b1', 'b8', 'b9']
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


class Model(torch.nn.Module):
    def __init__(self):
        super().__init__()
        for size in (1, 8, 9):
            self.register_buffer(f"b{size}", torch.arange(size) + 1.0)

    def forward(self, x):
        return x * self.b1, x[:8] * self.b8, x[:9] * self.b9


program = torch.export.export(Model(), (torch.ones(16),))
constants = {}
for name, options in (("plain", {}), ("kept", {"always_keep_tensor_constants": True})):
    path = torch._inductor.aoti_compile_and_package(program, package_path=f"{name}.pt2", inductor_configs=options)
    constants[name] = sorted(torch._inductor.aoti_load_package(path).get_constant_fqns())
print("torch", torch.__version__)
print("buffers of the program:", sorted(program.state_dict))
print("constants of the package:", constants["plain"])
print("always_keep_tensor_constants:", constants["kept"])
assert sorted(program.state_dict) == ["b1", "b8", "b9"]
assert constants == {"plain": ["b9"], "kept": ["b1", "b8", "b9"]}
PYTHON
