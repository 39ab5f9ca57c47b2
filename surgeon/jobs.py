"""What the commands do, as functions that return data. Nothing here prints: `surgeon.render` shows the results."""

from __future__ import annotations

import dataclasses
import difflib
import fnmatch
import json
import os
import shlex
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.utils import _pytree as pytree

from surgeon.artifact import RECORD, load, load_inputs
from surgeon.batch import Data
from surgeon.cost import measure
from surgeon.data import load_data
from surgeon.diff import GraphDiff, PassDiff, compare_unrelated, snapshot
from surgeon.errors import NothingChangedError, SaveError, UsageError
from surgeon.fit import Settings
from surgeon.graph import TracedGraph
from surgeon.inputs import as_args_kwargs, example_inputs, inputs_from, inputs_of_program
from surgeon.losses import Quality, evaluate, task_of
from surgeon.moe import find_moes
from surgeon.passes import Moeify, Pass
from surgeon.pipeline import Origin, Pipeline, Surgery
from surgeon.recipe import build, option_types
from surgeon.report import Cost, PassReport, Progress
from surgeon.rewrite import Capture
from surgeon.sites import FFN, LinearSite, Rejection, find_ffns, find_linear_sites
from surgeon.source import TASK_CLASSES, Source, check_finite, load_model, quiet_transformers
from surgeon.summary import count_reasons
from surgeon.sweep import USUAL_TAUS, Point
from surgeon.sweep import sweep as run_sweep
from surgeon.tracing import TraceInfo, adopt, from_program, relative_error, run, trace
from surgeon.workdir import WorkDirectory

Stage = Callable[[str], AbstractContextManager[object]]
_KINDS = {
    "hf": "Hugging Face model",
    "pickle": "pickled module",
    "pt2": "exported program",
    "state_dict": "state dict",
    "artifact": "saved surgery",
    "python": "Python function",
}
_LOOKS_FOR = {"ffn": "feed-forward layer", "linear": "standalone linear layer", "moe": "expert layer"}


@dataclass(frozen=True)
class DataOptions:
    """How to read data: the arguments of `surgeon.data.load_data` that the command line has."""

    spec: str
    text: str | None = None
    label: str | None = None
    task: str | None = None
    batch_size: int = 16
    max_length: int = 128
    limit: int | None = None
    eval_fraction: float = 0.1
    seed: int = 0


@dataclass(frozen=True)
class Opened:
    """A model that was loaded and traced.

    spec: what the user typed. graph: in evaluation mode. inputs: the example inputs. notes: what loading and tracing
    showed. record: of the surgery, if the model is an artifact. data: if it was asked for.
    """

    spec: str
    graph: TracedGraph
    inputs: Any
    origin: Origin
    notes: tuple[str, ...] = ()
    record: dict[str, Any] | None = None
    data: Data | None = None

    @property
    def kind(self) -> str:
        """What it was loaded from, in words."""
        return _KINDS[self.origin.kind]

    @property
    def task(self) -> str | None:
        """What the data says the model is for, else what its class says."""
        info: TraceInfo = self.graph.meta["trace"]
        return (self.data.task if self.data is not None else None) or info.task


class Interrupted(KeyboardInterrupt):
    """Interrupted by the user. `workdir` holds the checkpoints to resume from; None if there are none yet."""

    def __init__(self, workdir: Path | None) -> None:
        super().__init__()
        self.workdir = workdir


def open_model(
    spec: str,
    *,
    inputs: str | None = None,
    trust_pickle: bool = False,
    arch: str | None = None,
    task: str | None = None,
    data: DataOptions | None = None,
    stage: Stage = nullcontext,
) -> Opened:
    """Load a model or a saved surgery, find example inputs, trace it, and read data for it.

    Args:
        inputs: as `surgeon.inputs.inputs_from` takes; by default the model's own, and the data's first rows for a model
            that has none.
        task: the head of a Hugging Face model. stage: called with what is being done.

    Raises:
        LoadError, TraceError, UsageError, DataError: as the parts do.
    """
    given = None if inputs is None else inputs_from(inputs)
    with stage(f"loading {spec}"):
        head = task if task in TASK_CLASSES else None
        source = load_model(spec, trust_pickle=trust_pickle, arch=arch, task=head)
        if source.kind == "artifact":
            return _open_artifact(spec, source, given, data, stage)
        assert source.model is not None
        check_finite(source.model)
    read = _read(data, source.tokenizer, source.processor, source.config, None, stage)
    notes = list(source.notes)
    if isinstance(source.model, ExportedProgram):
        given = given if given is not None else inputs_of_program(source.model)
        graph = from_program(source.model)
    else:
        if given is None:
            hugging_face = source.config is not None and hasattr(source.model, "main_input_name")
            if read is not None and not hugging_face:
                given = _first_rows(read)
                notes.append("The example inputs are the first two rows of the data.")
            else:
                given = example_inputs(
                    source.model, tokenizer=source.tokenizer, processor=source.processor, config=source.config
                )
        with stage(f"tracing {type(source.model).__name__}"):
            graph = trace(source.model, given).eval()
    origin = Origin(
        str(source.path), source.kind, source.sha256, source.config, source.tokenizer, source.processor, source.notes
    )
    info: TraceInfo = graph.meta["trace"]
    return Opened(spec, graph, given, origin, (*notes, *info.notes), None, read)


def _open_artifact(spec: str, source: Source, given: Any, data: DataOptions | None, stage: Stage) -> Opened:
    graph = load(source.path)
    if given is None:
        given = load_inputs(source.path)
    config, tokenizer, processor = _companions(source.path)
    info: TraceInfo = graph.meta["trace"]
    read = _read(data, tokenizer, processor, config, info.task, stage)
    origin = Origin(str(source.path), "artifact", source.sha256, config, tokenizer, processor)
    return Opened(spec, graph, given, origin, info.notes, graph.meta["surgery"], read)


def _companions(directory: Path) -> tuple[Any, Any, Any]:
    """The config, tokenizer and processor that were saved with a surgery, None where it has none."""
    import transformers

    def part(file: str, loader: str) -> Any:
        if not (directory / file).is_file():
            return None
        return getattr(transformers, loader).from_pretrained(directory, local_files_only=True, trust_remote_code=False)

    with quiet_transformers():
        config = part("config.json", "AutoConfig")
        if config is None:
            return None, None, None
        return config, part("tokenizer_config.json", "AutoTokenizer"), part("preprocessor_config.json", "AutoProcessor")


def _read(
    options: DataOptions | None, tokenizer: Any, processor: Any, config: Any, task: str | None, stage: Stage
) -> Data | None:
    if options is None:
        return None
    with stage(f"reading {options.spec}"):
        return load_data(
            options.spec,
            tokenizer=tokenizer,
            processor=processor,
            config=config,
            text=options.text,
            label=options.label,
            task=options.task or task,
            batch_size=options.batch_size,
            max_length=options.max_length,
            seed=options.seed,
            eval_fraction=options.eval_fraction,
            limit=options.limit,
        )


def _first_rows(data: Data) -> Any:
    batch = next(iter(data.train))
    return pytree.tree_map(lambda leaf: leaf[:2] if isinstance(leaf, Tensor) else leaf, (batch.args, batch.kwargs))


def _shapes(inputs: Any) -> dict[str, list[int]]:
    """Shape of every example input, by name or position."""
    args, kwargs = as_args_kwargs(inputs)
    named = {**{str(index): value for index, value in enumerate(args)}, **kwargs}
    return {name: list(value.shape) for name, value in named.items() if isinstance(value, Tensor)}


# --- inspect ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Layer:
    """A site: its shape, and its share of all the model's multiply-adds on the example inputs."""

    path: str
    shape: tuple[int, ...]
    share: float


@dataclass(frozen=True)
class FFNLayer(Layer):
    """A feed-forward layer (d_in, hidden, d_out). calls: how often its weights are used in one call."""

    activation: str
    gated: bool
    calls: int


@dataclass(frozen=True)
class ExpertLayer(Layer):
    """An expert layer (experts, neurons each). form: "module", "masked" or "dynamic". executed: share that ran."""

    form: str
    tau: float
    executed: float


@dataclass(frozen=True)
class Inspection:
    """What `surgeon inspect` found. refused: (path, reason) of what looks like a feed-forward layer and is none.

    graph: lines of the graph as (module path, line), if asked for.
    """

    model: str
    kind: str
    inputs: dict[str, list[int]]
    task: str | None
    cost: Cost
    ffns: list[FFNLayer]
    experts: list[ExpertLayer]
    linears: list[Layer]
    refused: list[tuple[str, str]]
    notes: tuple[str, ...]
    graph: list[tuple[str, str]] | None = None


def inspect(opened: Opened, *, with_graph: bool = False) -> Inspection:
    """The sites of a model and what they cost on the example inputs."""
    graph, (args, kwargs) = opened.graph, as_args_kwargs(opened.inputs)
    cost, layers = measure(graph, args, kwargs)
    ffns, linears, refused = _outside_experts(graph)
    parts = [part for ffn in ffns for call in ffn.calls for part in (*call.first, call.down)]
    parts += [part for linear in linears for part in linear.calls]
    _, values = run(Capture(graph, {part.output.name for part in parts}), args, kwargs)
    # A linear layer makes one output of out_features with in_features multiply-adds each.
    work = {part: values[part.output.name].numel() * part.in_features for part in parts}
    whole = max(1, cost.multiply_adds)
    return Inspection(
        opened.spec,
        opened.kind,
        _shapes(opened.inputs),
        opened.task,
        cost,
        [
            FFNLayer(
                ffn.path,
                (ffn.d_in, ffn.hidden, ffn.d_out),
                sum(work[part] for call in ffn.calls for part in (*call.first, call.down)) / whole,
                ffn.activation,
                ffn.gated,
                len(ffn.calls),
            )
            for ffn in ffns
        ],
        [
            ExpertLayer(
                site.path,
                (site.experts, int(site.w1.shape[1])),
                layers[site.path].multiply_adds / whole,
                site.form,
                float(site.tau),
                layers[site.path].share,
            )
            for site in find_moes(graph)
        ],
        [
            Layer(linear.path, (linear.d_in, linear.d_out), sum(work[part] for part in linear.calls) / whole)
            for linear in linears
        ],
        [(rejection.path, rejection.reason) for rejection in refused],
        opened.notes,
        list(snapshot(graph).nodes.values()) if with_graph else None,
    )


def _outside_experts(graph: TracedGraph) -> tuple[list[FFN], list[LinearSite], list[Rejection]]:
    """The feed-forward layers, standalone linears and refused candidates that are no part of an expert layer's router."""
    routers = tuple(f"{site.path}." for site in find_moes(graph))
    (ffns, refused), (linears, _) = find_ffns(graph), find_linear_sites(graph)
    return (
        [ffn for ffn in ffns if not ffn.path.startswith(routers)],
        [linear for linear in linears if not linear.path.startswith(routers)],
        [rejection for rejection in refused if not rejection.path.startswith(routers)],
    )


# --- explain ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Explanation:
    """One pass: (path, description) of the sites it would change, (path, reason) of the other candidates."""

    name: str
    looks_for: str
    matched: list[tuple[str, str]]
    rejected: list[tuple[str, str]]


def explain(opened: Opened, passes: Sequence[Pass[Any]], at: str | None = None) -> list[Explanation]:
    """For every pass, what it would do with each candidate in the graph that the passes before it would leave.

    Args:
        at: only candidates of this path, or under it, patterns with * allowed.

    Raises:
        UsageError: passes in an order that cannot work; no candidate has this path.
    """
    Pipeline(passes).check(has_moes=bool(find_moes(opened.graph)), has_data=True)
    graph, found = adopt(opened.graph), []
    for one in passes:
        matched, rejected = one.explain(graph)
        found.append(
            Explanation(
                one.name,
                _LOOKS_FOR[one.works_on],
                [(site.path, site.describe) for site in matched],
                [(rejection.path, rejection.reason) for rejection in rejected],
            )
        )
        if matched and one is not passes[-1]:
            graph = adopt(graph)
            one.run(graph, inputs=None, data=None, settings=Settings(verify="off", dry_run=True))
    if at is None:
        return found
    paths = [path for one in found for path, _ in (*one.matched, *one.rejected)]
    chosen = {path for path in paths if path == at or path.startswith(f"{at}.") or fnmatch.fnmatchcase(path, at)}
    if not chosen:
        near = difflib.get_close_matches(at, paths, n=3, cutoff=0.3)
        hint = f" Nearest candidates: {', '.join(dict.fromkeys(near))}." if near else ""
        raise UsageError(f"No candidate at '{at}': nothing there looks like a {found[0].looks_for}.{hint}")
    return [
        Explanation(
            one.name,
            one.looks_for,
            [(path, what) for path, what in one.matched if path in chosen],
            [(path, reason) for path, reason in one.rejected if path in chosen],
        )
        for one in found
    ]


# --- apply ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Applied:
    """What `surgeon apply` did.

    directory: where it was saved, None for a dry run. before, after: cost on the example inputs. quality: before and
    after, None if it was not measured. next: a command to go on with, and what for.
    """

    surgery: Surgery
    directory: Path | None
    before: Cost
    after: Cost
    quality: tuple[Quality, Quality] | None
    notes: tuple[str, ...]
    next: tuple[str, str]
    seconds: float


@dataclass(frozen=True)
class ApplyOptions:
    """How to run: see `surgeon apply --help`. data: what the user typed for it, for the next command to suggest."""

    out: Path | None = None
    overwrite: bool = False
    dry_run: bool = False
    resume: bool = False
    verify: Literal["off", "fast", "full"] = "fast"
    seed: int = 0
    tau: float | None = None
    data: str | None = None


def check_target(directory: Path, opened_spec: str, *, overwrite: bool) -> None:
    """Find out before the work whether the result can be written.

    Raises:
        UsageError: the directory is the model's own, or has content that is not to be replaced.
        SaveError: its parent cannot be written to.
    """
    where, model = directory.resolve(), Path(opened_spec).resolve()
    if where == model or model in where.parents:
        raise UsageError(f"{directory} is the model itself, which is never changed. Give another directory with -o.")
    if directory.exists() and not directory.is_dir():
        raise UsageError(f"{directory} is a file. Give a directory for the result with -o.")
    if directory.is_dir() and any(directory.iterdir()):
        if not (directory / RECORD).exists():
            raise UsageError(f"{directory} holds something else than a saved surgery. Give another one with -o.")
        if not overwrite:
            raise UsageError(f"{directory} exists. Give another directory with -o, or replace it with --overwrite.")
    parent = next(parent for parent in where.parents if parent.exists())
    if not os.access(parent, os.W_OK | os.X_OK):
        raise SaveError(f"Cannot write {directory}: no permission to write to {parent}.")


def check_changed(report: PassReport, looks_for: str) -> str | None:
    """Stop if a pass changed nothing, unless there was nothing to do: then the note to show is returned.

    Raises:
        NothingChangedError: with the most common reason and the first site refused for it.
    """
    if report.matched:
        return None
    already = [path for path, reason in report.rejected if reason.endswith("already")]
    if report.name == "swap-activation" and already:
        return f"swap-activation changed nothing: all {len(already)} activations are the wanted one already."
    if not report.rejected:
        chosen = any(report.options.get(name) for name in ("only", "skip"))
        why = f"no {looks_for} is left by only= and skip=" if chosen else f"the model has no {looks_for}"
        raise NothingChangedError(f"{report.name} changed nothing: {why}. See surgeon inspect.")
    total, common = len(report.rejected), count_reasons(report.rejected)[0]
    often = "" if common.count == total else f" {common.count} of them,"
    raise NothingChangedError(
        f"{report.name} changed 0 of {total} sites. {total} rejected:{often} {common.text} (first: {common.first}). "
        "See surgeon explain."
    )


def check_options(spec: str, passes: Sequence[Pass[Any]], options: ApplyOptions) -> None:
    """Refuse what cannot work before the model is loaded, as far as that can be told.

    Raises:
        UsageError: a wrong order of passes, a pass without the data it needs, a tau out of range, a directory that is
            taken. SaveError: the directory cannot be written to.
    """
    artifact = (Path(spec) / RECORD).is_file()
    Pipeline(passes).check(has_moes=artifact, has_data=options.data is not None or options.dry_run)
    if options.tau is not None and not 0.0 <= options.tau <= 1.0:
        raise UsageError(f"--tau {options.tau:g}: tau is a share of the largest score, from 0 to 1.")
    if options.tau is not None and not artifact and not any(one.makes == "moe" for one in passes):
        raise UsageError("--tau needs experts: put moeify among the passes.")
    trains = options.data is not None and not options.dry_run and any(one.trains for one in passes)
    if options.resume and not trains:
        raise UsageError("--resume continues training, and this run trains nothing: run it without --resume.")
    if not options.dry_run:
        check_target(target_of(spec, passes, options), spec, overwrite=options.overwrite)


def target_of(spec: str, passes: Sequence[Pass[Any]], options: ApplyOptions) -> Path:
    """Where the result goes: where the user says, else `<name>-surgery` in the current directory.

    The result of going on from a saved surgery is named after it and the passes: `<name>-lower`.
    """
    if options.out is not None:
        return options.out
    if (Path(spec) / RECORD).is_file():
        return Path("-".join([Path(spec).resolve().name, *(one.name for one in passes)]))
    if not Path(spec).exists() and ":" in spec:
        return Path(f"{spec.rpartition(':')[2]}-surgery")
    path = Path(spec).resolve()
    return Path(f"{path.name if path.is_dir() else path.stem}-surgery")


def apply(
    opened: Opened,
    passes: Sequence[Pass[Any]],
    options: ApplyOptions,
    *,
    stage: Stage = nullcontext,
    progress: Callable[[Progress], None] | None = None,
    on_pass: Callable[[PassDiff], None] | None = None,
) -> Applied:
    """Run passes over a model, measure it before and after, and save the result.

    Raises:
        NothingChangedError: a pass changed nothing; nothing is saved.
        UsageError, PassError, VerificationError, SaveError: as the parts do.
        Interrupted: by the user.
    """
    started = time.monotonic()
    check_options(opened.spec, passes, options)
    data = None if options.dry_run else opened.data
    directory = None if options.dry_run else target_of(opened.spec, passes, options)
    notes: list[str] = []
    by_name = {one.name: one for one in passes}

    def finished(one: PassDiff) -> None:
        if on_pass is not None:
            on_pass(one)
        note = check_changed(one.report, _LOOKS_FOR[by_name[one.report.name].works_on])
        if note is not None:
            notes.append(note)

    work = None
    if data is not None and directory is not None and any(one.trains for one in passes):
        recipe = {
            "model": opened.origin.sha256,
            "passes": [{"name": one.name, "options": one.options()} for one in passes],
            "seed": options.seed,
            "data": data.fingerprint,
        }
        work = WorkDirectory(directory, recipe, resume=options.resume, discard=options.overwrite)
    done = False
    try:
        dense = _quality(opened.graph, opened, data, "before", stage)
        surgery = Pipeline(passes).run(
            opened.graph,
            inputs=opened.inputs,
            data=data,
            seed=options.seed,
            verify=options.verify,
            progress=progress,
            on_pass=finished,
            workdir=None if work is None else work.path,
            resume=options.resume,
            dry_run=options.dry_run,
            origin=opened.origin,
        )
        if not any(report.matched for report in surgery.reports):
            raise NothingChangedError(" ".join(notes))
        if options.tau is not None:
            surgery.set_tau(options.tau)
        surgery.graph.eval()
        quality = _quality(surgery.graph, opened, data, "after", stage)
        if directory is not None:
            with stage(f"saving {directory}"), quiet_transformers():
                surgery.save(directory, overwrite=options.overwrite)
        done = True
    except KeyboardInterrupt:
        raise Interrupted(work.path if work is not None and work.has_checkpoint else None) from None
    finally:
        if work is not None:
            work.close(done=done)
    if data is not None and dense is None:
        notes.append(_why_unmeasured(opened))
    args, kwargs = as_args_kwargs(opened.inputs)
    return Applied(
        surgery,
        directory,
        measure(opened.graph, args, kwargs)[0],
        measure(surgery.graph, args, kwargs)[0],
        None if dense is None or quality is None else (dense, quality),
        tuple(notes),
        _next(opened, passes, surgery, directory, options),
        time.monotonic() - started,
    )


def _quality(graph: TracedGraph, opened: Opened, data: Data | None, when: str, stage: Stage) -> Quality | None:
    """Quality on the evaluation data, None if there is none with labels or the task is unknown."""
    task = _eval_task(opened) if data is not None else None
    if data is None or data.eval is None or task is None:
        return None
    with stage(f"measuring quality {when}"):
        return evaluate(graph, data.eval, task)


def _eval_task(opened: Opened) -> str | None:
    """The task to measure, None if it is unknown or the evaluation data has no labels for it."""
    if opened.data is None or opened.data.eval is None:
        return None
    batch = next(iter(opened.data.eval))
    if batch.labels is None and opened.task != "causal-lm":
        return None
    return opened.task or task_of(None, run(opened.graph, batch.args, batch.kwargs), batch.labels)


def _why_unmeasured(opened: Opened) -> str:
    if opened.data is None or opened.data.eval is None:
        return "Quality was not measured: no data was held out for it."
    batch = next(iter(opened.data.eval))
    if batch.labels is None:
        return "Quality was not measured: the data has no labels."
    return "Quality was not measured: say what the model is for with --task."


def _next(
    opened: Opened, passes: Sequence[Pass[Any]], surgery: Surgery, directory: Path | None, options: ApplyOptions
) -> tuple[str, str]:
    names, spec = ",".join(one.name for one in passes), shlex.quote(opened.spec)
    data = "DATA" if options.data is None else shlex.quote(options.data)
    if directory is None:
        given = "" if options.data is None else f" --data {data}"
        return f"surgeon apply --passes {names} {spec}{given}", "to do it"
    place = shlex.quote(str(directory))
    moes = find_moes(surgery.graph)
    trained = {report.name: report.fit is not None for report in surgery.reports}
    if any(one.trains and not trained[one.name] for one in passes):
        return f"surgeon apply --passes {names} {spec} --data DATA", "to train what was not trained"
    if not moes:
        return f"surgeon apply --passes moeify,lower {place} --data {data}", "to split the layers into experts"
    if any(site.form != "dynamic" for site in moes):
        return f"surgeon apply --passes lower {place}", "to skip the experts that tau leaves out"
    return f"surgeon sweep {place} --data {data}", "to see quality and cost at several tau"


def applied_json(applied: Applied, opened: Opened) -> dict[str, Any]:
    """The result for programs."""
    quality = applied.quality
    return {
        "model": opened.spec,
        "directory": applied.directory,
        "dry_run": applied.directory is None,
        "passes": [report.to_json() for report in applied.surgery.reports],
        "before": applied.before,
        "after": applied.after,
        "quality": None if quality is None else {"before": quality[0], "after": quality[1]},
        "notes": applied.notes,
        "next": applied.next[0],
        "seconds": round(applied.seconds, 3),
    }


def read_recipe(path: Path) -> tuple[list[Pass[Any]], int]:
    """The passes and the seed that a `surgery.json`, or its `recipe` alone, records.

    Raises:
        UsageError: no such file, or no recipe in it; a pass or an option that does not exist.
    """
    try:
        content = json.loads((path / RECORD if path.is_dir() else path).read_text(encoding="utf-8"))
        recipe = content.get("recipe", content)
        steps, seed = [(step["name"], dict(step.get("options", {}))) for step in recipe["passes"]], int(recipe["seed"])
    except FileNotFoundError:
        raise UsageError(f"--recipe {path}: there is no such file.") from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UsageError(f"--recipe {path} holds no recipe: {type(error).__name__}: {error}.") from error
    return [build([name], {name: options})[0] for name, options in steps], seed


# --- passes -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Option:
    """An option of a pass: what to type, and what it does."""

    name: str
    type: str
    default: Any
    help: str


def describe(kind: type[Pass[Any]]) -> dict[str, Any]:
    """What a pass says about itself, as plain values."""
    return {
        "name": kind.name,
        "summary": " ".join((kind.__doc__ or "").partition("\n\n")[0].split()),
        "works_on": kind.works_on,
        "makes": kind.makes,
        "must_precede": sorted(kind.must_precede),
        "preserves": kind.preserves,
        "needs_data": kind.needs_data,
        "trains": kind.trains,
    }


def options_of(kind: type[Pass[Any]]) -> list[Option]:
    """The options of a pass, its own before those that it shares with others."""
    types, own = option_types(kind), list(vars(kind).get("__annotations__", {}))
    shared = ("only", "skip")
    fields = sorted(
        dataclasses.fields(kind),
        key=lambda item: (item.name in shared, own.index(item.name) if item.name in own else len(own)),
    )
    return [Option(item.name, _type(types[item.name]), item.default, item.metadata.get("help", "")) for item in fields]


def _type(kind: Any) -> str:
    """A type in words: `int or none`, `constant|linear|cosine`."""
    arguments = get_args(kind)
    if get_origin(kind) is Literal:
        return "|".join(map(str, arguments))
    if get_origin(kind) is tuple:
        return "list"
    if type(None) in arguments:
        return f"{' or '.join(_type(one) for one in arguments if one is not type(None))} or none"
    return {"str": "text", "float": "number", "int": "integer"}.get(getattr(kind, "__name__", ""), str(kind))


class _Example(nn.Module):
    """A projection and a feed-forward layer."""

    def __init__(self) -> None:
        super().__init__()
        self.query = nn.Linear(64, 64)
        self.norm = nn.LayerNorm(64)
        self.mlp = nn.Sequential(nn.Linear(64, 256), nn.GELU(), nn.Linear(256, 64))

    def forward(self, x: Tensor) -> Tensor:
        """[..., 64] → [..., 64]."""
        return x + self.mlp(self.norm(self.query(x)))  # type: ignore[no-any-return]


def example_of(kind: type[Pass[Any]]) -> PassDiff:
    """What a pass makes of a small model, without data."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model, inputs = _Example().eval(), torch.randn(2, 4, 64)
    passes: list[Pass[Any]] = [Moeify()] if kind.works_on == "moe" else []
    return Pipeline([*passes, kind()]).run(model, inputs=inputs, dry_run=True).diff().passes[-1]


# --- diff of two models -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class SiteSide:
    """A site in one of two models. multiply_adds: for one token, every expert running."""

    what: str
    parameters: int
    multiply_adds: int
    executed: float | None = None


@dataclass(frozen=True)
class Comparison:
    """Two models side by side.

    names, costs: of both, each on its own example inputs. sites: by path, None where a model has no such site.
    difference: largest difference of the outputs on the first model's example inputs, relative to the largest output;
    None if they could not be compared, and `note` says why. nodes: what differs in the graphs, if asked for.
    """

    names: tuple[str, str]
    costs: tuple[Cost, Cost]
    sites: dict[str, tuple[SiteSide | None, SiteSide | None]]
    difference: float | None = None
    note: str = ""
    nodes: GraphDiff | None = field(default=None)


def compare_models(first: Opened, second: Opened, *, with_nodes: bool = False) -> Comparison:
    """Compare two models: cost, sites by path, and what they compute."""
    args, kwargs = as_args_kwargs(first.inputs)
    costs = measure(first.graph, args, kwargs)[0], measure(second.graph, *as_args_kwargs(second.inputs))[0]
    difference, note = None, ""
    try:
        difference = relative_error(run(second.graph, args, kwargs), run(first.graph, args, kwargs))
    except Exception as error:  # whatever a graph raises for inputs that are not its own
        note = f"The outputs cannot be compared on the first model's example inputs: {_first_line(error)}."
    sides = _sides(first), _sides(second)
    return Comparison(
        (first.spec, second.spec),
        costs,
        {path: (sides[0].get(path), sides[1].get(path)) for path in dict.fromkeys((*sides[0], *sides[1]))},
        difference,
        note,
        compare_unrelated(snapshot(first.graph), snapshot(second.graph)) if with_nodes else None,
    )


def _sides(opened: Opened) -> dict[str, SiteSide]:
    graph = opened.graph
    found = {
        ffn.path: SiteSide(ffn.describe, ffn.parameters(graph), ffn.multiply_adds) for ffn in _outside_experts(graph)[0]
    }
    _, layers = measure(graph, *as_args_kwargs(opened.inputs))
    for site in find_moes(graph):
        count = sum(parameter.numel() for parameter in graph.get_submodule(site.path).parameters())
        side = SiteSide(site.describe, count, site.multiply_adds, layers[site.path].share)
        found[site.path.rpartition(".")[0]] = side
    return found


# --- sweep ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Swept:
    """Quality and cost of a saved surgery at several tau, the first 0. dense_multiply_adds: before the surgery."""

    model: str
    data: str
    task: str
    dense_multiply_adds: int | None
    points: list[Point]


def parse_taus(text: str | None) -> tuple[float, ...]:
    """`"0.1,0.2"` → (0.0, 0.1, 0.2).

    Raises:
        UsageError: not numbers from 0 to 1.
    """
    if text is None:
        return USUAL_TAUS
    try:
        taus = [float(part) for part in text.split(",") if part.strip()]
    except ValueError:
        taus = []
    if not taus or not all(0.0 <= tau <= 1.0 for tau in taus):
        raise UsageError(f"--tau {text}: give numbers from 0 to 1, for example --tau 0,0.05,0.1.")
    return tuple(dict.fromkeys((0.0, *taus)))


def sweep(opened: Opened, taus: Sequence[float], *, progress: Callable[[Progress], None] | None = None) -> Swept:
    """Measure a model with experts at each tau, on the held-out part of its data or, without one, on all of it.

    Raises:
        UsageError: the model has no experts; the task is unknown. DataError: there are no labels.
    """
    assert opened.data is not None
    data = opened.data
    batches = data.eval if data.eval is not None else data.train
    task = opened.task
    if task is None:
        batch = next(iter(batches))
        task = task_of(None, run(opened.graph, batch.args, batch.kwargs), batch.labels)
    if task is None:
        raise UsageError("What is the model for? Its quality cannot be measured without --task.")
    before = (opened.record or {}).get("passes", [{}])[0].get("before")
    dense = None if before is None else int(before["multiply_adds"])
    points = run_sweep(
        opened.graph, batches, task, taus, inputs=opened.inputs, dense_multiply_adds=dense, progress=progress
    )
    return Swept(opened.spec, data.description, task, dense, points)


def _first_line(error: Exception) -> str:
    text = str(error).strip() or type(error).__name__
    return text.splitlines()[0].rstrip(".")

