"""The directory where a run keeps its checkpoints.

It also records what the run does, so that only the same run continues from them.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from surgeon.directories import replaced, restore
from surgeon.errors import SaveError, UsageError

RECIPE = "recipe.json"
STATE = "search.json"
"""The trials of a search for settings, if there is one (`surgeon.jobs.search`)."""


class WorkDirectory:
    """The directory `<result>.work` of one run.

    It is removed after success, and after a failure that left no checkpoint.

    Raises:
        UsageError: it has an interrupted run, which is neither to be resumed nor to be dropped; there is no run to
            resume; the interrupted run was another one; or the directory has other content.
        SaveError: the directory cannot be written.
    """

    def __init__(self, result: Path, recipe: dict[str, Any], *, resume: bool, discard: bool) -> None:
        self.path = result.with_name(f"{result.name}.work")
        recipe = json.loads(json.dumps(recipe))
        restore(self.path)
        if self.path.exists() and not (self.path / RECIPE).is_file():
            raise UsageError(f"{self.path} is needed for checkpoints, but has other content. Move it away.")
        if resume:
            self._check_same(recipe)
        elif self.path.exists() and not discard:
            raise UsageError(
                f"{self.path} has the checkpoints of an interrupted run. --resume continues it, --overwrite drops it."
            )
        else:
            try:
                with replaced(self.path) as fresh:
                    (fresh / RECIPE).write_text(json.dumps(recipe, indent=1), encoding="utf-8")
            except OSError as error:
                raise SaveError(f"Cannot write {self.path}: {error.strerror or error}.") from error

    @property
    def has_checkpoint(self) -> bool:
        """Whether there is a checkpoint, or a trial of a search, to continue from."""
        if (self.path / STATE).is_file():
            return True
        # A hidden directory was not put in place before the run was killed.
        return any(not path.parent.name.startswith(".") for path in self.path.rglob("fit.json"))

    def close(self, *, done: bool) -> None:
        """Remove the directory if the run is done or has no checkpoint."""
        if done or not self.has_checkpoint:
            shutil.rmtree(self.path, ignore_errors=True)

    def _check_same(self, recipe: dict[str, Any]) -> None:
        try:
            before = json.loads((self.path / RECIPE).read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise UsageError(f"There is nothing to resume: no {self.path}. Run the command without --resume.") from None
        except (OSError, ValueError, RecursionError) as error:
            raise UsageError(f"{self.path / RECIPE} cannot be read, so this run cannot be resumed: {error}") from error
        if not isinstance(before, dict):
            raise UsageError(f"{self.path / RECIPE} is damaged, so this run cannot be resumed. --overwrite drops it.")
        differing = [key for key in {**before, **recipe} if before.get(key) != recipe.get(key)]
        if differing:
            key = differing[0]
            raise UsageError(
                f"The interrupted run in {self.path} differs from this one. Its {key}: {_short(before.get(key))}; "
                f"now: {_short(recipe.get(key))}. Give the same options to resume it, or --overwrite to drop it."
            )


def _short(value: object) -> str:
    text = json.dumps(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
