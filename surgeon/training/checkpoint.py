"""The state of a fit on disk, from which an interrupted fit continues."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any, Protocol

from surgeon.directories import replaced, restore
from surgeon.errors import LoadError, SaveError, first_line
from surgeon.processes import agreed, is_main, wait

History = list[tuple[int, dict[str, float]]]


class Stateful(Protocol):
    """An object whose state can be saved in a checkpoint."""

    def state_dict(self) -> dict[str, Any]:
        """Return the state."""

    def load_state_dict(self, state: dict[str, Any]) -> Any:
        """Restore a state."""


class Checkpoint:
    """The checkpoint of a fit in its directory. A new one replaces the earlier one whole, or not at all.

    Args:
        accelerator: it prepared the optimiser. kept: what else is saved. directory: None to save nothing.
    """

    def __init__(self, accelerator: Any, kept: Sequence[Stateful], directory: Path | None) -> None:
        self._accelerator, self._directory = accelerator, directory
        self._step = 0
        accelerator.register_for_checkpointing(*kept)

    def save(self, step: int, history: History) -> None:
        """Save the state after a step.

        Raises:
            SaveError: it cannot be written, for example on a full disk. The earlier checkpoint stays.
        """
        if self._directory is None:
            return
        kept = f"The checkpoint of step {self._step} was kept." if self._step else "There is no earlier checkpoint."
        failure = f"The checkpoint of step {step} cannot be written to {self._directory}"
        # The main process makes the directory. The others write their random states into it.
        with saving(failure, kept), replaced(self._directory) if is_main() else nullcontext() as fresh:
            fresh = Path(agreed(str(fresh)))
            self._accelerator.save_state(str(fresh), safe_serialization=False)
            if is_main():
                (fresh / "fit.json").write_text(json.dumps({"step": step, "history": history}))
            wait()
        wait()
        self._step = step

    def restore(self) -> tuple[int, History]:
        """Load the state. Returns the step and the history; 0 and nothing if there is no checkpoint.

        Raises:
            LoadError: the checkpoint is damaged, or is one of another fit.
        """
        if self._directory is None:
            return 0, []
        if is_main():
            restore(self._directory)
        wait()
        if not (self._directory / "fit.json").exists():
            return 0, []
        try:
            self._accelerator.load_state(str(self._directory))
            state = json.loads((self._directory / "fit.json").read_text())
            self._step = int(state["step"])
            return self._step, [(int(step), dict(values)) for step, values in state["history"]]
        except Exception as error:  # accelerate and torch raise many kinds
            raise LoadError(
                f"The checkpoint in {self._directory} is damaged: {first_line(error)}.",
                python="Start again without resume=True.",
                command="Start again without --resume.",
            ) from error


@contextlib.contextmanager
def saving(failure: str, kept: str = "") -> Iterator[None]:
    """Turn failures of writing into a SaveError: what failed, why, what was kept, and what to do."""
    try:
        yield
    except (OSError, RuntimeError) as error:  # torch's own file writer raises RuntimeError on a full disk
        reason = error.strerror if isinstance(error, OSError) and error.strerror else first_line(error)
        text = " ".join(part for part in (f"{failure}: {reason}.", kept, "Make space for it, and continue") if part)
        raise SaveError(text, python="with resume=True.", command="with --resume.") from error
