"""What a pickled file may name: what torch's restricted reader allows, and classes that are registered with pytree."""

from __future__ import annotations

import io
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from torch.utils import _pytree as pytree

TRUST = {"python": "If you trust it: trust_pickle=True.", "command": "If you trust it: --trust-pickle."}
"""What to do about a file that holds pickled code, for an error."""
_READ_BY_TORCH = ("builtins", "collections", "torch")


def unsafe_globals(file: Path | io.BytesIO) -> list[str] | None:
    """Return the names in a `torch.save` archive that torch's restricted reader would refuse; None if unknown."""
    try:
        return sorted(torch.serialization.get_unsafe_globals_in_checkpoint(file))
    except Exception:  # an unknown opcode or layout
        return None


def allowing_registered_classes() -> AbstractContextManager[object]:
    """Let torch's restricted reader make the classes that are registered with pytree, such as a model's own inputs.

    A class is registered by the module that defines it, so the user has imported or named that module.
    """
    kinds: list[Any] = [
        kind for kind in pytree.SUPPORTED_NODES if kind.__module__.partition(".")[0] not in _READ_BY_TORCH
    ]
    return torch.serialization.safe_globals(kinds)
