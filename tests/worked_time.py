"""Time that follows the experts that ran, whatever else the machine does meanwhile."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pytest
from torch.fx import GraphModule, Interpreter, Node

from surgeon.data.batch import Batch
from surgeon.measure.meter import ExpertMeter, _GraphRun
from surgeon.measure.sweep import run_batches
from surgeon.moe.site import find_moes

REST, DENSE = 2.0, 5.0  # milliseconds of all that is no expert, and of a model without experts


def milliseconds(shares: Mapping[str, float]) -> float:
    """Of a call that runs these shares of the layers' experts: the first layer's take 2, every other's 1 in all."""
    return REST + sum(share * (1 if number else 2) for number, share in enumerate(shares.values()))


def replace_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let layers and calls take as long as `milliseconds` says."""
    now = 0.0
    run_node = Interpreter.run_node

    def run_and_take_time(self: Interpreter, node: Node) -> Any:
        nonlocal now
        if isinstance(self, _GraphRun) and node in self._site_of:
            path = self._site_of[node].path
            layers = self.meter.layers
            now += layers[path].share * (1 if list(layers).index(path) else 2) / 1000
        return run_node(self, node)

    def time_settings(
        graph: GraphModule, batch: Batch, choices: Sequence[Callable[[], None]], repeats: int = 1
    ) -> list[float]:
        times = []
        for choose in choices:
            choose()
            meter = ExpertMeter(graph)
            list(run_batches(meter, [batch]))
            times.append(milliseconds({path: layer.share for path, layer in meter.layers.items()}))
        return times if find_moes(graph) else [DENSE for _ in choices]

    monkeypatch.setattr("surgeon.measure.meter.clock", lambda device: now)
    monkeypatch.setattr(Interpreter, "run_node", run_and_take_time)
    for module in ("surgeon.measure.tuning", "surgeon.jobs.sweep", "surgeon.jobs.tune"):
        monkeypatch.setattr(f"{module}.time_settings", time_settings)
