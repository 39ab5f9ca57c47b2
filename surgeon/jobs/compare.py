"""Compare saved surgeries of one dense model on the same held-out data."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import zip_longest
from pathlib import Path

import torch

from surgeon.data.batch import Batch
from surgeon.data.imitation import answer
from surgeon.data.quality import Scores
from surgeon.dynamic.site import find_dynamic, no_dynamic
from surgeon.errors import SurgeonError, UsageError, first_line, some
from surgeon.graph.agreement import call_reproducibly
from surgeon.graph.calls import as_args_kwargs
from surgeon.jobs.evaluation import (
    criteria_for,
    dense_multiply_adds,
    eval_batches,
    held_out,
    kind_of,
    other_data,
    recorded_scores,
)
from surgeon.jobs.open_model import Opened, open_model
from surgeon.jobs.options import DataOptions
from surgeon.jobs.sweep import dense_layers_of, is_among
from surgeon.measure.compare import Comparison
from surgeon.measure.compare import compare as run_comparison
from surgeon.measure.judge import Criteria
from surgeon.measure.meter import measure
from surgeon.progress import Stage, Tell


@dataclass(frozen=True)
class Compared:
    """A comparison of saved surgeries.

    surgeries: their directories, by name. data: what they were measured on, in words.
    """

    surgeries: dict[str, str]
    data: str
    found: Comparison
    notes: tuple[str, ...] = ()


def named_surgeries(typed: Sequence[str]) -> dict[str, Path]:
    """Return the directories by name. A name stands before the directory, `NAME=DIR`, or is that of the directory.

    Raises:
        UsageError: a directory is given twice, or two have the same name.
    """
    found: dict[str, Path] = {}
    for one in typed:
        name, sign, rest = one.partition("=")
        named = bool(sign) and not Path(one).exists()
        place = Path(rest if named else one)
        if same := next((other for other in found.values() if other.resolve() == place.resolve()), None):
            raise UsageError(f"{place} is given twice" + (f", also as {same}." if same != place else "."))
        called = name.strip() if named else place.absolute().name
        if not called or not str(place).strip():
            raise UsageError(f"'{one}' names nothing. Give a directory that surgeon saved, or NAME=DIR.")
        if called in found:
            raise UsageError(
                f"{found[called]} and {place} are both called {called}. Name one: {called}-2={place}, for example."
            )
        found[called] = place
    return found


def open_surgeries(
    places: Mapping[str, Path],
    data: DataOptions,
    *,
    trust_modules: Sequence[str] = (),
    stage: Stage,
) -> dict[str, Opened]:
    """Open the surgeries. All read the data alike, with the seed of the first if none is given.

    Raises:
        UsageError: a model has no layers that skip, or the data do not fit it. LoadError: a directory is no model.
    """
    found: dict[str, Opened] = {}
    for name, place in places.items():
        try:
            opened = open_model(str(place), data=data, trust_modules=trust_modules, stage=stage)
        except UsageError as error:
            raise UsageError(f"{name}: {error.in_command}") from error
        if not find_dynamic(opened.graph):
            raise no_dynamic(name, "tau changes nothing")
        found[name] = opened
        if data.seed is None and opened.record is not None:
            data = replace(data, seed=opened.record.recipe.seed)
    return found


def compare(
    surgeries: Mapping[str, Opened],
    *,
    keep: float = 0.99,
    taus: Sequence[float] | None = None,
    rules: Sequence[str] | None = None,
    oracle: bool = False,
    timed: bool = False,
    dense: Opened | None = None,
    progress: Tell | None = None,
) -> Compared:
    """Sweep the surgeries on the held-out data, and read off what it costs to keep the dense model's quality.

    If nothing is held out, all of the data is used. The stored settings are measured too. Multiply-adds are counted on
    the example inputs of the first surgery.

    Args:
        surgeries: by name. Their data are the same.
        keep, taus, rules, oracle, timed, progress: as in `surgeon.measure.compare.compare`.
        dense: the model before the surgeries. Without it, its scores and its cost are taken from the records.

    Raises:
        UsageError: the surgeries cannot be compared: their tasks, classes, inputs or dense models differ, or the dense
            model is not known on these data.
        LoadError: recorded scores are damaged.
        KeyboardInterrupt: it was stopped before a surgery was done.
    """
    names = list(surgeries)
    first = surgeries[names[0]]
    assert first.data is not None
    batches = eval_batches(first)
    criteria = criteria_for(first, batches)
    _check_alike(surgeries, batches, criteria)
    if criteria.task is None and batches[0].labels is not None:
        raise UsageError(
            "The task of the models is not known, so their quality cannot be measured. Give it with --task, or --task "
            "imitate to measure the agreement with the dense model."
        )
    scores = None if dense is not None else _recorded(surgeries, criteria)
    found = run_comparison(
        {name: opened.graph for name, opened in surgeries.items()}, batches, criteria.task, keep=keep, taus=taus,
        rules=rules, oracle=oracle, timed=timed, inputs=first.inputs, blank=criteria.blank, progress=progress,
        stored=[name for name, opened in surgeries.items() if not is_among(opened, taus, rules)],
        dense=None if dense is None else dense.graph, dense_scores=scores,
        dense_multiply_adds=dense_multiply_adds(first),
        dense_layers={name: dense_layers_of(opened) for name, opened in surgeries.items()},
    )  # fmt: skip
    of_note: dict[str, list[str]] = {}
    for name, opened in surgeries.items():
        for note in other_data(opened):
            of_note.setdefault(note, []).append(name)
    notes = [f"{', '.join(found_in)}: {note}" for note, found_in in of_note.items()]
    notes += measure(first.graph, *as_args_kwargs(first.inputs))[0].notes
    return Compared(
        {name: opened.spec for name, opened in surgeries.items()}, first.data.description, found, tuple(notes)
    )


def _check_alike(surgeries: Mapping[str, Opened], batches: Sequence[Batch], criteria: Criteria) -> None:
    """Refuse surgeries that cannot be measured on the same data, or whose numbers would mean different things.

    Raises:
        UsageError: names two of them, and how they differ.
    """
    (one, first), *others = surgeries.items()
    shapes = _answer_shapes(one, first, batches[0], criteria)
    _check_runs(one, one, first, first)
    for name, opened in others:
        if opened.task != first.task:
            raise UsageError(
                f"{one} was made for {first.task or 'an unknown task'}, {name} for {opened.task or 'an unknown task'}. "
                "Surgeries of one task can be compared; --task says which, if the models do not."
            )
        if not _same_inputs(batches[0], next(iter(held_out(opened)))):
            raise UsageError(
                f"{one} and {name} read other inputs or labels from the data: their tokenizers or classes differ. "
                "Surgeries are compared on the same samples."
            )
        found = _answer_shapes(name, opened, batches[0], criteria)
        if len(found) != len(shapes) or [shape[-1:] for shape in found] != [shape[-1:] for shape in shapes]:
            raise UsageError(
                f"The outputs of {one} and {name} differ: {_sizes(shapes)} and {_sizes(found)} classes or values. "
                "Surgeries of one dense model have the same."
            )
        _check_runs(name, one, opened, first)


def _same_inputs(batch: Batch, other: Batch) -> bool:
    values = (*batch.args, *batch.kwargs.values(), batch.labels)
    others = (*other.args, *other.kwargs.values(), other.labels)
    same = batch.kwargs.keys() == other.kwargs.keys()
    return same and all(
        a is b is None or (a is not None and b is not None and torch.equal(a, b))
        for a, b in zip_longest(values, others)
    )


def _answer_shapes(name: str, opened: Opened, batch: Batch, criteria: Criteria) -> list[torch.Size]:
    """The shapes of a model's outputs for a batch."""
    try:
        outputs = call_reproducibly(opened.graph, batch.args, batch.kwargs)
    except SurgeonError as error:
        raise UsageError(f"The data do not fit {name}: {error.in_command}") from error
    except Exception as error:
        raise UsageError(f"The data do not fit {name}: {first_line(error)}.") from error
    return [part.values.shape for part in answer(outputs, criteria.outputs)]


def _check_runs(name: str, one: str, opened: Opened, first: Opened) -> None:
    """Refuse a graph that the first surgery's example inputs do not fit: the cost is counted on them."""
    try:
        call_reproducibly(opened.graph, *as_args_kwargs(first.inputs))
    except Exception as error:
        raise UsageError(
            f"{name} cannot be run on the example inputs of {one}, on which cost is counted: {first_line(error)}. Make "
            "the surgeries with the same data or --inputs."
        ) from error


def _recorded(surgeries: Mapping[str, Opened], criteria: Criteria) -> Scores:
    """The dense model's scores, which all surgeries have recorded on these data.

    Raises:
        UsageError: one has none, or they are of different dense models.
    """
    found = {name: recorded_scores(opened, kind_of(criteria)) for name, opened in surgeries.items()}
    if criteria.task is None:
        raise UsageError("Without labels, quality is agreement with the dense model. Give the model with --dense.")
    if missing := [name for name, scores in found.items() if scores is None]:
        raise UsageError(
            f"The dense model's quality on this data is not recorded in {some(missing)}. Give the model with --dense."
        )
    (one, first), *others = found.items()
    assert first is not None
    for name, scores in others:
        assert scores is not None
        files = {_input_hash(surgeries[one]), _input_hash(surgeries[name])} - {None}
        same = torch.equal(scores.items, first.items) and torch.allclose(scores.totals, first.totals, 1e-3, 1e-3)
        if len(files) > 1 or not same:
            raise UsageError(
                f"{one} and {name} were made from different dense models. Give the one to compare with by --dense."
            )
    return first


def _input_hash(opened: Opened) -> str | None:
    return None if opened.record is None else opened.record.input.sha256


def _sizes(shapes: Sequence[torch.Size]) -> str:
    return ", ".join(str(shape[-1]) if shape else "1" for shape in shapes)
