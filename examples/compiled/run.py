"""Run a model that `surgeon compile` made, with nothing but torch: python run.py DIR [TAU].

It runs the example inputs that lie beside the model, and prints how far the outputs are off and the time of a call. TAU
is set in every expert layer first. Then the outputs may differ.
"""

import json
import sys
import time
from pathlib import Path

import torch

directory = Path(sys.argv[1])
about = json.loads((directory / "compiled.json").read_text())
example = torch.load(directory / "example.pt")

library = (directory / "surgeon_cpu.so").resolve()
if library.exists():
    torch.ops.load_library(library)
model = torch._inductor.aoti_load_package(str(directory / "model.pt2"))
if len(sys.argv) > 2:
    tau = torch.tensor(float(sys.argv[2]))
    model.load_constants(dict.fromkeys(about["tau"], tau), check_full_update=False)

# Below the containers of the model's arguments, inputs are tensors in this order: model(input_ids=...) does the same.
outputs = model.loader.run(example["inputs"])
off = max(float((found - wanted).abs().max()) for found, wanted in zip(outputs, example["outputs"], strict=True))
began = time.perf_counter()
for _ in range(20):
    model.loader.run(example["inputs"])
print(json.dumps({"off": off, "milliseconds": 50 * (time.perf_counter() - began)}))
