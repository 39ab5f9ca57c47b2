"""What the operators check of their tensors, and the words for it."""

from __future__ import annotations

import torch
from torch import Tensor

from surgeon.errors import UsageError


def check_tensor(
    op: str, name: str, tensor: Tensor | None, shape: tuple[int, ...], x: Tensor, dtype: torch.dtype | None
) -> None:
    """Check an argument of an operator against the operator's input. None is not checked.

    Args:
        op, name: in words, for the message. shape: the wanted one. dtype: the wanted one, None for any floating one.

    Raises:
        UsageError: the tensor has another shape or dtype, or lies on another device than `x`.
    """
    if tensor is None:
        return
    if tuple(tensor.shape) != shape:
        raise UsageError(f"{op}: {name} has shape {tuple(tensor.shape)}, expected {shape} for x {tuple(x.shape)}")
    if tensor.device != x.device:
        raise UsageError(f"{op}: {name} is on {tensor.device}, x on {x.device}")
    if tensor.dtype != dtype if dtype else not tensor.is_floating_point():
        raise UsageError(f"{op}: {name} is {tensor.dtype}, expected {dtype or 'a floating dtype'}")
