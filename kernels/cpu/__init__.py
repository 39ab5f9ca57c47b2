"""The native kernels of the dynamic-k FFN for CPUs, in C++ that is built on this machine when it is first needed.

`backend` calls `ready()` at the operator's first call on a CPU. It builds and loads the library, once per process. If
that fails, it says why once, and the torch backend runs. `SURGEON_CPU=torch` switches the native kernels off.
`SURGEON_CPU=avx2` and the like choose an instruction set.
"""

from __future__ import annotations

import contextlib
import logging
import os
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from surgeon.errors import UsageError
from surgeon.kernels.cpu import crossover, linear_crossover
from surgeon.kernels.cpu.build import BuildError, built, library

log = logging.getLogger("surgeon")

__all__ = ["State", "built", "load", "loaded", "ready", "without_building"]

_lock = threading.Lock()


@dataclass(frozen=True)
class State:
    """The state of the native kernels. path: the library, None if they do not run. why: the reason if they do not."""

    path: Path | None
    why: str = ""

    @property
    def instruction_set(self) -> str:
        """The instruction set that is used, "" if the native kernels do not run."""
        if self.path is None:
            return ""
        wanted = os.environ.get("SURGEON_CPU", "")
        return wanted or torch.ops.surgeon.cpu_instruction_sets()[0]


_state: State | None = None
_may_build = True


def ready() -> bool:
    """Return whether the native kernels run. The first call loads them, and builds them if they were never built."""
    if _state is None and (_may_build or built()):
        load()
    return loaded()


def loaded() -> bool:
    """Whether the native kernels are in PyTorch's dispatcher already."""
    return _state is not None and _state.path is not None


@contextlib.contextmanager
def without_building() -> Iterator[None]:
    """Let the torch backend run, without a warning, if the native kernels would have to be built first."""
    global _may_build
    _may_build = False
    try:
        yield
    finally:
        _may_build = True


def load() -> State:
    """Load the library, and build it first if this machine has none. The result holds for the rest of the process.

    Raises:
        UsageError: `SURGEON_CPU` names an instruction set that this CPU does not have.
    """
    global _state
    with _lock:
        if _state is None:
            _state = _load()
    return _state


def _load() -> State:
    wanted = os.environ.get("SURGEON_CPU", "")
    if wanted == "torch":
        return State(None, "SURGEON_CPU=torch")
    try:
        path = library()
    except BuildError as error:
        log.warning("The torch backend runs instead of the native kernels: %s", error)
        return State(None, str(error))
    if not hasattr(torch.ops.surgeon, "dynamic_k_ffn"):
        # The library would define the operators, and Python could then no longer define them.
        raise RuntimeError("Import surgeon.kernels.dynamic_k before the native kernels are loaded.")
    try:
        torch.ops.load_library(path)  # type: ignore[no-untyped-call]
    except OSError as error:
        log.warning("The torch backend runs instead of the native kernels: %s cannot be loaded: %s", path, error)
        return State(None, f"{path} cannot be loaded: {error}")
    if wanted:
        known = torch.ops.surgeon.cpu_instruction_sets()
        if wanted not in known:
            raise UsageError(f"SURGEON_CPU={wanted}: this CPU has {', '.join(known)}. Choose one of them, or torch.")
        torch.ops.surgeon.cpu_use_instruction_set(wanted)
    crossover.load(path.parent)
    linear_crossover.load(path.parent)
    return State(path)
