"""Set tau, selection rule and compensation of a saved surgery, and store them in it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from surgeon.data.batch import first_batches
from surgeon.dynamic.knobs import compensated, get_rule, get_tau, set_rule, set_tau
from surgeon.dynamic.site import no_dynamic
from surgeon.errors import UsageError
from surgeon.graph.traced import TracedGraph
from surgeon.jobs.open_model import Opened
from surgeon.jobs.store import check_target, store
from surgeon.kernels.selection import check_rule
from surgeon.measure.compensation import compensate
from surgeon.moe.site import find_moes
from surgeon.surgery.recipe import parse_by_site
from surgeon.surgery.record import read_record


@dataclass(frozen=True)
class LayerKnobs:
    """The knobs of one layer. compensated: whether the mean output of skipped experts is added.

    rule: None for a linear layer that skips inputs.
    """

    tau: float
    rule: str | None
    compensated: bool


@dataclass(frozen=True)
class KnobChange:
    """The knobs of one layer before and after."""

    before: LayerKnobs
    after: LayerKnobs


@dataclass(frozen=True)
class SetResult:
    """The knobs by the path of a layer's experts, or of what selects its inputs.

    directory: where they were stored; None if nothing was to be set.
    """

    model: str
    directory: Path | None
    layers: dict[str, KnobChange]
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Wanted:
    """What to set: tau and rule by pattern, of which the first match counts, and compensation for all layers."""

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
        UsageError: a value is not a number from 0 to 1, or the text does not have this form.
    """
    return {pattern: _tau(text, value) for pattern, value in _by_pattern("--tau", text).items()}


def _tau(text: str | None, value: str) -> float:
    """One value of `text` as a number."""
    error = UsageError(f"--tau {text}: {value} is not a number from 0 to 1. Write --tau 0.2 or '*.0.*:0.1,*:0.2'.")
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
        UsageError: a rule does not exist, or the text does not have this form.
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
    """Refuse options that cannot work, before the surgery is loaded.

    Raises:
        UsageError: compensation without data, or data without compensation; `out` without anything to store; `out` has
            other content. LoadError: `directory` is not a saved surgery. SaveError: `out` cannot be written to.
    """
    if wanted.compensated and not has_data:
        raise UsageError("--compensate measures the mean output of skipped experts on data. Give --data.")
    if has_data and not wanted.compensated:
        raise UsageError("Only --compensate reads --data. Set tau and rule without it.")
    if out is not None and not wanted.anything:
        raise UsageError("There is nothing to store with -o. Give --tau, --rule or --compensate.")
    read_record(directory)
    if out is not None:
        check_target(out, str(directory), overwrite=False)


def set_wanted(opened: Opened, wanted: Wanted, *, samples: int = 512, out: Path | None = None) -> SetResult:
    """Set and store what is wanted. If nothing is, only return what is set.

    Args:
        samples: number of training samples on which the mean output of skipped experts is measured.
        out: directory for the surgery; by default it replaces the one that was opened.

    Raises:
        UsageError: the graph has no layers that skip, a pattern matches no layer, or experts to compensate are not
            lowered.
        SaveError: as `surgeon.surgery.artifact.save`.
    """
    graph = opened.graph
    before = _settings(graph)
    if not before:
        raise no_dynamic("The model", "there is nothing to set")
    set_tau(graph, wanted.taus)
    if wanted.rules:
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
    """Warn the user of compensation that was dropped, or that added nothing.

    Args:
        earlier: the layers that were compensated before. wanted: whether compensation was asked for now.
    """
    now = compensated(graph)
    if wanted:
        return (
            ()
            if now
            else ("--compensate added nothing: no expert is skipped, or the skipped ones output zero on this data.",)
        )
    dropped = set(earlier) - set(now)
    if not dropped:
        return ()
    return (
        f"Compensation was dropped in {len(dropped)} of {len(find_moes(graph))} layers, which skip other experts now. "
        "To measure it again, give --compensate.",
    )


def _settings(graph: TracedGraph) -> dict[str, LayerKnobs]:
    rules, added = get_rule(graph), set(compensated(graph))
    return {path: LayerKnobs(tau, rules.get(path), path in added) for path, tau in get_tau(graph).items()}
