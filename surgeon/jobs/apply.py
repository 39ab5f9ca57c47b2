"""Run passes over an opened model: check the request, measure before and after, save, and suggest the next command."""

from __future__ import annotations

import shlex
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

import torch

from surgeon.data.quality import Quality
from surgeon.dynamic.site import find_dynamic
from surgeon.errors import NothingChangedError, UsageError
from surgeon.graph.calls import as_args_kwargs
from surgeon.jobs.evaluation import (
    both_qualities,
    eval_criteria,
    judge_after,
    judge_before,
    measured_quality,
    why_unmeasured,
)
from surgeon.jobs.inspect import LOOKS_FOR
from surgeon.jobs.open_model import Opened
from surgeon.jobs.options import DataOptions
from surgeon.jobs.recipe import set_recorded
from surgeon.jobs.search import Searcher
from surgeon.jobs.search_settings import stages, with_options
from surgeon.jobs.store import check_target
from surgeon.jobs.workdir import WorkDirectory
from surgeon.measure.cost import Cost
from surgeon.measure.meter import measure
from surgeon.models.hugging_face import quiet_transformers
from surgeon.passes import Pass
from surgeon.passes.report import PassDiff, PassReport
from surgeon.processes import agreed, connect, is_main, wait
from surgeon.progress import Stage, Tell, unshown
from surgeon.surgery.pipeline import Pipeline
from surgeon.surgery.recipe import Recipe
from surgeon.surgery.record import RECORD, read_record
from surgeon.surgery.surgery import Surgery
from surgeon.surgery.trials import Search
from surgeon.text.layout import MODEL
from surgeon.text.reasons import count_reasons
from surgeon.training.trackers import check_tracker


class Interrupted(KeyboardInterrupt):
    """The user interrupted the run. `workdir` holds the checkpoints to resume from; None if there are none yet."""

    def __init__(self, workdir: Path | None) -> None:
        super().__init__()
        self.workdir = workdir


@dataclass(frozen=True)
class Applied:
    """What `surgeon apply` did.

    directory: where the result was saved; None for a dry run. before, after: cost on the example inputs.
    quality: of the task before and after, the latter compared with the former; None if it was not measured.
    agreement: of the result with the model before. next: the suggested next command, and its purpose.
    """

    surgery: Surgery
    directory: Path | None
    before: Cost
    after: Cost
    quality: tuple[Quality, Quality] | None
    notes: tuple[str, ...]
    next: tuple[str, str]
    seconds: float
    agreement: tuple[Quality, ...] = ()


@dataclass(frozen=True)
class ApplyOptions:
    """Options of a run: see `surgeon apply --help`.

    typed: the words of the command line, to suggest the next one. given: the options of passes that the user set, which
    a search for settings leaves as they are. recipe: the one that the passes are from.
    """

    out: Path | None = None
    overwrite: bool = False
    dry_run: bool = False
    resume: bool = False
    verify: Literal["off", "fast", "full"] = "fast"
    seed: int = 0
    tau: float | None = None
    data: DataOptions | None = None
    report_to: str | None = None
    typed: tuple[str, ...] = ()
    budget_minutes: float | None = None
    given: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    recipe: Recipe | None = None


def check_changed(report: PassReport, looks_for: str) -> str | None:
    """Stop if a pass changed nothing. If there was nothing to do, return a note to show instead.

    Raises:
        NothingChangedError: nothing was changed; the message has the most common reason, and its first site.
    """
    if report.matched:
        return None
    done = [rejection for rejection in report.rejected if rejection.code == "already-done"]
    if done:
        return f"{report.name} had nothing to do. {_places(done[0].path, len(done))}: {done[0].reason}."
    if not report.rejected:
        chosen = any(report.options.get(name) for name in ("only", "skip"))
        why = f"its options only and skip exclude every {looks_for}" if chosen else f"the model has no {looks_for}"
        raise NothingChangedError(f"{report.name} changed nothing: {why}. See surgeon inspect.")
    total, common = len(report.rejected), count_reasons(report.rejected)[0]
    raise NothingChangedError(
        f"{report.name} changed 0 of {total} sites. {_places(common.first, common.count)}: {common.text}. "
        "See surgeon explain."
    )


def _places(first: str, count: int) -> str:
    """The first of some sites, and how many more there are."""
    return (first or MODEL) + (f" and {count - 1} more" if count > 1 else "")


_SKIP = ("moe", "dynamic")


def check_options(spec: str, passes: Sequence[Pass[Any]], options: ApplyOptions) -> None:
    """Refuse options that cannot work, as far as this is known before the model is loaded.

    Raises:
        UsageError: passes in a wrong order, a pass without the data it needs, a tau out of range, or a directory that
            has other content. SaveError: the directory cannot be written to.
    """
    artifact = (Path(spec) / RECORD).is_file()
    if options.report_to is not None:
        check_tracker(options.report_to)
    Pipeline(passes).check(
        there={"moe", "dynamic"} if artifact else (), has_data=options.data is not None or options.dry_run
    )
    if options.tau is not None and not 0.0 <= options.tau <= 1.0:
        raise UsageError(f"--tau {options.tau:g} is not a number from 0 to 1. At 0 everything runs.")
    if options.tau is not None and not artifact and not any(pass_.makes in _SKIP for pass_ in passes):
        raise UsageError("--tau needs layers that skip. Add moeify, sparsify-inputs or sparsify-neurons to --passes.")
    if options.tau and options.data is None and not options.dry_run and any(pass_.makes == "moe" for pass_ in passes):
        raise UsageError("--tau needs fitted routers. Give --data to fit them.")
    trains = options.data is not None and not options.dry_run and any(pass_.will_fit for pass_ in passes)
    if options.resume and not trains:
        raise UsageError("--resume continues training, but this run trains nothing. Run it without --resume.")
    if not options.dry_run:
        check_target(target_of(spec, passes, options), spec, overwrite=options.overwrite)


def check_same_tokens(opened: Opened, teacher: Opened) -> None:
    """Refuse a teacher to whose tokenizer the same numbers are other tokens.

    Raises:
        UsageError: both have a tokenizer, and the tokens differ.
    """
    own, other = opened.origin.tokenizer, teacher.origin.tokenizer
    if own is not None and other is not None and own.get_vocab() != other.get_vocab():
        raise UsageError(
            f"The tokenizer of the teacher {teacher.spec} has other tokens than that of {opened.spec}. A teacher reads "
            "what the model reads, so it must have been trained with the same tokenizer."
        )


def target_of(spec: str, passes: Sequence[Pass[Any]], options: ApplyOptions) -> Path:
    """The directory of the result: `options.out`, else `<name>-surgery` in the current directory.

    A result that starts from a saved surgery is named after that surgery and the passes, such as `<name>-lower`.
    """
    if options.out is not None:
        return options.out
    if (Path(spec) / RECORD).is_file():
        return Path("-".join([Path(spec).resolve().name, *(pass_.name for pass_ in passes)]))
    if not Path(spec).exists() and ":" in spec:
        return Path(f"{spec.rpartition(':')[2]}-surgery")
    path = Path(spec).resolve()
    return Path(f"{path.name if path.is_dir() else path.stem}-surgery")


def default_seed(spec: str) -> int:
    """The default seed: a saved surgery's own, so that the same data is held out again; else 0."""
    directory = Path(spec)
    return read_record(directory).recipe.seed or 0 if (directory / RECORD).is_file() else 0


def apply(
    opened: Opened,
    passes: Sequence[Pass[Any]],
    options: ApplyOptions,
    *,
    stage: Stage = unshown,
    progress: Tell | None = None,
    on_pass: Callable[[PassDiff], None] | None = None,
    on_search: Callable[[Search], None] | None = None,
    teacher: Opened | None = None,
) -> Applied:
    """Run passes over a model, measure it before and after, and save the result.

    The opened model is consumed (see `Pipeline.run`). With a budget, settings are searched first. Passes learn from the
    teacher's outputs, if there is one.

    Raises:
        NothingChangedError: a pass changed nothing; nothing is saved.
        UsageError, PassError, VerificationError, SaveError: as the steps raise them.
        Interrupted: the user interrupted the run.
    """
    started = time.monotonic()
    check_options(opened.spec, passes, options)
    if teacher is not None:
        check_same_tokens(opened, teacher)
    connect(next((parameter.device for parameter in opened.graph.parameters()), torch.device("cpu")))
    wait()  # before one process makes the directories that another still looks for
    data = None if options.dry_run else opened.data
    directory = None if options.dry_run else target_of(opened.spec, passes, options)
    notes: list[str] = []
    args, kwargs = as_args_kwargs(opened.inputs)
    cost = measure(opened.graph, args, kwargs)[0]
    with _checkpoints(opened, passes, options, teacher) as workdir:
        criteria = None if data is None else eval_criteria(opened)
        before = None
        if criteria is not None:
            with stage("measuring quality before") as tell:
                before = judge_before(opened, criteria, tell)
        search = None
        if options.budget_minutes is not None:
            assert workdir is not None
            assert data is not None
            searcher = Searcher(
                opened.graph, opened.inputs, data, passes, options.budget_minutes, options.seed, workdir,
                started=started, teacher=teacher, progress=progress,
            )  # fmt: skip
            search = searcher.run(stages(passes, options.given, opened.graph))
            passes = with_options(passes, search.options)
            if on_search is not None:
                on_search(search)
        surgery = _run(opened, passes, options, workdir, notes, teacher=teacher, progress=progress, on_pass=on_pass)
        surgery.search = search
        _set_tau(surgery, options, notes)
        surgery.graph.eval()
        after = None
        if criteria is not None and before is not None:
            with stage("measuring quality after") as tell:
                after = judge_after(surgery.graph, opened, criteria, before, tell)
        if before is not None and after is not None:
            surgery.quality = measured_quality(opened, before, after)
        if directory is not None:
            with stage(f"saving {directory}"), quiet_transformers():
                surgery.save(directory, overwrite=options.overwrite)
    if data is not None:
        notes.extend(why_unmeasured(opened, criteria))
    return Applied(
        surgery,
        directory,
        cost,
        measure(surgery.graph, args, kwargs)[0],
        both_qualities(before, after),
        tuple(notes),
        _next(passes, surgery, directory, options),
        time.monotonic() - started,
        () if after is None else after.agreement,
    )


@contextmanager
def _checkpoints(
    opened: Opened, passes: Sequence[Pass[Any]], options: ApplyOptions, teacher: Opened | None
) -> Iterator[Path | None]:
    """The directory for checkpoints of training; None if there is nothing to train.

    It is removed afterwards, unless the run failed or was interrupted and left a checkpoint.

    Raises:
        UsageError, SaveError: as `WorkDirectory`. Interrupted: the user interrupted the run.
    """
    work = None
    if opened.data is not None and not options.dry_run and any(pass_.will_fit for pass_ in passes):
        recipe = {
            "model": opened.origin.sha256,
            "passes": [{"name": pass_.name, "options": pass_.options()} for pass_ in passes],
            "seed": options.seed,
            "data": opened.data.fingerprint,
            "budget_minutes": options.budget_minutes,
            "teacher": None if teacher is None else [teacher.spec, teacher.origin.sha256],
        }
        result = target_of(opened.spec, passes, options)
        if is_main():
            work = WorkDirectory(result, recipe, resume=options.resume, discard=options.overwrite)
    path: Path | None = agreed(None if work is None else work.path)
    done = False
    try:
        yield path
        done = True
    except KeyboardInterrupt:
        raise Interrupted(work.path if work is not None and work.has_checkpoint else None) from None
    finally:
        if work is not None:
            work.close(done=done)


def _run(
    opened: Opened,
    passes: Sequence[Pass[Any]],
    options: ApplyOptions,
    workdir: Path | None,
    notes: list[str],
    *,
    teacher: Opened | None,
    progress: Tell | None,
    on_pass: Callable[[PassDiff], None] | None,
) -> Surgery:
    """Run the passes, and stop at a pass that changes nothing. A pass with nothing to do adds a note to `notes`."""
    works_on = {pass_.name: pass_.works_on for pass_ in passes}

    def finished(made: PassDiff) -> None:
        if on_pass is not None:
            on_pass(made)
        note = check_changed(made.report, LOOKS_FOR[works_on[made.report.name]])
        if note is not None:
            notes.append(note)

    surgery = Pipeline(passes).run(
        opened.graph,
        inputs=opened.inputs,
        data=opened.data,
        seed=options.seed,
        verify=options.verify,
        progress=progress,
        on_pass=finished,
        workdir=workdir,
        resume=options.resume,
        dry_run=options.dry_run,
        origin=opened.origin,
        consume=True,
        report_to=options.report_to,
        teacher=None if teacher is None else teacher.graph,
        teacher_origin=None if teacher is None else teacher.origin,
    )
    if not any(report.matched for report in surgery.reports):
        raise NothingChangedError(" ".join(notes))
    return surgery


def _set_tau(surgery: Surgery, options: ApplyOptions, notes: list[str]) -> None:
    """Set the knobs of the recipe, and the requested tau if the routers were fitted. Else a dry run adds a note.

    Raises:
        UsageError: the routers were not fitted, and the run is not a dry run.
    """
    fitted = _routers_are_fitted(surgery)
    if options.recipe is not None:
        notes.extend(set_recorded(options.recipe, surgery.graph, fitted=fitted, with_tau=options.tau is None))
    if options.tau is None:
        return
    if options.tau == 0.0 or fitted:
        surgery.set_tau(options.tau)
    elif options.dry_run:
        notes.append("tau was not set, because a dry run fits no routers.")
    else:
        raise UsageError("--tau needs fitted routers, but this surgery has none. Run moeify again, with --data.")


def _routers_are_fitted(surgery: Surgery) -> bool:
    """Whether the routers were fitted when they were made, or trained by recover since."""
    reports = [*(earlier.report for earlier in surgery.earlier), *surgery.reports]
    changing = [report for report in reports if report.matched]
    fits = {name: [report.fit for report in changing if report.name == name] for name in ("moeify", "recover")}
    return all(fits["moeify"]) or any(fits["recover"])


def _next(
    passes: Sequence[Pass[Any]], surgery: Surgery, directory: Path | None, options: ApplyOptions
) -> tuple[str, str]:
    """The next command to suggest, and its purpose."""
    if directory is None:
        again = [word for word in options.typed if word != "--dry-run"]
        needed = options.data is None and any(pass_.needs_data for pass_ in passes)
        return _command((*again, *(("--data", "DATA") if needed else ()))), "to run it"
    trained = {report.name for report in surgery.reports if report.fit is not None}
    if any(pass_.will_fit and pass_.name not in trained for pass_ in passes):
        again = [word for word in options.typed if word != "--overwrite"]
        return _command((*again, "--data", "DATA", "--overwrite")), "to train what was not trained"
    moes, place = find_dynamic(surgery.graph), str(directory)
    data = _data_words(options.data)
    if not moes:
        return _command(("apply", "--passes", "moeify,lower", place, *data)), "to split the layers into experts"
    refused = {one.path for report in surgery.reports if report.name == "lower" for one in report.rejected}
    if not all(site.skips or site.path in refused for site in moes):
        return _command(("apply", "--passes", "lower", place)), "to skip what tau leaves out"
    return _command(("sweep", place, *data)), "to see quality and cost at several tau"


def _command(words: Iterable[str]) -> str:
    return shlex.join(["surgeon", *words])


def _data_words(options: DataOptions | None) -> list[str]:
    """The options that read the same data."""
    if options is None:
        return ["--data", "DATA"]
    words = ["--data", options.spec]
    for item in fields(DataOptions):
        value = getattr(options, item.name)
        # The seed is recorded: commands that start from the result read it there.
        if item.name not in ("spec", "seed") and value != item.default:
            words += [f"--{item.name.replace('_', '-')}", str(value)]
    return words
