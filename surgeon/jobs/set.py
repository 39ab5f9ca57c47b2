"""Set the knobs of a saved surgery, tau, selection rule and compensation, and store them in it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from surgeon.data.batch import first_batches
from surgeon.errors import UsageError
from surgeon.graph.traced import TracedGraph
from surgeon.jobs.open_model import Opened
from surgeon.jobs.store import check_target, store
from surgeon.kernels.selection import check_rule
from surgeon.measure.compensation import compensate
from surgeon.moe.knobs import compensated, get_rule, get_tau, set_rule, set_tau
from surgeon.moe.site import find_moes
from surgeon.surgery.recipe import parse_by_site
from surgeon.surgery.record import read_record


@dataclass(frozen=True)
class LayerKnobs:
    """What is set for one layer. compensated: whether the mean of what it skips is added."""

    tau: float
    rule: str
    compensated: bool


@dataclass(frozen=True)
class KnobChange:
    """What was set for one layer before, and what is now."""

    before: LayerKnobs
    after: LayerKnobs


@dataclass(frozen=True)
class SetResult:
    """What is set, by the path of a layer's experts, and where it was stored, None if nothing was asked for."""

    model: str
    directory: Path | None
    layers: dict[str, KnobChange]
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Wanted:
    """What is to be set: tau and rule by pattern, of which the first that fits counts; compensation for all layers."""

    taus: dict[str, float]
    rules: dict[str, str]
    compensated: bool = False

    @property
    def anything(self) -> bool:
        """Whether there is something to set."""
        return bool(self.taus or self.rules or self.compensated)


def parse_tau(text: str | None) -> dict[str, float]:
    """`"0.2"` → {"*": 0.2}; `"*.0.*:0.1,*:0.2"` → {"*.0.*": 0.1, "*": 0.2}.

    Raises:
        UsageError: not numbers from 0 to 1, or not of this form.
    """
    return {pattern: _tau(text, value) for pattern, value in _by_pattern("--tau", text).items()}


def _tau(text: str | None, value: str) -> float:
    """The number that stands for one layer in `text`."""
    error = UsageError(f"--tau {text}: {value} is no number from 0 to 1. Write --tau 0.2 or '*.0.*:0.1,*:0.2'.")
    try:
        tau = float(value)
    except ValueError:
        raise error from None
    if not 0.0 <= tau <= 1.0:
        raise error
    return tau


def parse_rule(text: str | None) -> dict[str, str]:
    """`"top_k"` → {"*": "top_k"}; patterns as in `parse_tau`.

    Raises:
        UsageError: there is no such rule, or not of this form.
    """
    found = _by_pattern("--rule", text)
    for rule in found.values():
        check_rule(rule)
    return found


def _by_pattern(name: str, text: str | None) -> dict[str, str]:
    if text is None:
        return {}
    return parse_by_site(f"{name} ", text) if ":" in text else {"*": text.strip()}


def check_wanted(directory: Path, wanted: Wanted, *, has_data: bool, out: Path | None) -> None:
    """Refuse what cannot work before the surgery is loaded.

    Raises:
        UsageError: data without compensation or the other way round; a place without anything to store; a place that is
            taken. LoadError: no saved surgery. SaveError: the place cannot be written to.
    """
    if wanted.compensated and not has_data:
        raise UsageError("--compensate takes the mean of what is skipped over some data: give it with --data.")
    if has_data and not wanted.compensated:
        raise UsageError("--data is read for --compensate only: tau and rule are set without data.")
    if out is not None and not wanted.anything:
        raise UsageError("There is nothing to store with -o: give --tau, --rule or --compensate.")
    read_record(directory)
    if out is not None:
        check_target(out, str(directory), overwrite=False)


def set_wanted(opened: Opened, wanted: Wanted, *, samples: int = 512, out: Path | None = None) -> SetResult:
    """Set what is wanted and store it; without anything wanted, only tell what is set.

    Args:
        samples: of the training data, over which the mean of what is skipped is taken.
        out: where the surgery goes then; by default it replaces the one that was opened.

    Raises:
        UsageError: the graph has no experts, a pattern names no layer, or compensation of experts that are not lowered.
        SaveError: as `surgeon.surgery.artifact.save`.
    """
    graph = opened.graph
    before = _settings(graph)
    if not before:
        raise UsageError("The graph has no experts to set anything for. Apply moeify first.")
    set_tau(graph, wanted.taus)
    set_rule(graph, wanted.rules)
    if wanted.compensated:
        assert opened.data is not None
        compensate(graph, first_batches(opened.data.train, samples))
    layers = {path: KnobChange(before[path], after) for path, after in _settings(graph).items()}
    earlier = [path for path, setting in before.items() if setting.compensated]
    notes = compensation_notes(graph, earlier, wanted=wanted.compensated)
    directory = store(opened, out) if wanted.anything else None
    return SetResult(opened.spec, directory, layers, notes)


def compensation_notes(graph: TracedGraph, earlier: Sequence[str], *, wanted: bool) -> tuple[str, ...]:
    """What the user may not expect: compensation that is gone, or had nothing to add.

    Args:
        earlier: the layers that were compensated before. wanted: whether it was asked for now.
    """
    now = compensated(graph)
    if wanted:
        return (
            ()
            if now
            else ("--compensate added nothing: no expert is skipped, or those that are give nothing on this data.",)
        )
    dropped = set(earlier) - set(now)
    if not dropped:
        return ()
    return (
        f"Compensation was dropped in {len(dropped)} of {len(find_moes(graph))} layers, which skip other experts now; "
        "--compensate takes the mean anew.",
    )


def _settings(graph: TracedGraph) -> dict[str, LayerKnobs]:
    rules, added = get_rule(graph), set(compensated(graph))
    return {path: LayerKnobs(tau, rules[path], path in added) for path, tau in get_tau(graph).items()}
