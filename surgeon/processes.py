"""Several processes that train together, as `accelerate launch` and `torchrun` start them.

Every process makes the same calls and the same random choices, and computes its own part of each batch. Only the main
process writes and prints. `surgeon.collective` adds up what the processes compute.

With one process all functions do nothing, and import nothing.
"""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch


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
        state().wait_for_everyone()


def agreed(value: Any) -> Any:
    """Return the main process's value in every process. It is pickled, so it must be small."""
    if count() == 1:
        return value
    from accelerate.utils import broadcast_object_list

    state()
    return broadcast_object_list([value])[0]


def leave() -> None:
    """End the connection to the other processes, if there is one."""
    if count() > 1 and "accelerate" in sys.modules:
        state().destroy_process_group()


def state() -> Any:
    """The state of accelerate (see `connect`)."""
    from accelerate import PartialState

    return PartialState()
