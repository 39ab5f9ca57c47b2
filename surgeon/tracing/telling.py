"""Tell the progress of tracing: first the export, whose length is not known, then comparisons, which are counted."""

from __future__ import annotations

from dataclasses import dataclass

from surgeon.graph.sizes import Sizes
from surgeon.progress import Progress, ShowProgress

# Calls that a search usually takes: at other sizes for each that may change, and for each input that may be missing.
_FOR_EACH_SIZE, _FOR_EACH_INPUT = 7, 3


@dataclass
class Steps:
    """Counts the calls in which a graph is compared with its model.

    name: of the model. The total is an estimate until the end.
    """

    name: str
    progress: ShowProgress = None
    done: int = 0
    total: int = 0

    def exporting(self) -> None:
        """Say that an export begins."""
        self._tell(Progress(f"tracing {self.name}", 0, 0))

    def comparing(self, sizes: Sizes) -> None:
        """Say that comparisons of a graph with these sizes begin."""
        self.done = 0
        self.total = _FOR_EACH_SIZE * len(sizes.axes) + _FOR_EACH_INPUT * len(sizes.inputs)

    def step(self) -> None:
        """Count one comparison."""
        self.done += 1
        self.total = max(self.total, self.done + 1)
        self._tell(self._moment())

    def end(self) -> None:
        """Say that there are no more."""
        if self.done:
            self.total = self.done
            self._tell(self._moment())

    def _moment(self) -> Progress:
        return Progress(f"tracing {self.name}", self.done, self.total)

    def _tell(self, moment: Progress) -> None:
        if callable(self.progress):
            self.progress(moment)
