"""Sums, means and rows over several processes (`surgeon.processes`).

What is summed over a batch is summed over the processes too (`everywhere`, `mean`), so that a loss is that of the whole
batch, and its gradient, averaged over the processes, is that of one process. With one process the functions do nothing.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from surgeon.processes import count, state


def everywhere(value: Tensor) -> Tensor:
    """Return the sum of a tensor over all processes, with its gradient.

    Whatever is computed from the sum must be computed alike in every process. Its gradients, averaged over the
    processes as accelerate does, are then those of one process that has all the data.
    """
    return value if count() == 1 else _Everywhere.apply(value)  # type: ignore[no-untyped-call]


def mean(values: Tensor) -> Tensor:
    """Return the mean of all values of all processes, a scalar, with its gradient."""
    if count() == 1:
        return values.mean()
    return everywhere(values.sum()) / everywhere(values.new_tensor(values.numel(), dtype=torch.float32))


def variance(values: Tensor) -> Tensor:
    """Return the variance of all values of all processes, divided by their number, a scalar."""
    if count() == 1:
        return values.var(correction=0)
    return mean((values - mean(values)).square())


def largest(values: Tensor) -> Tensor:
    """Return the largest of all values of all processes, a scalar without gradient."""
    if count() == 1:
        return values.amax()
    import torch.distributed as dist

    found = values.detach().amax() if values.numel() else values.new_tensor(-torch.inf)
    moved = found.to(state().device)
    dist.all_reduce(moved, dist.ReduceOp.MAX)
    return moved.to(values.device)


def gathered(values: Tensor) -> Tensor:
    """Return the rows of all processes, in their order: [n of this process, ...] → [n of all, ...]."""
    if count() == 1:
        return values
    from accelerate.utils import gather, pad_across_processes

    device = state().device
    lengths: list[int] = gather(torch.tensor([len(values)], device=device)).tolist()
    padded = gather(pad_across_processes(values.detach().to(device).contiguous()))
    parts = [part[:length] for part, length in zip(padded.split(max(lengths)), lengths, strict=True)]
    return torch.cat(parts).to(values.device)


def send(tensors: list[Tensor]) -> None:
    """Give every process the main process's values of these tensors, in place."""
    if count() == 1:
        return
    from accelerate.utils import broadcast

    device = state().device
    with torch.no_grad():
        for tensor in tensors:
            tensor.copy_(broadcast(tensor.detach().to(device, copy=True).contiguous()).to(tensor.device))


class _Everywhere(torch.autograd.Function):
    """The sum over the processes. Its gradient is the same in each of them, so nothing has to be sent backwards."""

    @staticmethod
    def forward(ctx: Any, value: Tensor) -> Tensor:
        import torch.distributed as dist

        moved = value.detach().to(state().device, copy=True).contiguous()
        dist.all_reduce(moved)
        return moved.to(value.device)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient * count()  # it will be averaged
