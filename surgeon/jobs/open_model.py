"""Open the model that a user names: load it, find example inputs, read data, and trace it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn
from torch.export import ExportedProgram

from surgeon.data.data import Data
from surgeon.data.example_rows import example_rows, first_batch
from surgeon.data.files import Loader, load_data
from surgeon.errors import LoadError, UsageError, first_line
from surgeon.graph.agreement import call_reproducibly
from surgeon.graph.calls import argument_names, as_args_kwargs, named_arguments
from surgeon.graph.traced import TracedGraph
from surgeon.jobs.options import DataOptions
from surgeon.models.example_inputs import example_inputs
from surgeon.models.given_inputs import inputs_from, inputs_of_program
from surgeon.models.hugging_face import companions
from surgeon.models.source import Source, check_finite, load_model
from surgeon.models.tasks import HEADS
from surgeon.models.user_function import import_modules
from surgeon.progress import Stage, unshown
from surgeon.surgery.artifact import load_with_inputs
from surgeon.surgery.origin import Origin
from surgeon.surgery.record import Record, record_of
from surgeon.tracing.trace import TraceInfo, from_program, trace

_KINDS = {
    "hf": "Hugging Face model",
    "pickle": "pickled module",
    "pt2": "exported program",
    "state_dict": "state dict",
    "artifact": "saved surgery",
    "python": "Python function",
}


@dataclass(frozen=True)
class Opened:
    """A model that was loaded and traced.

    spec: what the user typed. graph: in evaluation mode. inputs: the example inputs. notes: from loading and tracing.
    record: of the surgery, if the model is an artifact. data: if it was asked for.
    """

    spec: str
    graph: TracedGraph
    inputs: Any
    origin: Origin
    notes: tuple[str, ...] = ()
    record: Record | None = None
    data: Data | None = None

    @property
    def kind(self) -> str:
        """The kind of file it was loaded from, in words."""
        return _KINDS[self.origin.kind]

    @property
    def task(self) -> str | None:
        """The task that the data gives, else the task of the model's class."""
        info: TraceInfo = self.graph.meta["trace"]
        return (self.data.task if self.data is not None else None) or info.task


def open_model(
    spec: str,
    *,
    inputs: str | None = None,
    fallback_inputs: Any = None,
    trust_pickle: bool = False,
    trust_modules: Sequence[str] = (),
    arch: str | None = None,
    task: str | None = None,
    data: DataOptions | None = None,
    only_graph: bool = False,
    stage: Stage = unshown,
) -> Opened:
    """Load a model or a saved surgery, find example inputs, trace it, and read data for it.

    Args:
        inputs: as `surgeon.models.given_inputs.inputs_from` takes them. By default the model's own, or the first rows
            of the data for a model that has none.
        fallback_inputs: example inputs for a model for which none can be made.
        trust_modules: imported first. The file may use output classes and operators that they register.
        task: chooses the head of a Hugging Face model. stage: called with the name of each step.
        only_graph: leave out config, tokenizer and processor beside a saved surgery, for a caller who neither reads
            data nor saves anything.

    Raises:
        LoadError, TraceError, UsageError, DataError: as the steps raise them.
    """
    given = None if inputs is None else inputs_from(inputs)
    with stage(f"loading {spec}"):
        import_modules(trust_modules)
        head = task if task in HEADS else None
        source = load_model(spec, trust_pickle=trust_pickle, arch=arch, task=head)
        if source.kind == "artifact":
            return _open_artifact(spec, source, given, data, only_graph, stage)
        assert source.model is not None
        check_finite(source.model)
    read = _read(data, source.tokenizer, source.processor, source.config, None, 0, stage)
    notes = list(source.notes)
    if isinstance(source.model, ExportedProgram):
        given = given if given is not None else inputs_of_program(source.model)
        graph = from_program(source.model)
        _check_runs(graph, given, spec)
    else:
        if given is None:
            if read is not None:
                given = example_rows(read)
                notes.append("The example inputs are two rows of the data.")
            else:
                given = _made_inputs(source.model, source, fallback_inputs)
        with stage(f"tracing {type(source.model).__name__}") as tell:
            graph = trace(source.model, given, progress=tell).eval()
    origin = Origin.of(
        source.model, source.config,
        path=str(source.path), kind=source.kind, sha256=source.sha256,
        tokenizer=source.tokenizer, processor=source.processor, notes=source.notes,
    )  # fmt: skip
    _check_names(read, graph)
    info: TraceInfo = graph.meta["trace"]
    return Opened(spec, graph, given, origin, (*notes, *info.notes), None, read)


def _made_inputs(model: nn.Module, source: Source, fallback: Any) -> Any:
    try:
        return example_inputs(model, tokenizer=source.tokenizer, processor=source.processor, config=source.config)
    except UsageError:
        if fallback is None:
            raise
        return fallback


def _open_artifact(
    spec: str, source: Source, given: Any, data: DataOptions | None, only_graph: bool, stage: Stage
) -> Opened:
    graph, inputs = load_with_inputs(source.path)
    if given is None:
        given = inputs
    _check_runs(graph, given, spec)
    config, tokenizer, processor, generation = (None,) * 4 if only_graph else companions(source.path)
    info: TraceInfo = graph.meta["trace"]
    record = record_of(graph)
    assert record is not None
    read = _read(data, tokenizer, processor, config, info.task, record.recipe.seed or 0, stage)
    _check_names(read, graph)
    origin = Origin(str(source.path), "artifact", record.model_sha256, config, tokenizer, processor, (), generation)
    return Opened(spec, graph, given, origin, info.notes, record, read)


def _check_runs(graph: TracedGraph, inputs: Any, spec: str) -> None:
    """Refuse a graph from a file that fails on its inputs: what the file says of its sizes or values is then wrong.

    Raises:
        LoadError: a call raises an exception.
    """
    try:
        call_reproducibly(graph, *as_args_kwargs(inputs))
    except Exception as error:
        raise LoadError(
            f"{spec} cannot be run on its example inputs: {first_line(error)}. Write the file again, or give --inputs."
        ) from error


def _read(
    options: DataOptions | None,
    tokenizer: Any,
    processor: Any,
    config: Any,
    task: str | None,
    seed: int,
    stage: Stage,
) -> Data | None:
    """Read the data, if any is asked for. task, seed: used where the options give none."""
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
            seed=seed if options.seed is None else options.seed,
            eval_fraction=options.eval_fraction,
            limit=options.limit,
        )


def _check_names(data: Data | None, graph: TracedGraph) -> None:
    """Refuse files whose batches the graph cannot be called with.

    Other data is not read here: reading it could change its order.
    """
    if data is None or not isinstance(getattr(data.train, "source", None), Loader):
        return
    batch = first_batch(data)
    try:
        named_arguments(graph, batch.args, batch.kwargs)
    except TypeError as error:
        names, wanted = ", ".join(batch.kwargs), ", ".join(argument_names(graph))
        raise UsageError(
            f"The data gives the inputs {names}, but the model was traced with {wanted}. Give example inputs of the "
            "names that the data gives, or data as module:function."
        ) from error
