"""Several processes that train together, as `accelerate launch` and `torchrun` start them.

Every process makes the same calls and the same random choices, and computes its own part of each batch. What is summed
over a batch is summed over the processes too (`everywhere`, `mean`), so that a loss is that of the whole batch, and its
gradient, averaged over the processes, is that of one process. Only the main process writes and prints.

With one process all functions do nothing, and import nothing.
"""

from __future__ import annotations

import os
from typing import Any

import torch
from torch import Tensor


def count() -> int:
    """Return the number of processes, as their launcher says."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def rank() -> int:
    """Return the number of this process, from 0."""
    return int(os.environ.get("RANK", "0"))


def connect(device: torch.device) -> None:
    """Connect the processes, if there are several: over the device of the model that they work on."""
    if count() > 1:
        from accelerate import PartialState

        PartialState(cpu=device.type == "cpu")


def is_main() -> bool:
    """Whether this process writes and prints."""
    return rank() == 0


def wait() -> None:
    """Wait until every process is here."""
    if count() > 1:
        _state().wait_for_everyone()


def agreed(value: Any) -> Any:
    """Return the main process's value in every process. It is pickled, so it must be small."""
    if count() == 1:
        return value
    from accelerate.utils import broadcast_object_list

    _state()
    return broadcast_object_list([value])[0]


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
    moved = found.to(_state().device)
    dist.all_reduce(moved, dist.ReduceOp.MAX)
    return moved.to(values.device)


def gathered(values: Tensor) -> Tensor:
    """Return the rows of all processes, in their order: [n of this process, ...] → [n of all, ...]."""
    if count() == 1:
        return values
    from accelerate.utils import gather, pad_across_processes

    device = _state().device
    lengths: list[int] = gather(torch.tensor([len(values)], device=device)).tolist()
    padded = gather(pad_across_processes(values.detach().to(device).contiguous()))
    parts = [part[:length] for part, length in zip(padded.split(max(lengths)), lengths, strict=True)]
    return torch.cat(parts).to(values.device)


def send(tensors: list[Tensor]) -> None:
    """Give every process the main process's values of these tensors, in place."""
    if count() == 1:
        return
    from accelerate.utils import broadcast

    device = _state().device
    with torch.no_grad():
        for tensor in tensors:
            tensor.copy_(broadcast(tensor.detach().to(device, copy=True).contiguous()).to(tensor.device))


def leave() -> None:
    """End the connection to the other processes, if there is one."""
    if count() > 1:
        _state().destroy_process_group()


class _Everywhere(torch.autograd.Function):
    """The sum over the processes. Its gradient is the same in each of them, so nothing has to be sent backwards."""

    @staticmethod
    def forward(ctx: Any, value: Tensor) -> Tensor:
        import torch.distributed as dist

        moved = value.detach().to(_state().device, copy=True).contiguous()
        dist.all_reduce(moved)
        return moved.to(value.device)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient * count()  # it will be averaged


def _state() -> Any:
    """The state of accelerate (see `connect`)."""
    from accelerate import PartialState

    return PartialState()
