"""Measure what a picture shows of a saved surgery."""

from __future__ import annotations

from typing import Literal, get_args

from surgeon.dynamic.knobs import get_tau
from surgeon.dynamic.site import find_dynamic
from surgeon.errors import UsageError
from surgeon.jobs.evaluation import eval_batches
from surgeon.jobs.load import LoadMap, sample_maps
from surgeon.jobs.open_model import Opened
from surgeon.jobs.sweep import Swept, sweep
from surgeon.measure.load import LayerLoad, measure_load
from surgeon.measure.routing import RouterLayer, measure_routing
from surgeon.moe.site import find_moes
from surgeon.progress import Tell
from surgeon.surgery.record import Record
from surgeon.surgery.trials import Trial
from surgeon.training.penalty import Sparsity

Kind = Literal["pareto", "layers", "experts", "routers", "compute", "sparsity", "ablation"]
KINDS: tuple[Kind, ...] = get_args(Kind)

RECORDED: frozenset[Kind] = frozenset({"sparsity", "ablation"})
"""Those that are drawn from the record, without data."""

# At which every layer alone is measured, if no others are given.
_ALONE = (0.1, 0.3, 0.6)

Measured = Swept | list[LayerLoad] | list[RouterLayer] | list[LoadMap]
Told = Tell | None


def measured(kind: Kind, opened: Opened, progress: Told = None) -> Measured:
    """Measure on the held-out data what a picture of this kind shows, at the stored tau where it takes one.

    Raises:
        UsageError: the surgery has nothing of this kind; the message says why.
    """
    if kind == "pareto":
        return sweep(opened, oracle=True, progress=progress)
    if kind == "layers":
        return sweep(opened, _ALONE, oracle=False, each_layer=True, progress=progress)
    if kind == "compute":
        return sample_maps(opened)
    if kind == "experts":
        return measure_load(opened.graph, eval_batches(opened), progress=progress)
    return measure_routing(opened.graph, eval_batches(opened), progress=progress)


def fitting(opened: Opened) -> list[Kind]:
    """Return the kinds that need data and that this surgery has something to show for."""
    if not find_dynamic(opened.graph):
        return []
    routed = [kind for kind in KINDS if kind not in RECORDED]
    return routed if find_moes(opened.graph) else [kind for kind in routed if kind != "routers"]


def sparsified(record: Record) -> dict[str, tuple[Sparsity, Sparsity]]:
    """Return how sparse each layer was before and after the last pass that made layers sparse.

    Raises:
        UsageError: no pass did.
    """
    fits = [report.fit for report in record.passes if report.fit is not None and report.fit.sparsity]
    if not fits:
        raise UsageError("No pass has made layers sparse. That is what sparsify does, with data.")
    return dict(fits[-1].sparsity)


def tried(record: Record) -> list[Trial]:
    """Return the longest trial of every setting that a search tried, in their order.

    Raises:
        UsageError: there was no search.
    """
    if record.search is None:
        raise UsageError("No settings were tried. That is what surgeon apply --budget-minutes does.")
    longest: dict[str, Trial] = {}
    for trial in record.search.trials:
        if trial.name not in longest or trial.steps >= longest[trial.name].steps:
            longest[trial.name] = trial
    return list(longest.values())


def title(opened: Opened) -> str:
    """`bert-moe on reviews.csv, tau 0.1`."""
    assert opened.data is not None
    taus = sorted(set(get_tau(opened.graph).values()))
    shown = f"{taus[0]:.3g}" if len(taus) == 1 else f"{taus[0]:.3g} to {taus[-1]:.3g}"
    return f"{opened.spec} on {opened.data.description}, tau {shown}"
