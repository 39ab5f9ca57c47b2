#!/usr/bin/env bash
# transformers 5.24.0: a checkpoint whose config.json names a quantization method that transformers does not know is
# loaded all the same. from_pretrained logs a warning, takes the weights whose names it finds, and fills every other
# module with random values. No exception is raised, so a program that does not read logs runs a model with random
# layers. One would guess an error, as for an unknown model_type.
#
# What helps: state in the model card which package has to be imported first, and check for missing keys
# (output_loading_info=True) wherever a checkpoint of an unknown format may turn up.
#
# Output seen:
#     warned: True | no exception | two loads differ: True
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q torch==2.13.0 transformers==5.24.0
cat > "$work/check.py" <<'P'
import json
import logging
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel
from transformers.utils import logging as transformers_logging

directory = Path(sys.argv[1])
torch.manual_seed(0)
GPT2LMHeadModel(GPT2Config(n_layer=1, n_head=2, n_embd=16, vocab_size=32, bos_token_id=0, eos_token_id=0)).save_pretrained(directory)
# A format of its own: the feed-forward layer's first weight is stored under another name.
weights = load_file(directory / "model.safetensors")
weights["transformer.h.0.mlp.c_fc.packed"] = weights.pop("transformer.h.0.mlp.c_fc.weight")
save_file(weights, directory / "model.safetensors", metadata={"format": "pt"})
config = json.loads((directory / "config.json").read_text())
config["quantization_config"] = {"quant_method": "nobody-knows-this"}
(directory / "config.json").write_text(json.dumps(config))

heard: list[str] = []
handler = logging.Handler()
handler.emit = lambda record: heard.append(record.getMessage())
transformers_logging.add_handler(handler)
first, second = (AutoModelForCausalLM.from_pretrained(directory) for _ in range(2))
warned = any("Unknown quantization type, got nobody-knows-this" in line for line in heard)
random = not torch.equal(first.transformer.h[0].mlp.c_fc.weight, second.transformer.h[0].mlp.c_fc.weight)
print("warned:", warned, "| no exception | two loads differ:", random)
assert warned and random
P
HF_HUB_OFFLINE=1 "$work/venv/bin/python" "$work/check.py" "$work/model" 2> "$work/log" || { tail -5 "$work/log"; exit 1; }
