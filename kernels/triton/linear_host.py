"""Compute linear layers that skip inputs: choose the kernel with its sizes, and launch it."""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from surgeon.kernels.triton import launch
from surgeon.kernels.triton import linear_kernels as _kernels

_PROGRAMS = 4  # for each multiprocessor, so that enough loads are in flight
_COLUMNS, _DEPTH = 128, 32  # of a tile


def sparse_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    scale: Tensor | None,
    centre: Tensor | None,
    levels: Tensor,
    tau: Tensor,
    w_scale: Tensor | None = None,
) -> Tensor:
    """Return the result of `surgeon::sparse_linear` for arguments that `backend.skips_inputs` takes."""
    scale, centre, w_scale = (None if part is None else part.float().contiguous() for part in (scale, centre, w_scale))
    levels, tau = levels.float().contiguous(), tau.float()
    rows, weight, chip = x.reshape(-1, x.shape[-1]).contiguous(), weight.contiguous(), launch.chip(x.device)
    (tokens, d_in), d_out = rows.shape, weight.shape[1]
    out = torch.empty(tokens, d_out, dtype=torch.float32, device=x.device)
    out.zero_() if bias is None else out.copy_(bias)
    blocks, depths = triton.cdiv(d_out, _COLUMNS), triton.cdiv(d_in, _DEPTH)
    wanted = min(depths, triton.cdiv(_PROGRAMS * chip.processors, blocks))
    # A power of two, so that few sizes are compiled.
    steps = triton.next_power_of_2(triton.cdiv(depths, wanted))
    programs = blocks, triton.cdiv(depths, steps)
    given = rows, weight, scale, centre, levels, tau, w_scale, out
    sizes = {"STEPS": steps, "DEPTH": _DEPTH, "COLUMNS": _COLUMNS}
    last = len(levels) - 1
    if tokens == 1:
        launch.launch(_kernels.linear_one, programs, *given, d_in, d_out, last, warps=4, stages=2, **sizes)
    else:
        sizes["ROWS"] = _kernels.MOST_TOKENS
        how = {"PRECISION": launch.precision(x.dtype, chip.backend), "UPCAST": launch.upcasts(x.dtype)}
        launch.launch(
            _kernels.linear_tokens, programs, *given, tokens, d_in, d_out, last, warps=4, stages=2, **sizes, **how
        )
    return out.to(x.dtype).view(*x.shape[:-1], d_out)
