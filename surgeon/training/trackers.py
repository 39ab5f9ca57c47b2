"""Report the losses of fits to trackers such as TensorBoard and Weights & Biases, through accelerate."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from surgeon.errors import UsageError

# Where trackers that write files write them, from the current directory.
DIRECTORY = "runs"


def check_tracker(name: str) -> None:
    """Refuse a tracker that accelerate does not know, or whose package is not installed.

    Raises:
        UsageError: the message lists the known ones, or says what to install.
    """
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS, get_available_trackers

    known = sorted(str(key) for key in LOGGER_TYPE_TO_CLASS)
    if name not in known:
        raise UsageError(f"No tracker '{name}'. accelerate knows {', '.join(known)}.")
    if name not in [str(tracker) for tracker in get_available_trackers()]:
        raise UsageError(f"The tracker {name} is not installed. Install its package: pip install {name}.")


class Tracker:
    """Reports one fit to the tracker of an accelerator; to none if it has none. Only the main process reports."""

    def __init__(self, accelerator: Any, key: str, plan: Mapping[str, Any]) -> None:
        """key: name of the fit, before the name of each value. plan: what to note about it."""
        self._accelerator, self._key = accelerator, key
        if accelerator.log_with:
            known = {name: value for name, value in plan.items() if value is not None}
            accelerator.init_trackers("surgeon", {"fit": key, **known}, {"wandb": {"name": key}})

    def report(self, step: int, values: Mapping[str, float]) -> None:
        """Report the values of a step."""
        if self._accelerator.trackers:
            self._accelerator.log({f"{self._key}/{name}": value for name, value in values.items()}, step=step)

    def close(self) -> None:
        """End the run. accelerate's own `end_training` would also disconnect the processes."""
        for tracker in self._accelerator.trackers:
            tracker.finish()
