#!/usr/bin/env bash
# torch 2.13.0 and transformers 5.24.0: the flop counter of torch counts 0 for the experts of a mixture-of-experts model,
# for matrix-vector products and for recurrent layers, and says nothing.
#
# One would guess that FlopCounterMode counts matrix products in all their forms, or names those that it has no formula
# for. It has formulas for mm, addmm, bmm, baddbmm, convolutions and attention. The experts of transformers' models run
# as grouped products, for which there is none, so the number for Mixtral is the same however wide its experts are.
#
# Whoever reports the cost of sparse models with this counter, or the share of a layer in the whole, meets this. What
# helps: `custom_mapping` with formulas for these operators.
#
# Output seen:
#     torch 2.13.0+cpu transformers 5.24.0
#     matrix product 2048, matrix-vector product 0, grouped product 0, LSTM 0
#     Mixtral with experts of 64: 150528
#     Mixtral with experts of 512: the same
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.13.0 numpy==2.4.6 transformers==5.24.0

HF_HUB_OFFLINE=1 "$folder/venv/bin/python" - <<'PYTHON'
import sys
import warnings

import torch
import torch.nn.functional as F
import transformers
from torch.utils.flop_counter import FlopCounterMode
from transformers import MixtralConfig, MixtralForCausalLM

warnings.simplefilter("ignore")


def flops(call):
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        call()
    return counter.get_total_flops()


x, w = torch.ones(8, 16, dtype=torch.bfloat16), torch.ones(2, 16, 8, dtype=torch.bfloat16)
ends, lstm = torch.tensor([4, 8], dtype=torch.int32), torch.nn.LSTM(16, 8)
small = {
    "matrix product": flops(lambda: x @ w[0]),
    "matrix-vector product": flops(lambda: x @ w[0, :, 0]),
    "grouped product": flops(lambda: F.grouped_mm(x, w, offs=ends)),
    "LSTM": flops(lambda: lstm(torch.ones(4, 2, 16))),
}


def mixtral(width):
    config = MixtralConfig(
        num_hidden_layers=1, hidden_size=32, num_attention_heads=2, num_key_value_heads=2, intermediate_size=width,
        vocab_size=64, num_local_experts=4,
    )
    model = MixtralForCausalLM(config).eval()
    return flops(lambda: model(torch.ones(2, 6, dtype=torch.long)))


print("torch", torch.__version__, "transformers", transformers.__version__)
print(", ".join(f"{name} {count}" for name, count in small.items()))
narrow, wide = mixtral(64), mixtral(512)
print("Mixtral with experts of 64:", narrow)
print("Mixtral with experts of 512:", "the same" if wide == narrow else wide)
seen = list(small.values()) == [2048, 0, 0, 0] and narrow == wide > 0
sys.exit(0 if seen else "This has changed: the note at the top of the file no longer holds.")
PYTHON
