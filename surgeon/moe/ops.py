"""The custom ops of experts, as targets of graph nodes. Importing this module registers them."""

from __future__ import annotations

import torch

import surgeon.kernels.dynamic_k
import surgeon.kernels.int8  # noqa: F401  (they register the ops)

dynamic_k_ffn = torch.ops.surgeon.dynamic_k_ffn.default
routed_ffn_int8 = torch.ops.surgeon.routed_ffn_int8.default
masked_ffn = torch.ops.surgeon.masked_ffn.default
selection_threshold = torch.ops.surgeon.selection_threshold.default
